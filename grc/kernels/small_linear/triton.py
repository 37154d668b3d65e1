"""`grc_cuda::small_linear` in Triton: a linear layer of few rows with its epilogue, in one launch.

At one row, cuBLAS takes twice the time of the launch and of the weight's way from L2. A program here takes a few columns of
one row, or of some steps of one user, and all of their depth at once, without tensor cores, and every multiprocessor has
some. Rows go to the tensor cores where there are more than a few; steps of one user where they are normalised first, since a
program that takes more columns normalises for all of them, or are deep. Whatever a program reads, it asks for before it waits
for any of it: a wait is most of its time. Weights are constant, so it asks for them before the kernel before it has ended.
Some hundred rows are cut into blocks; there a product costs what it does in cuBLAS, and what it saves are launches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.library import wrap_triton

from grc.errors import LoweringError
from grc.kernels.dependent import ready
from grc.kernels.gpu_op import registering
from grc.kernels.rows import sigmoid, tl, triton
from grc.kernels.ways import by_count

# The fastest on an H200 for layers of 400 to 2048 columns: of one row, and of 10 to 40.
COLUMNS = 2  # of a program with one row
FEW = 4  # rows of single steps up to which every program takes one
STEPS, STEP_COLUMNS = 5, 4  # of a program with several rows, at most
DEPTH = 2048  # numbers of a column that are read at once
ONE_WARP = 1024  # numbers up to which one warp is enough for that
TILE = 16  # rows of a program on the tensor cores, and columns of one that normalises
NORMALISED = 1024  # numbers of a row that it normalises, each quarter by one warp; deeper rows are read in eighths
# The same for 80 rows, layers of 512 to 2048 columns: of a block of TILE rows, which lies in registers as a whole, or not.
HELD = 1 << 15  # numbers of a weight that a program asks for at once
WIDE = 1024  # columns from which on it has twice as many
SHALLOW = (
    512  # numbers of a row up to which blocks are read at once; deeper ones, where nothing is normalised, bit by bit
)
BIT, BITS = 128, 4  # numbers of a row at a time, and how many of them are on their way


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACTIVATION == 1:
        v = tl.where(v < 0, 0.0, v)  # max(v, 0) that keeps NaN
    elif ACTIVATION == 2:
        v = 0.5 * v * (1 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == 3:
        v = v * sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    elif ACTIVATION == 4:
        v = v * sigmoid(v)
    elif ACTIVATION == 5:
        v = sigmoid(v)
    elif ACTIVATION == 6:
        v = 2 * sigmoid(2 * v) - 1
    return v


@triton.jit
def row_of(x, at, step, seen):  # type: ignore[no-untyped-def]
    return tl.load(x + at * step, mask=seen, other=0.0).to(tl.float32)


@triton.jit
def grc_small_linear(  # type: ignore[no-untyped-def]
    x, weight, bias, mul, add, scale, shift, out, R, N, K, x_row, mul_row, add_row,
    BIASED: tl.constexpr, ACTIVATION: tl.constexpr, MUL: tl.constexpr, ADD: tl.constexpr,
    NORM: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr, EPS: tl.constexpr,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(N, BN)
    column, k = (tl.program_id(0) % across) * BN + tl.arange(0, BN), tl.arange(0, BK)
    wide = column < N
    rights = weight + column[:, None] * K + k[None, :]
    held = tl.load(rights, mask=wide[:, None] & (k < K)[None, :], other=0.0)
    first = (ready(tl.program_id(0)) // across).to(tl.int64) * ROWS
    start = tl.zeros([BN], tl.float32)
    if BIASED:
        start += tl.load(bias + column, mask=wide, other=0.0).to(tl.float32)
    totals = (start,) * ROWS
    factors, terms = (), ()
    for row in tl.static_range(ROWS):
        seen = wide & (first + row < R)
        if MUL:
            factors = factors + (row_of(mul + column, first + row, mul_row, seen),)  # type: ignore[assignment] # noqa: RUF005
        if ADD:
            terms = terms + (row_of(add + column, first + row, add_row, seen),)  # type: ignore[assignment] # noqa: RUF005
    for block in tl.static_range(BLOCKS):
        at = block * BK
        deep = k < K - at
        if block > 0:
            held = tl.load(rights + at, mask=wide[:, None] & deep[None, :], other=0.0)
        right = held.to(tl.float32)
        if SHIFTED:
            shifts = tl.load(shift + k, mask=deep, other=0.0).to(tl.float32)
        if SCALED:
            scales = tl.load(scale + k, mask=deep, other=0.0).to(tl.float32)
        lefts = ()
        for row in tl.static_range(ROWS):
            left = row_of(x + k + at, first + row, x_row, deep & (first + row < R))
            lefts = lefts + (left,)  # type: ignore[assignment] # noqa: RUF005
        if SHIFTED:
            right_shift = tl.sum(right * shifts[None, :], 1)
        if SCALED:
            right *= scales[None, :]
        sums = ()
        for row in tl.static_range(ROWS):
            left = lefts[row]  # type: ignore[misc]
            if NORM:
                left = tl.where(deep, left - tl.sum(left, 0) / K, 0.0)
                spread = tl.rsqrt(tl.sum(left * left, 0) / K + EPS)
                part = spread * tl.sum(left[None, :] * right, 1)
                if SHIFTED:
                    part += right_shift
            else:
                part = tl.sum(left[None, :] * right, 1)
            sums = sums + (totals[row] + part,)  # type: ignore[assignment] # noqa: RUF005
        totals = sums
    for row in tl.static_range(ROWS):
        seen = wide & (first + row < R)
        answer = activate(totals[row], ACTIVATION)
        if MUL:
            answer *= factors[row]  # type: ignore[misc]
        if ADD:
            answer += terms[row]  # type: ignore[misc]
        tl.store(out + (first + row) * N + column, answer.to(out.dtype.element_ty), mask=seen)


@triton.jit
def beside(  # type: ignore[no-untyped-def]
    bias, mul, add, row, column, mul_row, add_row, BIASED: tl.constexpr, MUL: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """What a tile of a product is finished with, and 0.0 for what there is none of."""
    start, factor, term = 0.0, 0.0, 0.0
    if BIASED:
        start = tl.load(bias + column)
    if MUL:
        factor = tl.load(mul + row[:, None] * mul_row + column[None, :])
    if ADD:
        term = tl.load(add + row[:, None] * add_row + column[None, :])
    return start, factor, term


@triton.jit
def finish(  # type: ignore[no-untyped-def]
    answer, start, factor, term, out, row, column, R, N,
    BIASED: tl.constexpr, ACTIVATION: tl.constexpr, MUL: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Bias, activation, factor and sum of a tile of a product, which is then stored."""
    if BIASED:
        answer += start.to(tl.float32)[None, :]
    answer = activate(answer, ACTIVATION)
    if MUL:
        answer *= factor.to(tl.float32)
    if ADD:
        answer += term.to(tl.float32)
    seen = (row < R)[:, None] & (column < N)[None, :]
    tl.store(out + row[:, None] * N + column[None, :], answer.to(out.dtype.element_ty), mask=seen)


