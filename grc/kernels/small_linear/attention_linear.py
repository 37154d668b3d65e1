"""`grc_cuda::attention_linear` in Triton: attention over a few steps and the layer that alone reads it, in one launch.

Every program makes the attention of one user anew for its columns: all heads at once, one warp or more for each, and their
products with the layer's weight are summed at the end. Over a few steps that takes less than a launch. For more users than
a few the attention and the layer are two launches after all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.library import wrap_triton

from grc.kernels.attention import triton as attention
from grc.kernels.dependent import ready
from grc.kernels.gpu_op import registering
from grc.kernels.rows import sigmoid, tl, triton
from grc.kernels.small_linear import triton as small_linear
from grc.kernels.small_linear.triton import TILE, activate, rows_of
from grc.kernels.tiles import lanes
from grc.kernels.ways import by_count

MOST_STEPS = 16  # queries, and keys, which lie in registers
MOST_COLUMNS = 512  # of all heads together
MOST_USERS = 4  # up to which every multiprocessor has one program at most, for 512 columns
WARPS = 4  # the fastest on an H200 for 8 heads of 64 columns


@triton.jit
def heads(  # type: ignore[no-untyped-def]
    x, user, step, head, column, xb, xs, xh, xd, STEPS, HEADS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """[heads, steps, columns] of one user."""
    seen = (head < HEADS)[:, None, None] & (step < STEPS)[None, :, None] & (column < WIDTH)[None, None, :]
    place = user * xb + step[None, :, None] * xs + head[:, None, None] * xh + column[None, None, :] * xd
    return tl.load(x + place, mask=seen, other=0.0)


@triton.jit
def grc_attention_linear(  # type: ignore[no-untyped-def]
    q, k, v, weight, bias, add, out, N, M, COLUMNS, add_row,
    qb, qn, qh, qd, kb, km, kh, kd, vb, vm, vh, vd,
    SCALE: tl.constexpr, GAIN: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, PH: tl.constexpr, PD: tl.constexpr, PV: tl.constexpr,
    BIASED: tl.constexpr, ACTIVATION: tl.constexpr, ADD: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(COLUMNS, BN)
    column = (tl.program_id(0) % across) * BN + tl.arange(0, BN)
    head, step, d, w = tl.arange(0, PH), tl.arange(0, BS), tl.arange(0, PD), tl.arange(0, PV)
    wide, deep = column < COLUMNS, (head < H)[:, None] & (w < V)[None, :]
    place = column[None, None, :] * (H * V) + (head[:, None] * V + w[None, :])[:, :, None]
    right = tl.load(weight + place, mask=deep[:, :, None] & wide[None, None, :], other=0.0)
    user = (ready(tl.program_id(0)) // across).to(tl.int64)
    queries = heads(q, user, step, head, d, qb, qn, qh, qd, N, H, D)
    keys = heads(k, user, step, head, d, kb, km, kh, kd, M, H, D)
    values = heads(v, user, step, head, w, vb, vm, vh, vd, M, H, V)
    row, live = (user * N + step)[:, None], (step < N)[:, None] & wide[None, :]
    if BIASED:
        start = tl.load(bias + column, mask=wide, other=0.0)
    if ADD:
        term = tl.load(add + row * add_row + column[None, :], mask=live, other=0.0)
    score = tl.dot(queries, tl.trans(keys, 0, 2, 1)) * SCALE
    seen = (step < M)[None, None, :]
    if CAUSAL:
        seen = seen & (step[None, None, :] <= step[None, :, None])
    if KIND == 2:
        part = tl.where(seen, score * sigmoid(score), 0.0)
    else:
        score = tl.where(seen, score, float("-inf"))
        part = tl.exp(score - tl.max(score, 2)[:, :, None])
        part = part / tl.sum(part, 2)[:, :, None]
    mixed = (tl.dot(part.to(values.dtype), values) * GAIN).to(values.dtype)
    answer = tl.sum(tl.dot(mixed, right), 0)
    if BIASED:
        answer += start.to(tl.float32)[None, :]
    answer = activate(answer, ACTIVATION)
    if ADD:
        answer += term.to(tl.float32)
    tl.store(out + row * COLUMNS + column[None, :], answer.to(out.dtype.element_ty), mask=live)


def able(q: Any, k: Any, v: Any, bias: Any, factor: Any, *rest: Any) -> bool:
    """Whether the kernel takes this attention, by the values of its operands: a few steps, and no mask but a causal one."""
    steps = [t.shape[1] for t in (q, k)]
    few = all(isinstance(size, int) and 0 < size <= MOST_STEPS for size in steps)
    width = triton.next_power_of_2(int(q.shape[2])) * max(lanes(int(t.shape[3])) for t in (q, v))
    return few and bias is None and factor is None and width <= MOST_COLUMNS and attention.able(q, k, v, bias, factor)


def attention_linear(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    gain: float,
    kind: int,
    causal: bool,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    add: torch.Tensor | None,
    activation: int,
) -> torch.Tensor:
    """act(attention(q, k, v) @ weight.T + bias) + add: [B, N, columns].

    q [B, N, H, D], k [B, M, H, D], v [B, M, H, V] and the attention as in `grc.kernels.attention.reference`, with N and M up
    to MOST_STEPS and no mask; weight [columns, H * V]; bias, add and activation as `small_linear` takes them.
    """
    batch, queries, count, width = q.shape
    columns, weight = weight.shape[0], weight.contiguous()
    last = q if add is None else rows_of(add, columns)
    out = q.new_empty(batch, queries, columns)
    programs = triton.cdiv(columns, TILE)
    for together, asked in by_count(batch, [(True, MOST_USERS)], False):
        if together:
            wrap_triton(grc_attention_linear)[(batch * programs * asked,)](
                q, k, v, weight, q if bias is None else bias, last, out,
                queries, k.shape[1], columns, last.stride(0), *q.stride(), *k.stride(), *v.stride(),
                SCALE=scale, GAIN=gain,  # as arguments they would be float64 in a package
                KIND=kind, CAUSAL=causal, H=count, D=width, V=v.shape[3],
                PH=triton.next_power_of_2(count), PD=lanes(width), PV=lanes(v.shape[3]),
                BIASED=bias is not None, ACTIVATION=activation, ADD=add is not None, BS=MOST_STEPS, BN=TILE,
                num_warps=WARPS,
            )  # fmt: skip
        else:
            mixed = q.new_empty(batch, queries, weight.shape[1])
            attention.launch(q, k, v, None, None, scale, gain, kind, causal, mixed, asked)
            small_linear.launch(mixed, weight, bias, None, add, activation, None, None, None, out, asked)
    return out


register = registering(attention_linear)
