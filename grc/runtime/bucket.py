"""A bucket: one batch size of a lane, its buffers and graphs, and how a request of fewer rows fills it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from grc.runtime.plan import Plan, Spec

Tensors = list[torch.Tensor]
LARGE = 128 << 10  # bytes an input: a thread copies them in about 10 us


@dataclass
class Bucket:
    """One batch size: its buffers, which are views of the lane's arenas, and its graphs."""

    batch: int
    host: Tensors
    device: Tensors
    graph: torch.cuda.CUDAGraph
    answers: Tensors
    kept: Sequence[torch.Tensor]
    bare: tuple[torch.cuda.CUDAGraph, Sequence[torch.Tensor]] | None = None
    cuts: dict[tuple[int, bool], Cut] = field(default_factory=dict)

    @cached_property
    def large(self) -> bool:
        """Whether a launch for each input costs less than copying the request once more on the host."""
        return sum(buffer.nbytes for buffer in self.host) >= LARGE * len(self.host)

    def cut(self, plan: Plan, batch: int, host: bool) -> Cut:
        """The buffers on one side, cut for a request of `batch` rows; made once for each size."""
        found = self.cuts.get((batch, host))
        if found is None:
            taken, given = (self.host, self.answers) if host else (self.device, [])
            found = self.cuts[batch, host] = Cut.of(plan, taken, given, batch)
        return found


@dataclass(frozen=True)
class Cut:
    """The rows of every input buffer that a request fills, their rows beyond it, and its rows of every answer."""

    rows: Tensors
    rest: list[tuple[torch.Tensor, int, int]]
    answers: Tensors

    @classmethod
    def of(cls, plan: Plan, taken: Tensors, given: Tensors, batch: int) -> Cut:
        rows, rest = [], []
        for at, (buffer, entry) in enumerate(zip(taken, plan.inputs, strict=True)):
            rows.append(narrowed(buffer, entry, batch))
            dim = entry.batch_dim
            if dim is not None and buffer.shape[dim] > batch:
                rest.append((buffer.narrow(dim, batch, buffer.shape[dim] - batch), at, dim))
        answers = [narrowed(a, s, batch) for a, s in zip(given, plan.outputs, strict=True)] if given else []
        return cls(rows, rest, answers)

    def fill(self, inputs: Tensors) -> None:
        """Copy a request in, and its row 0 into all rows beyond: its ids are as valid as the request's own."""
        for own, tensor in zip(self.rows, inputs, strict=True):
            own.copy_(tensor, True)
        for own, at, dim in self.rest:
            own.copy_(inputs[at].narrow(dim, 0, 1), True)


def narrowed(buffer: torch.Tensor, entry: Spec, batch: int) -> torch.Tensor:
    """The first `batch` rows of a buffer that has rows."""
    dim = entry.batch_dim
    return buffer if dim is None or buffer.shape[dim] == batch else buffer.narrow(dim, 0, batch)