@triton.jit
def grc_tile_linear(  # type: ignore[no-untyped-def]
    x, weight, bias, mul, add, scale, shift, out, R, N, K, x_row, mul_row, add_row,
    BIASED: tl.constexpr, ACTIVATION: tl.constexpr, MUL: tl.constexpr, ADD: tl.constexpr,
    NORM: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr, EPS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The same on the tensor cores: each warp takes a part of the depth."""
    across = tl.cdiv(N, BN)
    column = (tl.program_id(0) % across) * BN + tl.arange(0, BN)
    k = tl.arange(0, PARTS)[:, None] * BK + tl.arange(0, BK)[None, :]
    deep = k < K
    # Rows and columns beyond the last are the last once more, and not stored.
    close = tl.minimum(column, N - 1)
    rights = weight + close[None, None, :] * K + k[:, :, None]
    right = tl.load(rights) if WHOLE else tl.load(rights, mask=deep[:, :, None], other=0.0)
    row = (ready(tl.program_id(0)) // across).to(tl.int64) * BM + tl.arange(0, BM)
    near = tl.minimum(row, R - 1)
    lefts = x + near[None, :, None] * x_row + k[:, None, :]
    left = tl.load(lefts) if WHOLE else tl.load(lefts, mask=deep[:, None, :], other=0.0)
    if SCALED:
        scales = tl.load(scale + k, mask=deep, other=0.0)
    if SHIFTED:
        shifts = tl.load(shift + k, mask=deep, other=0.0)
    start, factor, term = beside(bias, mul, add, near, close, mul_row, add_row, BIASED, MUL, ADD)
    if NORM:
        wide = left.to(tl.float32)
        mean = tl.sum(tl.sum(wide, 2), 0) / K
        wide = tl.where(deep[:, None, :], wide - mean[None, :, None], 0.0)
        wide *= tl.rsqrt(tl.sum(tl.sum(wide * wide, 2), 0) / K + EPS)[None, :, None]
        if SCALED:
            wide *= scales.to(tl.float32)[:, None, :]
        if SHIFTED:
            wide += shifts.to(tl.float32)[:, None, :]
        left = wide.to(right.dtype)
    answer = tl.sum(tl.dot(left, right), 0)
    finish(answer, start, factor, term, out, row, column, R, N, BIASED, ACTIVATION, MUL, ADD)


@triton.jit
def block_at(x, row, step, k, K, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    place = x + row[:, None] * step + k[None, :]
    return tl.load(place) if WHOLE else tl.load(place, mask=(k < K)[None, :], other=0.0)


@triton.jit
def grc_block_linear(  # type: ignore[no-untyped-def]
    x, weight, bias, mul, add, scale, shift, out, R, N, K, x_row, mul_row, add_row,
    BIASED: tl.constexpr, ACTIVATION: tl.constexpr, MUL: tl.constexpr, ADD: tl.constexpr,
    NORM: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr, EPS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The same for more rows: a block of rows times a block of columns, of all their depth at once where BLOCKS is 1."""
    across = tl.cdiv(N, BN)
    column, k = (tl.program_id(0) % across) * BN + tl.arange(0, BN), tl.arange(0, BK)
    # Rows and columns beyond the last are the last once more, and not stored.
    close = tl.minimum(column, N - 1)
    if BLOCKS == 1:
        right = block_at(weight, close, K, k, K, WHOLE)
    row = (ready(tl.program_id(0)) // across).to(tl.int64) * BM + tl.arange(0, BM)
    near = tl.minimum(row, R - 1)
    if BLOCKS == 1:
        left = block_at(x, near, x_row, k, K, WHOLE)
    if SCALED:
        scales = tl.load(scale + k, mask=k < K, other=0.0).to(tl.float32)
    if SHIFTED:
        shifts = tl.load(shift + k, mask=k < K, other=0.0).to(tl.float32)
    start, factor, term = beside(bias, mul, add, near, close, mul_row, add_row, BIASED, MUL, ADD)
    if NORM:
        wide = left.to(tl.float32)
        wide = tl.where((k < K)[None, :], wide - (tl.sum(wide, 1) / K)[:, None], 0.0)
        wide *= tl.rsqrt(tl.sum(wide * wide, 1) / K + EPS)[:, None]
        if SCALED:
            wide *= scales[None, :]
        if SHIFTED:
            wide += shifts[None, :]
        left = wide.to(right.dtype)
    if BLOCKS == 1:
        answer = tl.dot(left, tl.trans(right))
    else:
        answer = tl.zeros([BM, BN], tl.float32)
        for at in tl.range(0, K, BK, num_stages=STAGES):
            right = block_at(weight, close, K, at + k, K, WHOLE)
            left = block_at(x, near, x_row, at + k, K, WHOLE)
            answer = tl.dot(left, tl.trans(right), answer)
    finish(answer, start, factor, term, out, row, column, R, N, BIASED, ACTIVATION, MUL, ADD)


def small_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mul: torch.Tensor | None,
    add: torch.Tensor | None,
    activation: int,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """act(norm(x) @ weight.T + bias) * mul + add: [..., N], for any number of rows, but fast for a few.

    x [..., K], weight [N, K], bias [N], mul and add like the result, all of one dtype: float32, float16 or bfloat16.
    `activation` is a place in `packed_linear.ACTIVATIONS`. With `eps`, rows of up to DEPTH numbers are normalised first, by
    `scale` and `shift` [K] (layer norm); LoweringError for longer ones. Sums, norm and epilogue in float32, rounded once.
    """
    columns, depth = weight.shape
    if eps is not None and depth > DEPTH:
        raise LoweringError(f"small_linear normalises no rows of {depth} numbers", f"give it {DEPTH} at most")
    out = x.new_empty(*x.shape[:-1], columns)
    launch(x, weight, bias, mul, add, activation, scale, shift, eps, out, 1)
    return out


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mul: torch.Tensor | None,
    add: torch.Tensor | None,
    activation: int,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float | None,
    out: torch.Tensor,
    asked: Any,
) -> None:
    """Write a layer to `out`, if that is asked for by 1, and not by 0."""
    columns, depth = weight.shape
    left = rows_of(x, depth)
    first, last = (left if t is None else rows_of(t, columns) for t in (mul, add))
    count = left.shape[0]
    operands = (
        left, weight.contiguous(), left if bias is None else bias, first, last,
        *(left if t is None else t for t in (scale, shift)),
        out, count, columns, depth, left.stride(0), first.stride(0), last.stride(0),
    )  # fmt: skip
    given: dict[str, Any] = dict(
        BIASED=bias is not None, ACTIVATION=activation, MUL=mul is not None, ADD=add is not None
    )
    given |= dict(NORM=eps is not None, SCALED=scale is not None, SHIFTED=shift is not None, EPS=eps or 0.0)
    for way, chosen in ways(x, count, columns, depth, eps is not None):
        grid = (triton.cdiv(count, way.rows) * triton.cdiv(columns, way.columns) * chosen * asked,)
        wrap_triton(way.kernel)[grid](*operands, **given, **way.sizes)


def rows_of(t: torch.Tensor, width: int) -> torch.Tensor:
    t = t.reshape(-1, width)
    return t if t.stride(1) == 1 else t.contiguous()


class Way(NamedTuple):
    """A kernel, the rows and columns of a program, and its sizes."""

    kernel: Any
    rows: int
    columns: int
    sizes: dict[str, Any]


def ways(x: torch.Tensor, count: Any, columns: int, depth: int, norm: bool) -> list[tuple[Way, Any]]:
    """How to launch, each way with 1 or 0: of several, for rows whose number is unknown, a run takes one."""
    steps, blocks = steps_of(x.shape[:-1]), blocked(columns, depth, norm)
    few = plain(steps, depth)
    if x.dtype == torch.float32:
        return [(few, 1)]
    found = [(few, TILE)]  # with the rows up to which each is the fastest
    if steps == 1 and depth <= DEPTH:
        found = [(few, FEW), (tiled(depth), TILE)]
    elif steps > 1 and on_tensor_cores(depth, norm):
        found = [(tiled(depth), TILE)]
    return by_count(count, [(way, most) for way, most in found if steps <= most], blocks)


def plain(steps: int, depth: int) -> Way:
    """Without tensor cores."""
    high, across = at_once(steps), COLUMNS if steps == 1 else STEP_COLUMNS
    block = min(DEPTH, triton.next_power_of_2(depth))
    warps = 1 if depth <= ONE_WARP else 4 if steps == 1 else 2
    sizes = dict(ROWS=high, BN=across, BK=block, BLOCKS=triton.cdiv(depth, block), num_warps=warps)
    return Way(grc_small_linear, high, across, sizes)


def tiled(depth: int) -> Way:
    parts, across = (4, TILE) if depth <= NORMALISED else (8, TILE // 2)
    block = max(triton.next_power_of_2(depth) // parts, 16)
    sizes = dict(BM=TILE, BN=across, PARTS=parts, BK=block, WHOLE=depth == parts * block, num_warps=parts)
    return Way(grc_tile_linear, TILE, across, sizes)


def blocked(columns: int, depth: int, norm: bool) -> Way:
    once = norm or depth <= SHALLOW
    deep = max(triton.next_power_of_2(depth), 16) if once else BIT
    across, warps = min(64 if columns >= WIDE else 32, max(HELD // deep, 16)), 4 if deep <= SHALLOW else 8
    sizes = dict(BM=TILE, BN=across, BK=deep, BLOCKS=triton.cdiv(depth, deep), STAGES=BITS, WHOLE=depth % deep == 0)
    return Way(grc_block_linear, TILE, across, sizes | dict(num_warps=warps))


def steps_of(sizes: Sequence[Any]) -> int:
    """The rows of one user: the product of the sizes that do not vary."""
    return max(1, math.prod(size for size in sizes if isinstance(size, int)))


def at_once(steps: int) -> int:
    """How many of a user's rows a program takes: up to STEPS, without a remainder where that is possible."""
    return 1 if steps == 1 else next((n for n in range(STEPS, 1, -1) if steps % n == 0), STEPS)


def on_tensor_cores(depth: int, norm: bool) -> bool:
    """Whether steps of this depth are faster there, measured for 512, 1024 and 2048 numbers."""
    return depth <= NORMALISED if norm else NORMALISED < depth <= DEPTH


register = registering(small_linear)
