"""Merging: requests of one model as one batch, and its answer cut into theirs.

Which of an input's sizes is the batch stands in the manifest. Ids of jagged features lie feature after feature, so that
merging two requests takes turns between them: which input holds the lengths is found in the golden requests, and a way to
merge counts only when merged golden requests are answered as they are alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grc.runtime.golden import Golden
from grc.runtime.server.cut import Cut, Whole
from grc.runtime.server.packed import Packed, joined, tensors_of

Tensors = list[torch.Tensor]
INTEGERS = (torch.int64, torch.int32)


@dataclass(frozen=True)
class Jagged:
    """Inputs `[V, …]` whose rows belong to `keys` features of every row of the batch, counted by the input `lengths`.

    `offsets` says that the counts are running sums with a zero in front.
    """

    values: tuple[int, ...]
    lengths: int
    keys: int
    offsets: bool

    def counts(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """`[keys, B]`: how many values each feature of each row has."""
        given = tensors[self.lengths]
        return (given.diff() if self.offsets else given).view(self.keys, -1)

    def fits(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the counts are what the values say they are."""
        given = tensors[self.lengths]
        if (
            given.numel() < self.keys
            or (given.numel() - self.offsets) % self.keys
            or (self.offsets and int(given[0]) != 0)
        ):
            return False
        counts = self.counts(tensors)
        total = int(counts.sum())
        return bool((counts >= 0).all()) and all(tensors[i].shape[0] == total for i in self.values)

    def merge(self, requests: Sequence[Sequence[torch.Tensor]], merged: Tensors) -> None:
        counts = [self.counts(tensors) for tensors in requests]
        together = torch.cat(counts, 1).reshape(-1)
        merged[self.lengths] = (
            torch.cat([together.new_zeros(1), together.cumsum(0, dtype=together.dtype)]) if self.offsets else together
        )
        sizes = [found.sum(1).tolist() for found in counts]
        for index in self.values:
            split = [tensors[index].split(own) for tensors, own in zip(requests, sizes, strict=True)]
            merged[index] = torch.cat([parts[key] for key in range(self.keys) for parts in split])


