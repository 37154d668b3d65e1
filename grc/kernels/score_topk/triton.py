"""`grc_cuda::score_topk` in Triton: a 16-bit key for every score, then one program a row that picks the best k.

The k best items lie in the k groups whose largest keys are the largest: were one in another group, k keys at least as
large would be outside of it. So the first kernel writes the largest key of every group of items too, and the second
picks k groups of these, then k items of theirs, and ranks them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.library import wrap_triton

from grc.kernels.dependent import ready
from grc.kernels.gpu_op import registering
from grc.kernels.rows import tl, triton
from grc.kernels.tiles import lanes
from grc.kernels.ways import by_count

DTYPES = (torch.float16, torch.bfloat16)
WIDEST = 256  # of a row: it lies in registers as a whole
ITEMS = 128  # of a tile of scores
FEW, MANY = (16, 4), (64, 8)  # rows of a tile and warps, the fastest on an H200 for 1 and 16 rows, and for 128
MOST_OF_FEW = 32  # rows
SPAN = 128  # rows of a program, which reads its items once
RANKED = 256  # entries up to which comparing each with each is faster than sorting
MOST = 1 << 15  # groups, or items of the groups that are picked: the second kernel has them in registers


@triton.jit
def grc_score_keys(  # type: ignore[no-untyped-def]
    x, weight, bias, keys, best, R, N, GROUPS, x_row, weight_row,
    D: tl.constexpr, PD: tl.constexpr, BIASED: tl.constexpr,
    BR: tl.constexpr, SPAN: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile = ready(tl.program_id(0))
    item = tile * BN + tl.arange(0, BN)
    group = tile * (BN // GROUP) + tl.arange(0, BN // GROUP)
    d = tl.arange(0, PD)
    place = weight + item.to(tl.int64)[:, None] * weight_row + d[None, :]
    items = tl.trans(tl.load(place, mask=(item < N)[:, None] & (d < D)[None, :], other=0.0))
    start = tl.program_id(1) * SPAN
    for at in tl.range(start, tl.minimum(R, start + SPAN), BR):
        row = (at + tl.arange(0, BR)).to(tl.int64)
        users = tl.load(x + row[:, None] * x_row + d[None, :], mask=(row < R)[:, None] & (d < D)[None, :], other=0.0)
        score = tl.dot(users, items)
        if BIASED:
            score += tl.load(bias + item, mask=item < N, other=0.0).to(tl.float32)[None, :]
        rounded = score.to(x.dtype.element_ty)
        # The bits of a float in the order of integers. NaN counts as larger than every number.
        bits = rounded.to(tl.int16, bitcast=True).to(tl.int32)
        key = tl.where(bits < 0, -(bits & 0x7FFF), bits)  # both zeros are 0
        key = tl.where(score != score, 0x7FFF, key)
        key = tl.where((item < N)[None, :], key, -0x8000)
        tl.store(
            keys + row[:, None] * N + item[None, :], key.to(tl.int16), mask=(row < R)[:, None] & (item < N)[None, :]
        )
        tops = tl.max(tl.reshape(key, [BR, BN // GROUP, GROUP]), 2)
        there = (row < R)[:, None] & (group < GROUPS)[None, :]
        tl.store(best + row[:, None] * GROUPS + group[None, :], tops.to(tl.int16), mask=there)


@triton.jit
def counted(key, least, step):  # type: ignore[no-untyped-def]
    """How many keys reach least + step, and least + 2 step: in one number, since a warp adds numbers of 32 bits at once."""
    total = tl.sum((key >= least + step).to(tl.int32) + ((key >= least + 2 * step).to(tl.int32) << 16), 0)
    return total & 0xFFFF, (total >> 16) & 0xFFFF


@triton.jit
def largest(key, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """A place from 0 to K - 1 for each of the K largest keys, in no order, and K or more for the others; and the least of
    the K. Keys are of 16 bits."""
    least, step, above = -0x8000, 3**10, 0
    for _ in tl.static_range(11):  # the largest number that K keys reach, a third of what is left at a time
        first, second = counted(key, least, step)
        above = tl.where(first < K, first, tl.where(second < K, second, above))
        least += step * ((first >= K).to(tl.int32) + (second >= K).to(tl.int32))
        step = step // 3
    over, level = key > least, key == least
    seen = tl.cumsum(over.to(tl.int32) + (level.to(tl.int32) << 16), 0)
    place = tl.where(over, seen & 0xFFFF, above + ((seen >> 16) & 0xFFFF)) - 1
    return tl.where(over | level, place, K), least


@triton.jit
def grc_select_topk(  # type: ignore[no-untyped-def]
    keys, best, picked, found, values, items, N, GROUPS,
    K: tl.constexpr, GROUP: tl.constexpr, PG: tl.constexpr, PC: tl.constexpr, ROOM: tl.constexpr,
    RANKED: tl.constexpr,
):  # fmt: skip
    row = ready(tl.program_id(0)).to(tl.int64)
    group = tl.arange(0, PG)
    tops = tl.load(best + row * GROUPS + group, mask=group < GROUPS, other=0).to(tl.int32)
    place, least = largest(tl.where(group < GROUPS, tops, -0x8001), K)
    tl.store(picked + row * K + place, group, mask=place < K)
    tl.debug_barrier()

    candidate = tl.arange(0, PC)
    taken = candidate < K * GROUP
    item = tl.load(picked + row * K + candidate // GROUP, mask=taken, other=0) * GROUP + candidate % GROUP
    taken = taken & (item < N)
    key = tl.load(keys + row * N + item, mask=taken, other=0).to(tl.int32)
    # K groups reach `least`, and hardly more than K items of theirs, unless the best items are neighbours.
    key = tl.where(taken & (key >= least), key, -0x8001)
    reach = (key > -0x8001).to(tl.int32)
    count = tl.sum(reach, 0)
    place = tl.where(reach > 0, tl.cumsum(reach, 0) - 1, ROOM)
    if count > ROOM:
        place, _ = largest(key, K)
        count = K
    # Of equal scores that are returned the lowest item is first.
    entry = (key.to(tl.int64) << 32) | (0xFFFFFFFF - item.to(tl.int64))
    tl.store(found + row * ROOM + place, entry, mask=place < count)
    tl.debug_barrier()

    at = tl.arange(0, ROOM)
    mine = tl.load(found + row * ROOM + at, mask=at < count, other=-0x8000000000000000)
    if RANKED == 0:
        mine, rank = tl.sort(mine, descending=True), at
    else:
        rank = tl.zeros([ROOM], tl.int32)
        for start in tl.static_range(0, ROOM, RANKED):
            other = start + tl.arange(0, RANKED)
            theirs = tl.load(found + row * ROOM + other, mask=other < count, other=-0x8000000000000000)
            rank += tl.sum((theirs[None, :] > mine[:, None]).to(tl.int32), 1)
    bits = (mine >> 32).to(tl.int32)
    bits = tl.where(bits < 0, -bits | 0x8000, bits).to(tl.int16)
    here = (rank < K) & (mine != -0x8000000000000000)
    tl.store(values + row * K + rank, bits.to(values.dtype.element_ty, bitcast=True), mask=here)
    tl.store(items + row * K + rank, 0xFFFFFFFF - (mine & 0xFFFFFFFF), mask=here)


def able(x: Any, weight: Any, bias: Any, k: int) -> bool:
    """Whether the kernels take these operands, and there are fewer groups to pick from than items."""
    fits = x.dtype in DTYPES and weight.dtype == x.dtype and int(weight.shape[1]) <= WIDEST
    many = k > 0 and 16 * k <= int(weight.shape[0]) and group_of(int(weight.shape[0]), k) > 0
    return fits and many and (bias is None or bias.dtype == x.dtype)


def group_of(items: int, k: int) -> int:
    """Items a group, so that there are few groups and few items in k of them; 0 where there are too many of either."""
    sizes = {size: (lanes(-(-items // size)), lanes(k * size)) for size in (8, 16, 32, 64, 128)}
    fitting = [size for size, both in sizes.items() if max(both) <= MOST]
    return min(reversed(fitting), key=lambda size: sum(sizes[size]), default=0)


def score_topk(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of x @ weight.T + bias and their items, both [..., k], falling; items are int64.

    x [..., D], weight [N, D], bias [N], float16 or bfloat16; 1 <= k <= N / 16. Scores are summed in float32 and rounded
    once. NaN counts as larger than every number; of equal scores that are returned the lowest item comes first. As much
    memory as the scores themselves is taken meanwhile.
    """
    lead, width, items = x.shape[:-1], x.shape[-1], weight.shape[0]
    flat = x.reshape(-1, width)
    flat, weight = (t if t.stride(-1) == 1 else t.contiguous() for t in (flat, weight))
    rows, group = flat.shape[0], group_of(items, k)
    groups = triton.cdiv(items, group)
    keys, best = (flat.new_empty(rows, count, dtype=torch.int16) for count in (items, groups))
    for (high, warps), asked in by_count(rows, [(FEW, MOST_OF_FEW)], MANY):
        wrap_triton(grc_score_keys)[(triton.cdiv(items, ITEMS) * asked, triton.cdiv(rows, SPAN))](
            flat, weight, flat if bias is None else bias.contiguous(), keys, best, rows, items, groups,
            flat.stride(0), weight.stride(0), D=width, PD=lanes(width), BIASED=bias is not None,
            BR=high, SPAN=SPAN, BN=ITEMS, GROUP=group, num_warps=warps,
        )  # fmt: skip
    room = lanes(k + 2 * k * k * group // items + 8)  # for items as good as the groups, were they spread evenly
    picked, found = flat.new_empty(rows, k, dtype=torch.int32), flat.new_empty(rows, room, dtype=torch.int64)
    values, indices = flat.new_empty(rows, k), flat.new_empty(rows, k, dtype=torch.int64)
    most = max(lanes(groups), lanes(k * group))
    wrap_triton(grc_select_topk)[(rows,)](
        keys, best, picked, found, values, indices, items, groups, K=k, GROUP=group, PG=lanes(groups),
        PC=lanes(k * group), ROOM=room, RANKED=0 if room > RANKED else min(room, RANKED // 2),
        num_warps=min(max(most // 512, 4), 16),
    )  # fmt: skip
    return values.reshape(*lead, k), indices.reshape(*lead, k)


register = registering(score_topk)
