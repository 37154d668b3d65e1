"""What the Triton kernels share: where a bag's ids and a table's rows lie, and how they are read and pooled."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch.utils._python_dispatch import _disable_current_modes

from grc.errors import LoweringError

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise LoweringError(
        "the GPU kernels need Triton, and it can't be imported here",
        "pip install triton, or compile for the CPU",
    ) from missing

SUM, MEAN, MAX = 0, 1, 2
NO_PADDING = -(2**63)


@functools.lru_cache(maxsize=1024)
def table(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The attribute lists of an op as one int64 tensor [len(values)] on `device`, made once for each value.

    It is a real tensor even while the op is traced: the tracer then keeps it as a constant of the graph. A tensor made
    by traced operators would be copied to the device in every run, and a copy from pageable memory can't be captured in
    a CUDA graph.
    """
    with _disable_current_modes(), torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.int64, device=device)


def vector(arena: torch.Tensor, *multiples: int) -> int:
    """How many elements one access may take: at most 16 bytes, and a divisor of every row's start and width."""
    return math.gcd(16 // arena.element_size(), *multiples)


def pitches(arena: torch.Tensor, dims: Sequence[int]) -> list[int]:
    """Elements from one row to the next, for each feature: a 2-D arena may be a view of a wider one."""
    return [arena.stride(0)] * len(dims) if arena.dim() == 2 else list(dims)


def starts(arena: torch.Tensor, bases: Sequence[int]) -> list[int]:
    """The first element of each feature's table: bases count rows of a 2-D arena, elements of a 1-D one."""
    return [base * arena.stride(0) for base in bases] if arena.dim() == 2 else list(bases)


def columns(lengths: Sequence[int]) -> list[int]:
    """The first column of each feature in ids [B, sum(lengths)]."""
    return [sum(lengths[:f]) for f in range(len(lengths))]


def strides(ids: torch.Tensor) -> tuple[int, int]:
    """Steps between samples and between the ids of a bag; jagged ids [V] have only the second."""
    return (ids.stride(0), ids.stride(1)) if ids.dim() == 2 else (0, ids.stride(0))


def check(arena: torch.Tensor, weights: torch.Tensor | None, pooling: int) -> None:
    """Raise LoweringError for what no kernel here computes."""
    if arena.stride(-1) != 1:
        raise LoweringError("the rows of an arena must be contiguous", "call .contiguous() on the table first")
    if weights is not None and pooling != SUM:
        raise LoweringError("weights of ids are defined for sum pooling only", "use mode='sum'")


@triton.jit
def fetch(arena, start, index, rows, pitch, wanted, column, inside, VEC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows `index` [N] at columns `column` [K], as [N, K]: zeros for rows not wanted or outside 0..rows-1."""
    # VEC divides starts, pitches and columns, which the compiler can't see in values that it loads.
    offset = tl.multiple_of(start + index * pitch, VEC)
    known = wanted & (index >= 0) & (index < rows)
    return tl.load(arena + offset[:, None] + column[None, :], mask=known[:, None] & inside[None, :], other=0.0)


@triton.jit
def bag(offsets, feature, sample, B, V, live):
    """Where the jagged bag (feature, sample) begins in ids [V], and how many ids it holds."""
    slot = feature.to(tl.int64) * B + sample
    begin = tl.maximum(tl.load(offsets + slot, mask=live, other=0).to(tl.int64), 0)
    end = tl.minimum(tl.load(offsets + slot + 1, mask=live, other=0).to(tl.int64), V)
    return begin, end - begin


@triton.jit
def pool(  # type: ignore[no-untyped-def]
    arena, ids, weights, first, step, weight_first, weight_step, count,
    start, rows, pitch, padding, column, inside,
    N: tl.constexpr, K: tl.constexpr, VEC: tl.constexpr,
    POOLING: tl.constexpr, PADDED: tl.constexpr, WEIGHTED: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Pool N bags of `count` [N] ids over K columns in float32: [N, K], and how many ids of each are outside of its table.

    An empty bag gives zeros.
    """
    bad = tl.zeros([N], tl.int32)
    total = tl.full([N, K], float("-inf") if POOLING == 2 else 0.0, tl.float32)
    seen = tl.zeros([N], tl.float32)
    for t in range(0, tl.max(count, 0), UNROLL):
        # The loads of one round don't wait for each other.
        for u in tl.static_range(UNROLL):
            wanted = t + u < count
            index = tl.load(ids + first + (t + u) * step, mask=wanted, other=0).to(tl.int64)
            if PADDED:
                wanted = wanted & (index != padding)
            row = fetch(arena, start, index, rows, pitch, wanted, column, inside, VEC).to(tl.float32)
            if WEIGHTED:
                weight = tl.load(weights + weight_first + (t + u) * weight_step, mask=wanted, other=0.0)
                row = row * weight.to(tl.float32)[:, None]
            if POOLING == 2:
                row = tl.where(wanted[:, None], row, float("-inf"))
                total = tl.maximum(total, row, propagate_nan=tl.PropagateNan.ALL)
            else:
                total += row
            seen += wanted.to(tl.float32)
            bad += (wanted & ((index < 0) | (index >= rows))).to(tl.int32)
    if POOLING == 1:
        total = total / tl.maximum(seen, 1.0)[:, None]
    if POOLING == 2:
        total = tl.where(seen[:, None] > 0, total, 0.0)
    return total, bad


@triton.jit
def tell(bad, counter):
    """Add the bad ids that a program met to the launch's counter. There are none in nearly all requests."""
    met = tl.sum(bad, 0).to(tl.int64)
    tl.atomic_add(counter, met, mask=met > 0)
