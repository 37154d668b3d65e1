"""`grc_cuda::small_linear` in Triton: a linear layer of few rows with its epilogue, in one launch.

At one row, cuBLAS takes twice the time of the launch and of the weight's way from L2. A program here takes a few columns of
one row, or of some steps of one user, and all of their depth at once, without tensor cores, and every multiprocessor has
some. Rows go to the tensor cores where there are more than a few; steps of one user where they are normalised first, since a
program that takes more columns normalises for all of them, or are deep. Whatever a program reads, it asks for before it waits
for any of it: a wait is most of its time. Weights are constant, so it asks for them before the kernel before it has ended.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.library import wrap_triton

from grc.errors import LoweringError
from grc.kernels.dependent import ready
from grc.kernels.gpu_op import registering
from grc.kernels.rows import sigmoid, tl, triton

# The fastest on an H200 for layers of 400 to 2048 columns: of one row, and of 10 to 40.
COLUMNS = 2  # of a program with one row
FEW = 4  # rows of single steps up to which every program takes one
STEPS, STEP_COLUMNS = 5, 4  # of a program with several rows, at most
DEPTH = 2048  # numbers of a column that are read at once
ONE_WARP = 1024  # numbers up to which one warp is enough for that
TILE = 16  # rows of a program on the tensor cores, and columns of one that normalises
NORMALISED = 1024  # numbers of a row that it normalises, each quarter by one warp; deeper rows are read in eighths


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
    if BIASED:
        start = tl.load(bias + close)
    if MUL:
        factor = tl.load(mul + near[:, None] * mul_row + close[None, :])
    if ADD:
        term = tl.load(add + near[:, None] * add_row + close[None, :])
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
    if BIASED:
        answer += start.to(tl.float32)[None, :]
    answer = activate(answer, ACTIVATION)
    if MUL:
        answer *= factor.to(tl.float32)
    if ADD:
        answer += term.to(tl.float32)
    seen = (row < R)[:, None] & (column < N)[None, :]
    tl.store(out + row[:, None] * N + column[None, :], answer.to(out.dtype.element_ty), mask=seen)


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
    weight = weight.contiguous()

    def rows(t: torch.Tensor, width: int) -> torch.Tensor:
        t = t.reshape(-1, width)
        return t if t.stride(1) == 1 else t.contiguous()

    left = rows(x, depth)
    first, last = (left if t is None else rows(t, columns) for t in (mul, add))
    count = left.shape[0]
    out = x.new_empty(count, columns)
    operands = (
        left, weight, left if bias is None else bias, first, last,
        *(left if t is None else t for t in (scale, shift)),
        out, count, columns, depth, left.stride(0), first.stride(0), last.stride(0),
    )  # fmt: skip
    given: dict[str, Any] = dict(
        BIASED=bias is not None, ACTIVATION=activation, MUL=mul is not None, ADD=add is not None
    )
    given |= dict(NORM=eps is not None, SCALED=scale is not None, SHIFTED=shift is not None, EPS=eps or 0.0)
    for kernel, high, across, sizes, asked in ways(x, count, depth, eps is not None):
        grid = (triton.cdiv(count, high) * triton.cdiv(columns, across) * asked,)
        wrap_triton(kernel)[grid](*operands, **given, **sizes)
    return out.reshape(*x.shape[:-1], columns)


def ways(x: torch.Tensor, count: Any, depth: int, norm: bool) -> list[tuple[Any, int, int, dict[str, int], Any]]:
    """How to launch: the kernel, its rows and columns, its sizes, and 1 or 0: of two, for rows whose number is unknown, a run
    takes one."""
    steps, wide, half = steps_of(x.shape[:-1]), triton.next_power_of_2(depth), x.dtype != torch.float32
    high, across, block = at_once(steps), COLUMNS if steps == 1 else STEP_COLUMNS, min(DEPTH, wide)
    warps = 1 if depth <= ONE_WARP else 4 if steps == 1 else 2
    plain = dict(ROWS=high, BN=across, BK=block, BLOCKS=triton.cdiv(depth, block), num_warps=warps)
    parts, beside = (4, TILE) if depth <= NORMALISED else (8, TILE // 2)
    block = max(wide // parts, 16)
    tiled = dict(BM=TILE, BN=beside, PARTS=parts, BK=block, WHOLE=depth == parts * block, num_warps=parts)
    few, many = (grc_small_linear, high, across, plain), (grc_tile_linear, TILE, beside, tiled)
    if steps > 1 or not half or depth > DEPTH:
        return [(*(many if steps > 1 and half and on_tensor_cores(depth, norm) else few), 1)]
    if isinstance(count, int):
        return [(*(few if count <= FEW else many), 1)]
    asked = torch.sym_min(FEW // torch.sym_max(count, 1), 1)
    return [(*few, asked), (*many, 1 - asked)]


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
