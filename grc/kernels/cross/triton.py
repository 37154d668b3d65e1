"""`grc_cuda::cross` in Triton: the cross layer as one product whose epilogue weighs by x0 and adds x."""

from __future__ import annotations

from typing import Any

import torch
from torch.library import wrap_triton

from grc.kernels.dependent import ready
from grc.kernels.gpu_op import registering
from grc.kernels.rows import tl, triton
from grc.kernels.tiles import PROGRAMS, Tile, constants

DTYPES = (torch.float16, torch.bfloat16)  # float32 products are cuBLAS' to take: no tensor core rounds as they do


# The fastest with four warps on an H200 for 624 columns at batches 1 to 128, 256 to 1024, and from 2048 up.
FEW, SOME, MANY = Tile(64, 16, 128, 4), Tile(64, 64, 64, 4), Tile(64, 128, 64, 3)
FEW_ROWS, SOME_ROWS = 128, 1024
WARPS = 4


@triton.jit
def tile_of(  # type: ignore[no-untyped-def]
    x0, y, weight, bias, x, out, tile, M, N, K, x0_row, y_row, weight_row, x_row,
    BIASED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(N, BN)
    # Whole rows are skipped in 64 bits, once; offsets within a tile fit 32, and half as many registers.
    top = ((tile // across) * BM).to(tl.int64)
    row, k = tl.arange(0, BM), tl.arange(0, BK)
    column = (tile % across) * BN + tl.arange(0, BN)
    live, wide = row < M - top, column < N
    lefts = y + top * y_row + row[:, None] * y_row + k[None, :]
    rights = weight + column[:, None] * weight_row + k[None, :]
    total = tl.zeros([BM, BN], tl.float32)
    for at in tl.range(0, K, BK, num_stages=STAGES):
        deep = k < K - at
        left = tl.load(lefts + at, mask=live[:, None] & deep[None, :], other=0.0)
        right = tl.load(rights + at, mask=wide[:, None] & deep[None, :], other=0.0)
        total = tl.dot(left, tl.trans(right), total)
    if BIASED:
        total += tl.load(bias + column, mask=wide, other=0.0).to(tl.float32)[None, :]
    inside = live[:, None] & wide[None, :]
    first = tl.load(x0 + top * x0_row + row[:, None] * x0_row + column[None, :], mask=inside, other=0.0)
    last = tl.load(x + top * x_row + row[:, None] * x_row + column[None, :], mask=inside, other=0.0)
    answer = first.to(tl.float32) * total + last.to(tl.float32)
    place = out + top * N + row[:, None] * N + column[None, :]
    tl.store(place, answer.to(out.dtype.element_ty), mask=inside)


@triton.jit
def grc_cross(  # type: ignore[no-untyped-def]
    x0, y, weight, bias, x, out, M, N, K, x0_row, y_row, weight_row, x_row,
    BIASED: tl.constexpr, FEW_ROWS: tl.constexpr, SOME_ROWS: tl.constexpr,
    FM: tl.constexpr, FN: tl.constexpr, FK: tl.constexpr, FS: tl.constexpr,
    SM: tl.constexpr, SN: tl.constexpr, SK: tl.constexpr, SS: tl.constexpr,
    MM: tl.constexpr, MN: tl.constexpr, MK: tl.constexpr, MS: tl.constexpr,
):  # fmt: skip
    """One kernel for every batch size: it is compiled once, for a batch that is not known then."""
    program, programs = ready(tl.program_id(0)), tl.num_programs(0)
    if M <= FEW_ROWS:
        for tile in tl.range(program, tl.cdiv(M, FM) * tl.cdiv(N, FN), programs):
            tile_of(
                x0, y, weight, bias, x, out, tile, M, N, K, x0_row, y_row, weight_row, x_row, BIASED, FM, FN, FK, FS
            )
    elif M <= SOME_ROWS:
        for tile in tl.range(program, tl.cdiv(M, SM) * tl.cdiv(N, SN), programs):
            tile_of(
                x0, y, weight, bias, x, out, tile, M, N, K, x0_row, y_row, weight_row, x_row, BIASED, SM, SN, SK, SS
            )
    else:
        for tile in tl.range(program, tl.cdiv(M, MM) * tl.cdiv(N, MN), programs):
            tile_of(
                x0, y, weight, bias, x, out, tile, M, N, K, x0_row, y_row, weight_row, x_row, BIASED, MM, MN, MK, MS
            )


def able(x0: Any, y: Any, weight: Any, bias: Any, x: Any) -> bool:
    """Whether the kernel takes these operands: half precision, all of one dtype."""
    return x0.dtype in DTYPES and all(t is None or t.dtype == x0.dtype for t in (y, weight, bias, x))


def cross(
    x0: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor
) -> torch.Tensor:
    """x0 * (y @ weight.T + bias) + x: [B, D] (DCN V2; Wang et al. 2021, equation 1).

    x0, x [B, D], y [B, K], weight [D, K], bias [D], float16 or bfloat16. Sums, product and residual in float32, rounded
    once.
    """
    x0, y, weight, x = (t if t.stride(-1) == 1 else t.contiguous() for t in (x0, y, weight, x))
    batch, width = x0.shape
    out = x0.new_empty(batch, width)
    tiles = triton.cdiv(batch, FEW.rows) * triton.cdiv(width, FEW.columns)
    wrap_triton(grc_cross)[(torch.sym_min(tiles, PROGRAMS),)](
        x0, y, weight, x0 if bias is None else bias, x, out, batch, width, y.shape[1],
        x0.stride(0), y.stride(0), weight.stride(0), x.stride(0),
        BIASED=bias is not None, FEW_ROWS=FEW_ROWS, SOME_ROWS=SOME_ROWS,
        **constants(F=FEW, S=SOME, M=MANY), num_warps=WARPS,
    )  # fmt: skip
    return out


register = registering(cross)
