"""`grc_cuda::score_topk` in Triton: the best k of all items, with only the largest score of every group written.

The k best items lie in the k groups whose largest scores are the largest: were one in another group, k scores at least
as large would be outside of it. So one kernel scores all items and keeps a number a group, top-k picks k groups, and a
second kernel scores their items again.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.library import triton_op, wrap_triton

from grc.kernels.rows import tl, triton

DTYPES = (torch.float16, torch.bfloat16)
WIDEST = 256  # of a row: it lies in registers as a whole
ROWS, ITEMS = 16, 256


@triton.jit
def group_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, out, R, N, GROUPS, x_row, weight_row,
    D: tl.constexpr, PD: tl.constexpr, BIASED: tl.constexpr,
    BR: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(1) * BR + tl.arange(0, BR)).to(tl.int64)
    item = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, PD)
    users = tl.load(x + row[:, None] * x_row + d[None, :], mask=(row < R)[:, None] & (d < D)[None, :], other=0.0)
    place = weight + item.to(tl.int64)[:, None] * weight_row + d[None, :]
    items = tl.load(place, mask=(item < N)[:, None] & (d < D)[None, :], other=0.0)
    score = tl.dot(users, tl.trans(items))
    if BIASED:
        score += tl.load(bias + item, mask=item < N, other=0.0).to(tl.float32)[None, :]
    # NaN counts as larger than every number, and the maximum below would pass it over.
    score = tl.where(score != score, float("inf"), tl.minimum(score, 3.4028234e38))
    score = tl.where((item < N)[None, :], score, float("-inf"))
    best = tl.max(tl.reshape(score, [BR, BN // GROUP, GROUP]), 2)
    group = tl.program_id(0) * (BN // GROUP) + tl.arange(0, BN // GROUP)
    tl.store(out + row[:, None] * GROUPS + group[None, :], best, mask=(row < R)[:, None] & (group < GROUPS)[None, :])


@triton.jit
def item_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, groups, out, N, COUNT, x_row, weight_row,
    D: tl.constexpr, PD: tl.constexpr, BIASED: tl.constexpr, GROUP: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BG + tl.arange(0, BG)
    d = tl.arange(0, PD)
    taken = place < COUNT * GROUP
    item = tl.load(groups + row * COUNT + place // GROUP, mask=taken, other=0) * GROUP + place % GROUP
    known = taken & (item < N)
    user = tl.load(x + row * x_row + d, mask=d < D, other=0.0).to(tl.float32)
    items = tl.load(weight + item[:, None] * weight_row + d[None, :], mask=known[:, None] & (d < D)[None, :], other=0.0)
    score = tl.sum(items.to(tl.float32) * user[None, :], 1)
    if BIASED:
        score += tl.load(bias + item, mask=known, other=0.0).to(tl.float32)
    score = score.to(x.dtype.element_ty).to(tl.float32)
    # The bits of a float in the order of integers, and below them the item: of equal scores the lowest item is first.
    bits = tl.where(score != score, 0x7FFFFFFF, score.to(tl.int32, bitcast=True))
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = (bits.to(tl.int64) << 32) | (0xFFFFFFFF - item)
    tl.store(out + row * (COUNT * GROUP) + place, tl.where(known, key, -9223372036854775808), mask=taken)


def able(x: Any, weight: Any, bias: Any, k: int) -> bool:
    """Whether the kernels take these operands, and there are fewer groups to pick from than items."""
    fits = x.dtype in DTYPES and weight.dtype == x.dtype and int(weight.shape[1]) <= WIDEST
    return fits and k > 0 and 16 * k <= int(weight.shape[0]) and (bias is None or bias.dtype == x.dtype)


def group_of(items: int, k: int) -> int:
    """Items a group: about as many groups to pick from as items in the groups that are picked."""
    return max(8, min(64, triton.next_power_of_2(int((items / k) ** 0.5) + 1) // 2))


def score_topk(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of x @ weight.T + bias and their items, both [..., k], falling; items are int64.

    x [..., D], weight [N, D], bias [N], float16 or bfloat16; 1 <= k <= N / 16. Scores are summed in float32 and rounded
    once. NaN counts as larger than every number; of equal scores that are returned the lowest item comes first.
    """
    lead, width, items = x.shape[:-1], x.shape[-1], weight.shape[0]
    flat = x.reshape(-1, width)
    flat, weight = (t if t.stride(-1) == 1 else t.contiguous() for t in (flat, weight))
    rows, group = flat.shape[0], group_of(items, k)
    groups = triton.cdiv(items, group)
    own = flat if bias is None else bias.contiguous()
    shared = {"D": width, "PD": max(16, triton.next_power_of_2(width)), "BIASED": bias is not None, "GROUP": group}
    best = flat.new_empty(rows, groups, dtype=torch.float32)
    wrap_triton(group_kernel)[(triton.cdiv(items, ITEMS), triton.cdiv(rows, ROWS))](
        flat, weight, own, best, rows, items, groups, flat.stride(0), weight.stride(0),
        BR=ROWS, BN=ITEMS, **shared, num_warps=4,
    )  # fmt: skip
    picked = torch.topk(best, k, sorted=False)[1]
    keys = flat.new_empty(rows, k * group, dtype=torch.int64)
    wrap_triton(item_kernel)[(rows, triton.cdiv(k * group, 128))](
        flat, weight, own, picked, keys, items, k, flat.stride(0), weight.stride(0), BG=128, **shared, num_warps=4
    )
    found = torch.topk(keys, k)[0]
    bits = (found >> 32).to(torch.int32)
    values = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32).to(x.dtype)
    return values.reshape(*lead, k), (0xFFFFFFFF - (found & 0xFFFFFFFF)).reshape(*lead, k)


@functools.cache
def register() -> torch._ops.OpOverload:
    """Define `grc_cuda::score_topk` once; torch.export keeps it whole, and AOTInductor compiles its kernels in."""
    triton_op("grc_cuda::score_topk", score_topk, mutates_args=())
    return torch.ops.grc_cuda.score_topk.default
