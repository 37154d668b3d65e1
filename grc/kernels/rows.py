"""What the Triton kernels share: where a bag's ids and a table's rows lie, and how they are read and pooled."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from grc.errors import LoweringError
from grc.kernels.lookup.row_formats import ROW_FORMATS, number_bytes, row_bytes

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
NONE = tl.constexpr(NO_PADDING)


@functools.lru_cache(maxsize=1024)
def table(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The attribute lists of an op as one int64 tensor [len(values)] on `device`, made once for each value.

    It is a real tensor even while the op is traced: the tracer then keeps it as a constant of the graph. A tensor made
    by traced operators would be copied to the device in every run, and a copy from pageable memory can't be captured in
    a CUDA graph.
    """
    with _disable_current_modes(), torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.int64, device=device)


ARENA, INT8, INT4 = 0, ROW_FORMATS.index("int8"), ROW_FORMATS.index("int4")


class Layout(NamedTuple):
    """Where each feature's rows lie in an arena, in elements of it: the first one, the distance from one to the next, and
    in a row of 8 or 4 bits the place of its scale. A thread takes `vec` columns at a time, and what it reads begins at a
    multiple of `align` elements."""

    form: int
    start: list[int]
    pitch: list[int]
    scale: list[int]
    vec: int
    align: int


