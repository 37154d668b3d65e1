"""`grc_cuda::attention` in Triton: scores, masks, softmax or SiLU and the weighted sum of a block of queries at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.library import wrap_triton

from grc.kernels.dependent import ready
from grc.kernels.gpu_op import registering
from grc.kernels.rows import LOG2E, sigmoid, tl, triton
from grc.kernels.tiles import lanes
from grc.kernels.ways import by_count

DTYPES = (torch.float16, torch.bfloat16)
WIDEST = 128  # of a head: keys and values of a block lie in shared memory as a whole
STRICT_SOFTMAX, SILU = 1, 2


class Config(NamedTuple):
    """Queries and keys of a block, warps of a program, which takes one block of queries, and blocks on their way at once."""

    queries: int
    keys: int
    warps: int
    stages: int = 2


# The fastest on an H200 for histories of 10 to 1024 steps. Where a multiprocessor has hardly more than one program, it asks
# for all keys at once, if it can hold them; where there are many, more queries share the keys, unless each has biases or
# factors of its own for every key.
ALONE, FEW = Config(16, 256, 4, 1), Config(16, 64, 2)
MANY, MANY_WITH_MASKS = Config(64, 64, 4), Config(16, 32, 1)
MOST_ALONE, MOST_ALONE_WITH_MASKS, MOST_OF_FEW = 132, 208, 1024  # programs of 16 queries
HELD = 1 << 14  # numbers of a block of keys that lie in registers on their way


@triton.jit
def block_of(mask, query, key, row, step, OF_KEYS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of a bias or factor [N, M]: one row for all queries where it is of keys alone."""
    if OF_KEYS:
        block = tl.load(mask + key * step)[None, :]
    else:
        block = tl.load((mask + query.to(tl.int64) * row)[:, None] + (key * step)[None, :])
    return block


