"""`grc_cuda::scaled_linear` in Triton: a product of 8-bit rows, scaled by row and column as its sums are written.

It is always taken: no library has this product, and Inductor would take it in float64.
"""

from __future__ import annotations

import torch
from torch.library import wrap_triton

from grc.kernels.dependent import ready
from grc.kernels.gpu_op import registering
from grc.kernels.rows import tl, triton
from grc.kernels.tiles import PROGRAMS, Tile, constants

# Of those tried, the fastest on an H100 for layers of 512 and 2048 columns at 10 and 80 rows, at 128 to 1280, and from
# 8192 up.
FEW, SOME, MANY = Tile(16, 32, 128, 4), Tile(64, 64, 128, 4), Tile(128, 128, 128, 3)
FEW_ROWS, SOME_ROWS = 64, 2048
WARPS = 4


@triton.jit
def tile_of(  # type: ignore[no-untyped-def]
    x, size, shift, weight, scale, sums, bias, out, tile, M, N, K, x_row,
    WHOLE: tl.constexpr, BIASED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    down = tl.cdiv(M, BM)
    # Neighbours share a tile of the weight. Whole rows are skipped in 64 bits, once; offsets within a tile fit 32.
    top = ((tile % down) * BM).to(tl.int64)
    side = ((tile // down) * BN).to(tl.int64)
    row, column, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    live, wide = row < M - top, column < N - side
    lefts = x + top * x_row + row[:, None] * x_row + k[None, :]
    rights = weight + side * K + column[:, None] * K + k[None, :]
    zero = 0 if WHOLE else 0.0
    total = tl.zeros([BM, BN], tl.int32 if WHOLE else tl.float32)
    for at in tl.range(0, K, BK, num_stages=STAGES):
        deep = k < K - at
        left = tl.load(lefts + at, mask=live[:, None] & deep[None, :], other=zero)
        right = tl.load(rights + at, mask=wide[:, None] & deep[None, :], other=zero)
        if WHOLE:
            total = tl.dot(left, tl.trans(right), total, out_dtype=tl.int32)
        else:
            # Hopper's tensor cores sum fp8 in fewer bits than float32: as few products as they take at once.
            total = tl.dot(left, tl.trans(right), total, max_num_imprecise_acc=32)
    if WHOLE:
        moved = tl.load(shift + top + row, mask=live, other=0)
        total += moved[:, None] * tl.load(sums + side + column, mask=wide, other=0)[None, :]
    answer = total.to(tl.float32) * tl.load(size + top + row, mask=live, other=0.0)[:, None]
    answer *= tl.load(scale + side + column, mask=wide, other=0.0)[None, :]
    if BIASED:
        answer += tl.load(bias + side + column, mask=wide, other=0.0)[None, :]
    place = out + top * N + side + row[:, None] * N + column[None, :]
    tl.store(place, answer.to(out.dtype.element_ty), mask=live[:, None] & wide[None, :])


@triton.jit
def grc_scaled_linear(  # type: ignore[no-untyped-def]
    x, size, shift, weight, scale, sums, bias, out, M, N, K, x_row,
    WHOLE: tl.constexpr, BIASED: tl.constexpr, FEW_ROWS: tl.constexpr, SOME_ROWS: tl.constexpr,
    FM: tl.constexpr, FN: tl.constexpr, FK: tl.constexpr, FS: tl.constexpr,
    SM: tl.constexpr, SN: tl.constexpr, SK: tl.constexpr, SS: tl.constexpr,
    MM: tl.constexpr, MN: tl.constexpr, MK: tl.constexpr, MS: tl.constexpr,
):  # fmt: skip
    """One kernel for every number of rows: it is compiled once, for a batch that is not known then."""
    program, programs = ready(tl.program_id(0)), tl.num_programs(0)
    if M <= FEW_ROWS:
        for tile in tl.range(program, tl.cdiv(M, FM) * tl.cdiv(N, FN), programs):
            tile_of(x, size, shift, weight, scale, sums, bias, out, tile, M, N, K, x_row, WHOLE, BIASED, FM, FN, FK, FS)
    elif M <= SOME_ROWS:
        for tile in tl.range(program, tl.cdiv(M, SM) * tl.cdiv(N, SN), programs):
            tile_of(x, size, shift, weight, scale, sums, bias, out, tile, M, N, K, x_row, WHOLE, BIASED, SM, SN, SK, SS)
    else:
        for tile in tl.range(program, tl.cdiv(M, MM) * tl.cdiv(N, MN), programs):
            tile_of(x, size, shift, weight, scale, sums, bias, out, tile, M, N, K, x_row, WHOLE, BIASED, MM, MN, MK, MS)


def scaled_linear(
    x: torch.Tensor,
    size: torch.Tensor,
    shift: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    sums: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """((x + shift) @ weight.T) * size * scale + bias in float16: [..., N].

    x [..., K] and weight [N, K], int8 or float8_e4m3fn; size [..., 1], scale [N] and bias [N], float32; for int8 shift
    [..., 1] and sums [N], int32. Sums of int8 are exact, sums of fp8 are added up in float32, 32 products at a time.
    """
    out_features, depth = weight.shape
    rows = x.reshape(-1, depth)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    weight = weight.contiguous()
    count = rows.shape[0]
    out = size.new_empty(count, out_features, dtype=torch.float16)
    tiles = triton.cdiv(count, FEW.rows) * triton.cdiv(out_features, FEW.columns)
    wrap_triton(grc_scaled_linear)[(torch.sym_min(tiles, PROGRAMS),)](
        rows, size.reshape(-1), scale if shift is None else shift.reshape(-1), weight, scale,
        scale if sums is None else sums, scale if bias is None else bias, out, count, out_features, depth, rows.stride(0),
        WHOLE=shift is not None, BIASED=bias is not None, FEW_ROWS=FEW_ROWS, SOME_ROWS=SOME_ROWS,
        **constants(F=FEW, S=SOME, M=MANY), num_warps=WARPS,
    )  # fmt: skip
    return out.reshape(*x.shape[:-1], out_features)


register = registering(scaled_linear)
