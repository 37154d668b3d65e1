"""`grc_cuda::attention` in Triton: scores, masks, softmax or SiLU and the weighted sum of a block of queries at once."""

from __future__ import annotations

from typing import Any

import torch
from torch.library import wrap_triton

from grc.kernels.gpu_op import registering
from grc.kernels.rows import tl, triton
from grc.kernels.tiles import lanes

DTYPES = (torch.float16, torch.bfloat16)
WIDEST = 128  # of a head: keys and values of a block lie in shared memory as a whole
# On an H200, of 16 to 128: the fastest for histories of 50 and 200 steps at batch 1, and as fast as any at 128.
QUERIES, KEYS = 16, 64
STRICT_SOFTMAX, SILU = 1, 2


@triton.jit
def block_of(mask, query, key, row, step, N, M, OF_KEYS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of a bias or factor [N, M]: one row for all queries where it is of keys alone."""
    if OF_KEYS:
        block = tl.load(mask + key * step, mask=key < M, other=0)[None, :]
    else:
        place = (mask + query.to(tl.int64) * row)[:, None] + (key * step)[None, :]
        block = tl.load(place, mask=(query < N)[:, None] & (key < M)[None, :], other=0)
    return block


@triton.jit
def attention_kernel(  # type: ignore[no-untyped-def]
    q, k, v, bias, factor, out, H, N, M,
    qb, qn, qh, qd, kb, km, kh, kd, vb, vm, vh, vd, bb, bh, bn, bm, fb, fh, fn, fm,
    SCALE: tl.constexpr, GAIN: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr,
    BIAS_OF_KEYS: tl.constexpr, FACTOR_OF_KEYS: tl.constexpr,
    PD: tl.constexpr, PV: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    user, head = (pair // H).to(tl.int64), pair % H
    query = tl.program_id(1) * BN + tl.arange(0, BN)
    d, w = tl.arange(0, PD), tl.arange(0, PV)
    asked = query < N
    mine = tl.load(
        q + user * qb + head * qh + query[:, None] * qn + d[None, :] * qd,
        mask=asked[:, None] & (d < D)[None, :], other=0.0,
    )  # fmt: skip
    total = tl.zeros([BN, PV], tl.float32)
    largest = tl.full([BN], float("-inf"), tl.float32)
    weight = tl.zeros([BN], tl.float32)
    end = tl.minimum(M, (tl.program_id(1) + 1) * BN) if CAUSAL else M
    bias += user * bb + head * bh
    factor += user * fb + head * fh
    for at in tl.range(0, end, BM, num_stages=STAGES):
        key = at + tl.arange(0, BM)
        there = key < M
        keys = tl.load(
            k + user * kb + head * kh + key[:, None] * km + d[None, :] * kd,
            mask=there[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        values = tl.load(
            v + user * vb + head * vh + key[:, None] * vm + w[None, :] * vd,
            mask=there[:, None] & (w < V)[None, :], other=0.0,
        )  # fmt: skip
        score = tl.dot(mine, tl.trans(keys)) * SCALE
        inside = asked[:, None] & there[None, :]
        seen = inside & (key[None, :] <= query[:, None]) if CAUSAL else inside
        if BIAS > 0:
            held = block_of(bias, query, key, bn, bm, N, M, BIAS_OF_KEYS)
            if BIAS == 2:
                seen = seen & (held != 0)
            else:
                score += held.to(tl.float32)
        score = tl.where(seen, score, float("-inf"))
        if KIND == 2:
            part = tl.where(score == float("-inf"), 0.0, score / (1.0 + tl.exp(-score)))
            if FACTOR:
                part *= block_of(factor, query, key, fn, fm, N, M, FACTOR_OF_KEYS).to(tl.float32)
            total = tl.dot(part.to(values.dtype), values, total)
        else:
            higher = tl.maximum(largest, tl.max(score, 1))
            # Where no key was seen yet all scores are -inf, and -inf - -inf would be NaN.
            level = tl.where(higher == float("-inf"), 0.0, higher)
            part = tl.exp(score - level[:, None])
            fade = tl.exp(largest - level)
            weight = weight * fade + tl.sum(part, 1)
            total = tl.dot(part.to(values.dtype), values, total * fade[:, None])
            largest = higher
    if KIND == 0:
        total = total / tl.where(weight == 0.0, 1.0, weight)[:, None]
    elif KIND == 1:
        total = total / weight[:, None]  # 0 / 0 where no key is seen: NaN, as aten.softmax gives
    place = out + ((user * N + query[:, None]) * H + head) * V + w[None, :]
    tl.store(place, (total * GAIN).to(out.dtype.element_ty), mask=asked[:, None] & (w < V)[None, :])


def able(q: Any, k: Any, v: Any, bias: Any, factor: Any, *rest: Any) -> bool:
    """Whether the kernel takes these operands: half precision, and heads that fit."""
    return q.dtype in DTYPES and k.dtype == v.dtype == q.dtype and max(int(q.shape[3]), int(v.shape[3])) <= WIDEST


def spread(mask: torch.Tensor | None, shape: tuple[Any, ...]) -> tuple[int, ...]:
    """The strides of a mask broadcast to [B, H, N, M]."""
    return (0, 0, 0, 0) if mask is None else mask.expand(shape).stride()


def of_keys(mask: torch.Tensor | None) -> bool:
    """Whether a mask broadcast to [B, H, N, M] is the same for all queries."""
    return mask is not None and mask.dim() > 1 and isinstance(mask.shape[-2], int) and mask.shape[-2] == 1


def block(steps: Any, most: int) -> int:
    """Queries or keys of a block: a number of steps that varies takes the largest."""
    return min(most, lanes(steps)) if isinstance(steps, int) else most


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
    batch, queries, heads, width = q.shape
    keys, values = k.shape[1], v.shape[3]
    shape = (batch, heads, queries, keys)
    out = q.new_empty(batch, queries, heads * values)
    bn, bm = block(queries, QUERIES), block(keys, KEYS)
    mode = 0 if bias is None else 2 if bias.dtype == torch.bool else 1
    wrap_triton(attention_kernel)[(batch * heads, triton.cdiv(queries, bn))](
        q, k, v, q if bias is None else bias, q if factor is None else factor, out, heads, queries, keys,
        *q.stride(), *k.stride(), *v.stride(), *spread(bias, shape), *spread(factor, shape),
        SCALE=scale, GAIN=gain,  # as arguments they would be float64 in a package, and with them all scores
        D=width, V=values, KIND=kind, CAUSAL=causal, BIAS=mode, FACTOR=factor is not None,
        BIAS_OF_KEYS=of_keys(bias), FACTOR_OF_KEYS=of_keys(factor),
        PD=lanes(width), PV=lanes(values), BN=bn, BM=bm,
        STAGES=2, num_warps=4 if bn * bm > 1024 else 2,
    )  # fmt: skip
    return out


register = registering(attention)
