"""The plan of a GPU part: which batch sizes have a CUDA graph, and how a request of another size becomes one of them."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

LINE = 256  # bytes: every tensor of an arena begins on a line of this size, as the allocator's own do


@dataclass(frozen=True)
class Spec:
    """One input or output: its dtype, its sizes, and which of them is the batch (None: none is)."""

    dtype: torch.dtype
    sizes: tuple[int, ...]
    batch_dim: int | None

    def shape(self, batch: int) -> tuple[int, ...]:
        return tuple(batch if dim == self.batch_dim else size for dim, size in enumerate(self.sizes))

    def bytes(self, batch: int) -> int:
        return math.prod(self.shape(batch)) * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """Buckets in rising order. Without buckets requests run as they come, launch by launch, and `reason` says why."""

    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    buckets: tuple[int, ...]
    streams: int = 1
    reason: str | None = None

    @classmethod
    def of(
        cls,
        inputs: Sequence[Mapping[str, Any]],
        outputs: Sequence[Mapping[str, Any]],
        buckets: Sequence[int],
        streams: int = 1,
        reason: str | None = None,
    ) -> Plan:
        """From the manifest's descriptions of inputs and outputs. `reason` rules buckets out from the start."""
        reason = reason or obstacle(inputs, outputs)
        if reason is not None:
            return cls((), (), (), streams, reason)
        taken, given = (tuple(spec(entry) for entry in entries) for entries in (inputs, outputs))
        dynamic = any(s.batch_dim is not None for s in taken)
        return cls(taken, given, tuple(sorted(set(buckets))) if dynamic else (1,), streams)

    def batch(self, inputs: Sequence[torch.Tensor]) -> int:
        """The batch of a request: 1 for a model of fixed sizes."""
        for entry, tensor in zip(self.inputs, inputs, strict=True):
            if entry.batch_dim is not None:
                return tensor.shape[entry.batch_dim]
        return 1

    def bucket(self, batch: int) -> int:
        """The smallest bucket that holds a batch no larger than the largest."""
        return self.buckets[bisect.bisect_left(self.buckets, batch)]

    def pieces(self, batch: int) -> Iterator[tuple[int, int]]:
        """(start, length) of the pieces that a batch is answered in: whole largest buckets, then what is left."""
        largest = self.buckets[-1]
        for start in range(0, batch, largest):
            yield start, min(largest, batch - start)

    def cut(self, inputs: Sequence[torch.Tensor], start: int, length: int) -> list[torch.Tensor]:
        """Rows start..start+length of every input that has rows."""
        return [
            tensor if entry.batch_dim is None else tensor.narrow(entry.batch_dim, start, length)
            for entry, tensor in zip(self.inputs, inputs, strict=True)
        ]

    def joined(self, answers: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        """The answers to the pieces of one request, one after another."""
        return [
            torch.cat([answer[i] for answer in answers], entry.batch_dim or 0) for i, entry in enumerate(self.outputs)
        ]


def spec(entry: Mapping[str, Any]) -> Spec:
    sizes = entry["sizes"]
    dim = next((i for i, size in enumerate(sizes) if size == "batch"), None)
    return Spec(getattr(torch, entry["dtype"]), tuple(s if isinstance(s, int) else 0 for s in sizes), dim)


def obstacle(inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> str | None:
    """Why requests can't be padded to a bucket, or None: every varying size must be the batch itself, once a tensor."""
    dynamic = any(not isinstance(size, int) for entry in inputs for size in entry["sizes"])
    for kind, entries in (("input", inputs), ("output", outputs)):
        for index, entry in enumerate(entries):
            name = f"{kind} {entry.get('name', index)}"
            varying = [size for size in entry["sizes"] if not isinstance(size, int)]
            if any(size != "batch" for size in varying):
                return f"{name} has a size that is not the batch: jagged requests have no bucket"
            if len(varying) > 1:
                return f"{name} has the batch in two dimensions"
            if kind == "output" and dynamic and not varying:
                return f"{name} has no row for each row of the request"
    return None


def layout(specs: Sequence[Spec], batch: int) -> tuple[list[int], int]:
    """Where each tensor begins in one arena that holds them all at this batch, and the arena's bytes."""
    starts, end = [], 0
    for entry in specs:
        starts.append(end)
        end += -(-entry.bytes(batch) // LINE) * LINE
    return starts, end


def views(arena: torch.Tensor, specs: Sequence[Spec], batch: int) -> list[torch.Tensor]:
    """The tensors of one batch size, as views of an arena of bytes."""
    starts, _ = layout(specs, batch)
    return [
        arena[start : start + entry.bytes(batch)].view(entry.dtype).view(entry.shape(batch))
        for start, entry in zip(starts, specs, strict=True)
    ]


def bucket_sizes(wanted: Sequence[int], smallest: int, largest: int, more: Sequence[int] = ()) -> tuple[int, ...]:
    """The sizes to capture: `wanted`, or a ladder of fours, and `more`, always with the smallest batch and the largest one."""
    ladder = (*(wanted or (1, 8, 32, 128, 512, 2048, 8192, 32768)), *more)
    return tuple(sorted({smallest, largest, *(size for size in ladder if smallest <= size <= largest)}))