class Merge:
    """How requests of one artifact become one batch. `reason` says why they can't, and then each runs alone."""

    def __init__(self, manifest: Mapping[str, Any]):
        inputs, outputs = manifest["inputs"], manifest["outputs"]
        self.inputs = inputs
        self.max_batch: int = manifest["batch"]["max"]
        self.batch_dims = [one_batch(entry) for entry in inputs]
        self.answer_dims = [one_batch(entry) for entry in outputs]
        self.free = [
            (i, dim, size)
            for i, entry in enumerate(inputs)
            for dim, size in enumerate(entry["sizes"])
            if isinstance(size, str) and size != "batch"
        ]
        self.jagged: list[Jagged] = []
        self.names = [entry["name"] for entry in inputs]
        self.reason = obstacle(inputs, outputs) if manifest["batch"]["dynamic"] else "the model's sizes are fixed"

    @property
    def ragged(self) -> bool:
        return bool(self.free)

    def key(self, tensors: Sequence[torch.Tensor], rows: int) -> tuple[int, ...]:
        """Requests of one key may share a batch: equal padded lengths, and jagged ones of about one length, because a
        batch takes as long as its longest histories."""
        if not self.free:
            return ()
        own = {index for group in self.jagged for index in group.values}
        return tuple(
            (tensors[i].shape[0] // max(rows, 1)).bit_length() if i in own else tensors[i].shape[dim]
            for i, dim, _ in self.free
        )

    def group(self, inputs: Packed | Tensors, rows: int) -> tuple[int, ...] | None:
        """The key of a request, or None for one that must run alone: its model's do, or its lengths are wrong."""
        if self.reason is not None:
            return None
        if not self.free:
            return ()
        tensors = tensors_of(inputs)
        return self.key(tensors, rows) if self.fits(tensors) else None

    def join(self, requests: Sequence[Sequence[torch.Tensor]]) -> Tensors:
        """One batch of requests of one key."""
        merged: Tensors = list(requests[0])
        for group in self.jagged:
            group.merge(requests, merged)
        for index, dim in enumerate(self.batch_dims):
            if dim is not None and all(index != group.lengths for group in self.jagged):
                merged[index] = torch.cat([tensors[index] for tensors in requests], dim)
        return merged

    def join_all(self, requests: Sequence[Packed | Tensors]) -> Tensors:
        """`join`, by one copy for each input where all requests are bytes and their rows lie one after the other."""
        packed = [request for request in requests if isinstance(request, Packed)]
        if self.free or any(self.batch_dims) or len(packed) < len(requests):
            return self.join([tensors_of(request) for request in requests])
        rows = sum(request.rows for request in packed)
        first = packed[0]
        return [
            joined([request.data[i] for request in packed], (rows, *shape[1:]), dtype)
            for i, (shape, dtype) in enumerate(zip(first.shapes, first.dtypes, strict=True))
        ]

    def cut(self, answers: Sequence[torch.Tensor], rows: Sequence[int]) -> list[Cut]:
        """The answer to each request of a batch, as parts of the whole."""
        ends = list(itertools.accumulate(rows))
        whole = Whole(answers, self.answer_dims, ends[-1])
        return [Cut(whole, end - count, end) for end, count in zip(ends, rows, strict=True)]

    def fits(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether a request may be merged: jagged ones only where their lengths are right."""
        return all(group.fits(tensors) for group in self.jagged)

    def prepare(self, golden: Sequence[Golden], rows_of: Any) -> None:
        """Find out how jagged inputs hang together. What stays unclear is a reason to run requests alone."""
        if self.reason is not None or not self.free:
            return
        requests = [r.inputs for r in golden]
        for name in dict.fromkeys(size for i, dim, size in self.free if self.batch_dims[i] is None):
            values = tuple(i for i, dim, size in self.free if size == name and dim == 0)
            found = find_lengths(values, requests, [rows_of(r) for r in requests])
            if found is None:
                self.reason = f"nothing tells the lengths of input {self.names[values[0]]}"
                return
            self.jagged.append(found)
        counted = {group.lengths for group in self.jagged}
        left = [i for i, entry in enumerate(self.inputs) if i not in counted and scaled(entry)]
        if left:
            self.reason = f"input {self.names[left[0]]} has a size that follows the batch in another way"


def one_batch(entry: Mapping[str, Any]) -> int | None:
    return next((dim for dim, size in enumerate(entry["sizes"]) if size == "batch"), None)


def obstacle(inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> str | None:
    for entry in inputs:
        sizes = entry["sizes"]
        if sizes.count("batch") > 1:
            return f"input {entry['name']} has the batch in two dimensions"
        varying = [dim for dim, size in enumerate(sizes) if not isinstance(size, int)]
        if not varying:
            return f"input {entry['name']} has no row for each row of the request"
        if "batch" not in sizes and varying != [0]:
            return f"input {entry['name']} has a size that is not the batch in dimension {varying[-1]}"
        if scaled(entry) and not any(free(e) for e in inputs):
            return f"input {entry['name']} has a size that follows the batch in another way"
    for index, entry in enumerate(outputs):
        if entry["sizes"].count("batch") != 1 or any(isinstance(size, dict | str) for size in rest(entry)):
            return f"output {index} has no row for each row of the request"
    return None


def free(entry: Mapping[str, Any]) -> bool:
    return any(isinstance(size, str) and size != "batch" for size in entry["sizes"])


def scaled(entry: Mapping[str, Any]) -> bool:
    return any(isinstance(size, dict) for size in entry["sizes"])


def rest(entry: Mapping[str, Any]) -> list[Any]:
    return [size for size in entry["sizes"] if size != "batch"]


def find_lengths(values: tuple[int, ...], requests: Sequence[Tensors], rows: Sequence[int]) -> Jagged | None:
    """The input that counts these values in every golden request, as lengths or as offsets."""
    for index, tensor in enumerate(requests[0]):
        if index in values or tensor.dtype not in INTEGERS or tensor.dim() != 1 or len(requests) < 2:
            continue
        for offsets in (False, True):
            keys, left = divmod(tensor.numel() - offsets, rows[0])
            group = Jagged(values, index, keys, offsets)
            sized = (
                keys > 0
                and not left
                and all(r[index].numel() - offsets == keys * n for r, n in zip(requests, rows, strict=True))
            )
            if sized and all(group.fits(r) for r in requests):
                return group
    return None
