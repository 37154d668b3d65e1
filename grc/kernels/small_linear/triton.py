"""`grc_cuda::small_linear` in Triton: a linear layer of few rows with its epilogue, in one launch.

At one row, cuBLAS takes twice the time of the launch and of the weight's way from L2. A program here takes two columns of
one row and all of their depth at once, without tensor cores, and every multiprocessor has some.
"""

from __future__ import annotations

import functools

import torch
from torch.library import triton_op, wrap_triton

from grc.kernels.rows import tl, triton

COLUMNS = 2  # of a program; the fastest on an H200 for layers of 400 to 2048 columns
DEPTH = 2048  # numbers of a column that are read at once
ONE_WARP = 1024  # numbers up to which one warp is enough for that


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACTIVATION == 1:
        v = tl.where(v < 0, 0.0, v)  # max(v, 0) that keeps NaN
    elif ACTIVATION == 2:
        v = 0.5 * v * (1 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == 3:
        v = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    elif ACTIVATION == 4:
        v = v * tl.sigmoid(v)
    elif ACTIVATION == 5:
        v = tl.sigmoid(v)
    elif ACTIVATION == 6:
        v = 2 * tl.sigmoid(2 * v) - 1
    return v


@triton.jit
def small_linear_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, mul, add, out, N, K, x_row, mul_row, add_row,
    BIASED: tl.constexpr, ACTIVATION: tl.constexpr, MUL: tl.constexpr, ADD: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(N, BN)
    row = (tl.program_id(0) // across).to(tl.int64)
    column, k = (tl.program_id(0) % across) * BN + tl.arange(0, BN), tl.arange(0, BK)
    wide = column < N
    rights, lefts = weight + column[:, None] * K + k[None, :], x + row * x_row + k
    total = tl.zeros([BN], tl.float32)
    for block in tl.static_range(BLOCKS):
        at = block * BK
        deep = k < K - at
        right = tl.load(rights + at, mask=wide[:, None] & deep[None, :], other=0.0).to(tl.float32)
        left = tl.load(lefts + at, mask=deep, other=0.0).to(tl.float32)
        total += tl.sum(left[None, :] * right, 1)
    if BIASED:
        total += tl.load(bias + column, mask=wide, other=0.0).to(tl.float32)
    answer = activate(total, ACTIVATION)
    if MUL:
        answer *= tl.load(mul + row * mul_row + column, mask=wide, other=0.0).to(tl.float32)
    if ADD:
        answer += tl.load(add + row * add_row + column, mask=wide, other=0.0).to(tl.float32)
    tl.store(out + row * N + column, answer.to(out.dtype.element_ty), mask=wide)


def small_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mul: torch.Tensor | None,
    add: torch.Tensor | None,
    activation: int,
) -> torch.Tensor:
    """act(x @ weight.T + bias) * mul + add: [..., N], for any number of rows, but fast for a few.

    x [..., K], weight [N, K], bias [N], mul and add like the result, all of one dtype: float32, float16 or bfloat16.
    `activation` is a place in `packed_linear.ACTIVATIONS`. Sums and epilogue in float32, rounded once.
    """
    columns, depth = weight.shape
    weight = weight.contiguous()

    def rows(t: torch.Tensor, width: int) -> torch.Tensor:
        t = t.reshape(-1, width)
        return t if t.stride(1) == 1 else t.contiguous()

    left = rows(x, depth)
    first, last = (left if t is None else rows(t, columns) for t in (mul, add))
    count = left.shape[0]
    out = x.new_empty(count, columns)
    block = min(DEPTH, triton.next_power_of_2(depth))
    wrap_triton(small_linear_kernel)[(count * triton.cdiv(columns, COLUMNS),)](
        left, weight, left if bias is None else bias, first, last, out, columns, depth,
        left.stride(0), first.stride(0), last.stride(0),
        BIASED=bias is not None, ACTIVATION=activation, MUL=mul is not None, ADD=add is not None,
        BN=COLUMNS, BK=block, BLOCKS=triton.cdiv(depth, block), num_warps=1 if depth <= ONE_WARP else 4,
    )  # fmt: skip
    return out.reshape(*x.shape[:-1], columns)


@functools.cache
def register() -> torch._ops.OpOverload:
    """Define `grc_cuda::small_linear` once; torch.export keeps it whole, and AOTInductor compiles its kernel in."""
    triton_op("grc_cuda::small_linear", small_linear, mutates_args=())
    return torch.ops.grc_cuda.small_linear.default
