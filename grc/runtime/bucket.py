"""A bucket: one batch size of a lane, its buffers and graphs, and how a request of fewer rows fills it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from grc.runtime.plan import Plan, Spec, layout, views

Tensors = list[torch.Tensor]
LARGE = 128 << 10  # bytes an input: a thread copies them in about 10 us
APART = 64 << 10  # bytes of an answer from which on a copy of its own costs less than one more on the host
LENT = 64 << 20  # bytes of those answers that callers may hold for each bucket: those of two requests in any case
CUTS = 256  # sizes of requests whose cuts a bucket keeps
ON_HOST = 1 << 12  # numbers of a single answer up to which one thread of the host finds NaN sooner than the device does


@dataclass
class Recorded:
    """A captured graph, what launches it on its lane's stream, and the answers as it leaves them on the device."""

    graph: torch.cuda.CUDAGraph
    launch: Callable[[], None]
    answers: Sequence[torch.Tensor]
    tells: bool  # whether it tells the host of numbers that are not finite
    early: int  # kernels of it that begin before those that they follow have ended


@dataclass
class Bucket:
    """One batch size: its buffers, which are views of the lane's arenas, and its graphs by what they copy."""

    batch: int
    host: Tensors
    device: Tensors
    answers: Tensors
    early: bool = True  # whether its graphs let kernels begin early, where any can
    graphs: dict[tuple[bool, bool, bool], Recorded] = field(default_factory=dict)
    cuts: dict[tuple[int, bool], Cut] = field(default_factory=dict)
    lent: list[StorageWeakRef] = field(default_factory=list)

    @cached_property
    def large(self) -> bool:
        """Whether a launch for each input costs less than copying the request once more on the host."""
        return sum(buffer.nbytes for buffer in self.host) >= LARGE * len(self.host)

    @cached_property
    def apart(self) -> list[int]:
        """Which answers the graphs leave on the device, from where they go to memory of the caller's."""
        return [index for index, answer in enumerate(self.answers) if answer.nbytes >= APART]

    @cached_property
    def floating(self) -> list[int]:
        """Which answers may hold NaN."""
        return [index for index, answer in enumerate(self.answers) if answer.is_floating_point()]

    def tells(self, host: bool) -> bool:
        """Whether answers are looked through for NaN on the device: it takes them all in one launch."""
        numbers = [self.answers[index].numel() for index in self.floating]
        return bool(numbers) and (not host or len(numbers) > 1 or numbers[0] > ON_HOST)

    def block(self, specs: Sequence[Spec], batch: int, pinned: Callable[[int], torch.Tensor]) -> Tensors | None:
        """New pinned memory for answers to `batch` rows, or None while callers hold as much of it as they may."""
        self.lent = [storage for storage in self.lent if not storage.expired()]
        size = layout(specs, batch)[1]
        if len(self.lent) >= max(2, LENT // size):
            return None
        memory = pinned(size)
        self.lent.append(StorageWeakRef(memory.untyped_storage()))
        return views(memory, specs, batch)

    def cut(self, plan: Plan, batch: int, host: bool) -> Cut:
        """The buffers on one side, cut for a request of `batch` rows; those of the newest sizes are kept."""
        found = self.cuts.get((batch, host))
        if found is None:
            taken, given = (self.host, self.answers) if host else (self.device, [])
            if len(self.cuts) >= CUTS:
                self.cuts.pop(next(iter(self.cuts)))
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