@triton.jit
def grc_attention(  # type: ignore[no-untyped-def]
    q, k, v, bias, factor, out, H, N, M,
    qb, qn, qh, qd, kb, km, kh, kd, vb, vm, vh, vd, bb, bh, bn, bm, fb, fh, fn, fm,
    SCALE: tl.constexpr, GAIN: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr,
    BIAS_OF_KEYS: tl.constexpr, FACTOR_OF_KEYS: tl.constexpr,
    PD: tl.constexpr, PV: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # A product that begins at the bias, which is divided for that by what the product is multiplied with, keeps the layout
    # of products; a sum takes on the layout that the bias is read in. The least bfloat16, a common mask, would overflow.
    FIRST: tl.constexpr = BIAS == 1 and (SCALE == 1.0 or (bias.dtype.element_ty == tl.float16 and SCALE > 1e-30))
    pair = ready(tl.program_id(0))
    user, head = (pair // H).to(tl.int64), pair % H
    top = tl.program_id(1) * BN
    row = top + tl.arange(0, BN)
    # Queries and keys beyond the last are the last once more, and neither seen nor stored: no load needs a mask.
    query = tl.minimum(row, N - 1)
    last = tl.minimum(query, M - 1)
    d, w = tl.arange(0, PD), tl.arange(0, PV)
    mine = tl.load(
        q + user * qb + head * qh + query[:, None] * qn + d[None, :] * qd, mask=(d < D)[None, :], other=0.0
    )  # fmt: skip
    total = tl.zeros([BN, PV], tl.float32)
    largest = tl.full([BN], float("-inf"), tl.float32)
    weight = tl.zeros([BN], tl.float32)
    end = tl.minimum(M, top + BN) if CAUSAL else M
    k += user * kb + head * kh
    v += user * vb + head * vh
    bias += user * bb + head * bh
    factor += user * fb + head * fh
    for at in tl.range(0, end, BM, num_stages=STAGES):
        column = at + tl.arange(0, BM)
        key = tl.minimum(column, M - 1)
        keys = tl.load(k + key[:, None] * km + d[None, :] * kd, mask=(d < D)[None, :], other=0.0)
        values = tl.load(v + key[:, None] * vm + w[None, :] * vd, mask=(w < V)[None, :], other=0.0)
        seen = column[None, :] <= last[:, None] if CAUSAL else (column < M)[None, :]
        if FIRST:
            begin = block_of(bias, query, key, bn, bm, BIAS_OF_KEYS).to(tl.float32) * (1 / SCALE)
            score = tl.dot(mine, tl.trans(keys), tl.broadcast_to(begin, (BN, BM)))
        else:
            score = tl.dot(mine, tl.trans(keys))
        if SCALE != 1.0:
            score *= SCALE
        if BIAS == 1 and not FIRST:
            score += block_of(bias, query, key, bn, bm, BIAS_OF_KEYS).to(tl.float32)
        elif BIAS == 2:
            seen = seen & (block_of(bias, query, key, bn, bm, BIAS_OF_KEYS) != 0)
        if KIND == 2:
            if BIAS == 1:
                seen = seen & (score != float("-inf"))
            part = tl.where(seen, score * sigmoid(score), 0.0)
            if FACTOR:
                part *= block_of(factor, query, key, fn, fm, FACTOR_OF_KEYS).to(tl.float32)
            total = tl.dot(part.to(values.dtype), values, total)
        else:
            score = tl.where(seen, score, float("-inf"))
            higher = tl.maximum(largest, tl.max(score, 1))
            # Where no key was seen yet all scores are -inf, and -inf - -inf would be NaN.
            level = tl.where(higher == float("-inf"), 0.0, higher) * LOG2E
            part = tl.exp2(score * LOG2E - level[:, None])
            fade = tl.exp2(largest * LOG2E - level)
            weight = weight * fade + tl.sum(part, 1)
            total = tl.dot(part.to(values.dtype), values, total * fade[:, None])
            largest = higher
    if KIND == 0:
        total = total / tl.where(weight == 0.0, 1.0, weight)[:, None]
    elif KIND == 1:
        total = total / weight[:, None]  # 0 / 0 where no key is seen: NaN, as aten.softmax gives
    place = out + ((user * N + row[:, None]) * H + head) * V + w[None, :]
    tl.store(place, (total * GAIN).to(out.dtype.element_ty), mask=(row < N)[:, None] & (w < V)[None, :])


def able(q: Any, k: Any, v: Any, bias: Any, factor: Any, *rest: Any) -> bool:
    """Whether the kernel takes these operands: half precision, and heads that fit."""
    return q.dtype in DTYPES and k.dtype == v.dtype == q.dtype and max(int(q.shape[3]), int(v.shape[3])) <= WIDEST


def spread(mask: torch.Tensor | None, shape: tuple[Any, ...]) -> tuple[int, ...]:
    """The strides of a mask broadcast to [B, H, N, M]."""
    return (0, 0, 0, 0) if mask is None else mask.expand(shape).stride()


def of_keys(mask: torch.Tensor | None) -> bool:
    """Whether a mask broadcast to [B, H, N, M] is the same for all queries."""
    return mask is not None and mask.dim() > 1 and isinstance(mask.shape[-2], int) and mask.shape[-2] == 1


def configs(queries: Any, keys: Any, heads: Any, width: int, masked: bool) -> list[tuple[Config, Any]]:
    """How to launch for so many heads of all users, each way with 1 or 0: of several, where they are unknown, a run takes one.

    `masked` says that queries have biases or factors of their own.
    """
    found: list[tuple[Config, int]] = []  # with the programs up to which each is the fastest
    short = isinstance(keys, int) and keys <= ALONE.keys
    if short and keys > MANY.keys:
        block = ALONE._replace(keys=min(ALONE.keys, HELD // lanes(width)))
        found.append((block, MOST_ALONE_WITH_MASKS if masked else MOST_ALONE))
    if masked or not short:
        found.append((FEW, MOST_OF_FEW))
    last = fitted(MANY_WITH_MASKS if masked else MANY, queries, keys)
    found = [(way, most) for config, most in found if (way := fitted(config, queries, keys))[:3] != last[:3]]
    programs = heads * triton.cdiv(queries, ALONE.queries)
    return by_count(programs, found, last)


def fitted(config: Config, queries: Any, keys: Any) -> Config:
    """A config with blocks no larger than there are queries and keys, where those are known, and warps for as much."""
    height, width = (
        min(most, lanes(steps)) if isinstance(steps, int) else most
        for most, steps in ((config.queries, queries), (config.keys, keys))
    )
    warps = max(1, config.warps * height * width // (config.queries * config.keys))
    return config._replace(queries=height, keys=width, warps=warps)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    scale: float,
    gain: float,
    kind: int,
    causal: bool,
) -> torch.Tensor:
    """gain * (weights(q k^T * scale + bias) * factor) v of every head, heads side by side: [B, N, H * V].

    As `grc.kernels.attention.reference`, in float16 or bfloat16 and for heads of at most WIDEST; scores, masks and sums
    are in float32, the weights of the values are rounded to their dtype (FlashAttention; Dao et al. 2022).
    """
    batch, queries, heads, _ = q.shape
    out = q.new_empty(batch, queries, heads * v.shape[3])
    launch(q, k, v, bias, factor, scale, gain, kind, causal, out, 1)
    return out


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    factor: torch.Tensor | None,
    scale: float,
    gain: float,
    kind: int,
    causal: bool,
    out: torch.Tensor,
    asked: Any,
) -> None:
    """Write an attention to `out` [B, N, H * V], if that is asked for by 1, and not by 0."""
    batch, queries, heads, width = q.shape
    keys, values = k.shape[1], v.shape[3]
    shape = (batch, heads, queries, keys)
    mode = 0 if bias is None else 2 if bias.dtype == torch.bool else 1
    masks = any(mask is not None and not of_keys(mask) for mask in (bias, factor))
    for choice, chosen in configs(queries, keys, batch * heads, max(width, values), masks):
        wrap_triton(grc_attention)[(batch * heads * chosen * asked, triton.cdiv(queries, choice.queries))](
            q, k, v, q if bias is None else bias, q if factor is None else factor, out, heads, queries, keys,
            *q.stride(), *k.stride(), *v.stride(), *spread(bias, shape), *spread(factor, shape),
            SCALE=scale, GAIN=gain,  # as arguments they would be float64 in a package, and with them all scores
            D=width, V=values, KIND=kind, CAUSAL=causal, BIAS=mode, FACTOR=factor is not None,
            BIAS_OF_KEYS=of_keys(bias), FACTOR_OF_KEYS=of_keys(factor),
            PD=lanes(width), PV=lanes(values), BN=choice.queries, BM=choice.keys, STAGES=choice.stages, num_warps=choice.warps,
        )  # fmt: skip


register = registering(attention)