def layout(arena: torch.Tensor, bases: Sequence[int], dims: Sequence[int], packing: Sequence[int] | None) -> Layout:
    """Bases count rows of a 2-D arena, which may be a view of a wider one, and elements of a 1-D one. An arena of bytes is
    laid out by its `packing`."""
    if packing:
        form, start = packing[0], list(packing[1::2])
        pitch = [row_bytes(ROW_FORMATS[form], dim) for dim in dims]
        scale = [number_bytes(ROW_FORMATS[form], dim) for dim in dims]
        vec = math.gcd(16, *dims)
        return Layout(form, start, pitch, scale, vec, math.gcd(vec // (2 if form == INT4 else 1), *pitch, *start))
    flat = arena.dim() == 1
    pitch = list(dims) if flat else [arena.stride(0)] * len(dims)
    start = list(bases) if flat else [base * arena.stride(0) for base in bases]
    vec = math.gcd(16 // arena.element_size(), *dims, *pitch, *start)
    return Layout(ARENA, start, pitch, [0] * len(dims), vec, vec)


def able(arena: torch.Tensor, dims: Sequence[int], packing: Sequence[int] | None) -> bool:
    """Whether the kernels read the rows of this arena: floats, or all of 8 or all of 4 bits, whole words before the scale."""
    if not packing:
        return arena.dtype in (torch.float32, torch.float16, torch.bfloat16)
    forms = set(packing[::2])
    return forms in ({INT8}, {INT4}) and all(dim % (4 if forms == {INT8} else 8) == 0 for dim in dims)


def answer_dtype(arena: torch.Tensor) -> torch.dtype:
    """What is written: rows of 8 or 4 bits are exact enough in float16."""
    return torch.float16 if arena.dtype is torch.uint8 else arena.dtype


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


# 1024 + n is a float16 with n in its lowest bits: four bytes become four of them by two permutations, where conversions
# would be done one by one. Of a byte that two columns share, the bits of one are
# picked before.
HALVES = "prmt.b32 $0, {0}, 0x64646464, 0x4140; prmt.b32 $1, {0}, 0x64646464, 0x4342;"
EIGHT_BITS = tl.constexpr(HALVES.format("$2"))
LOW_BITS = tl.constexpr("{ .reg .b32 t; and.b32 t, $2, 0x0f0f0f0f; " + HALVES.format("t") + " }")
HIGH_BITS = tl.constexpr("{ .reg .b32 t; shr.u32 t, $2, 4; and.b32 t, t, 0x0f0f0f0f; " + HALVES.format("t") + " }")
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def halves(byte, FORM: tl.constexpr, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """The numbers of 8 bits in bytes, or of 4 bits the first or second ones, as float16."""
    if INTERPRETED:
        number = byte if FORM == 3 else ((byte >> 4) if PART == 1 else (byte & 15))
        return number.to(tl.float16)
    elif FORM == 3:
        raised = tl.inline_asm_elementwise(EIGHT_BITS, "=r,=r,r", [byte], dtype=tl.float16, is_pure=True, pack=4)
    elif PART == 1:
        raised = tl.inline_asm_elementwise(HIGH_BITS, "=r,=r,r", [byte], dtype=tl.float16, is_pure=True, pack=4)
    else:
        raised = tl.inline_asm_elementwise(LOW_BITS, "=r,=r,r", [byte], dtype=tl.float16, is_pure=True, pack=4)
    return raised - 1024.0


@triton.jit
def fetch(  # type: ignore[no-untyped-def]
    arena, start, index, rows, pitch, scale, wanted, left, width: tl.constexpr,
    K: tl.constexpr, ALIGN: tl.constexpr, FORM: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Rows `index` [N] at columns left .. left + K - 1, as [N, K]: zeros for columns from `width` on, and for rows not
    wanted or outside 0..rows-1. They come in the arena's dtype, and of 8 or 4 bits (FORM 3, 4) in float16.

    Of 4 bits two columns share a byte: PART 0 or 1 takes the first or second of each pair only, `left` and `width` counting
    pairs, and PART 2 both.
    """
    # ALIGN divides starts, pitches and columns, which the compiler can't see in values that it loads.
    offset = start + index * pitch
    known = wanted & (index >= 0) & (index < rows)
    if FORM == 0:
        column = left + tl.arange(0, K)
        offset = tl.multiple_of(offset, ALIGN)
        seen = known[:, None] & (column < width)[None, :]
        return tl.load(arena + offset[:, None] + column[None, :], mask=seen, other=0.0)
    else:
        # Scale and offset are one word. It is loaded as a column: of a mask [N] Triton loses the layout beside a product.
        ends = (arena + tl.multiple_of(offset + scale, 4)).to(tl.pointer_type(tl.int32))[:, None]
        word = tl.load(ends, mask=known[:, None], other=0)
        step = word.to(tl.int16).to(tl.float16, bitcast=True)
        least = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        SHARED: tl.constexpr = 2 if FORM == 4 and PART == 2 else 1
        column = left // SHARED + tl.arange(0, K // SHARED)
        seen = known[:, None]
        if width % K != 0:
            seen = seen & (column < width // SHARED)[None, :]
        place = arena + tl.multiple_of(offset, ALIGN)[:, None] + column[None, :]
        byte = tl.load(place, mask=seen, other=0)
        if SHARED == 2:
            row = tl.interleave(halves(byte, FORM, 0), halves(byte, FORM, 1)) * step + least
        else:
            row = halves(byte, FORM, PART) * step + least
        if width % K != 0:  # a row that is not known has a scale and an offset of zero
            row = tl.where((left + tl.arange(0, K) < width)[None, :], row, 0.0)
        return row


LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(v):
    """In float32, within a few units in the last place: a root's reciprocal is one instruction, and a quotient ten."""
    root = tl.rsqrt(1.0 + tl.exp2(v * -LOG2E))
    return root * root


@triton.jit
def bag(offsets, feature, sample, B, V, live):
    """Where the jagged bag (feature, sample) begins in ids [V], and how many ids it holds."""
    slot = feature.to(tl.int64) * B + sample
    begin = tl.maximum(tl.load(offsets + slot, mask=live, other=0).to(tl.int64), 0)
    end = tl.minimum(tl.load(offsets + slot + 1, mask=live, other=0).to(tl.int64), V)
    return begin, end - begin


@triton.jit
def outside(index, rows, padding, PADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which ids have no row and are no padding. What stands for no padding is an id too: NaN as an integer."""
    found = (index < 0) | (index >= rows)
    if PADDED:
        found = found & ((index != padding) | (padding == NONE))
    return found


@triton.jit
def pool(  # type: ignore[no-untyped-def]
    arena, ids, weights, first, step, weight_first, weight_step, count,
    start, rows, pitch, scale, padding, left, width: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, ALIGN: tl.constexpr, FORM: tl.constexpr, PART: tl.constexpr,
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
            given = t + u < count
            index = tl.load(ids + first + (t + u) * step, mask=given, other=0).to(tl.int64)
            wanted = given & (index != padding) if PADDED else given
            row = fetch(arena, start, index, rows, pitch, scale, wanted, left, width, K, ALIGN, FORM, PART).to(
                tl.float32
            )
            if WEIGHTED:
                weight = tl.load(weights + weight_first + (t + u) * weight_step, mask=wanted, other=0.0)
                row = row * weight.to(tl.float32)[:, None]
            if POOLING == 2:
                row = tl.where(wanted[:, None], row, float("-inf"))
                total = tl.maximum(total, row, propagate_nan=tl.PropagateNan.ALL)
            else:
                total += row
            seen += wanted.to(tl.float32)
            bad += (given & outside(index, rows, padding, PADDED)).to(tl.int32)
    if POOLING == 1:
        total = total / tl.maximum(seen, 1.0)[:, None]
    if POOLING == 2:
        total = tl.where(seen[:, None] > 0, total, 0.0)
    return total, bad


@triton.jit
def tell(bad, told):
    """Add the bad ids that a program met to a counter, of which `told` has the address and its complement.

    An address is no operand that a compiler would have to clear, copy or order; and what Inductor runs kernels on while it
    builds a package is none.
    """
    met = tl.sum(bad, 0).to(tl.int64)
    address = tl.load(told, mask=met > 0, other=0)
    sound = (met > 0) & (address == ~tl.load(told + 1, mask=met > 0, other=0))
    tl.atomic_add(address.to(tl.pointer_type(tl.int64)), met, mask=sound)
