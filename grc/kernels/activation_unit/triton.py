"""`grc_cuda::activation_unit` in Triton: all layers of a block of a user's steps in one launch, nothing between written."""

from __future__ import annotations

from typing import Any

import torch
from torch.library import wrap_triton

from grc.kernels.dependent import ready
from grc.kernels.gpu_op import registering
from grc.kernels.packed_linear.activations import DICE, PRELU
from grc.kernels.rows import sigmoid, tl, triton
from grc.kernels.small_linear.triton import activate
from grc.kernels.tiles import lanes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST = 1 << 14  # numbers of a layer's weight, which lies in registers as a whole
STEPS = 16  # of a program


@triton.jit
def gated(  # type: ignore[no-untyped-def]
    y, gate, column, N, ACTIVATION: tl.constexpr, PRELU: tl.constexpr, DICE: tl.constexpr
):  # fmt: skip
    """An activation of y [..., N] that may have numbers of its own for each column: see `activated` of the reference."""
    here = column < N
    if ACTIVATION == PRELU:
        alpha = tl.load(gate + column, mask=here, other=0.0).to(tl.float32)[None, :]
        y = tl.where(y > 0, y, alpha * y)
    elif ACTIVATION == DICE:
        alpha = tl.load(gate + column, mask=here, other=0.0).to(tl.float32)[None, :]
        scale = tl.load(gate + N + column, mask=here, other=0.0).to(tl.float32)[None, :]
        shift = tl.load(gate + 2 * N + column, mask=here, other=0.0).to(tl.float32)[None, :]
        y = y * (alpha + (1.0 - alpha) * sigmoid(scale * y + shift))
    else:
        y = activate(y, ACTIVATION)
    return y


@triton.jit
def grc_activation_unit(  # type: ignore[no-untyped-def]
    query, keys, row, first, first_gate, second, second_bias, second_gate, head, head_bias, out,
    S, query_row, key_user, key_step, row_row,
    D: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, PD: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    BS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, DEEP: tl.constexpr, PRELU: tl.constexpr, DICE: tl.constexpr,
):  # fmt: skip
    program, blocks = ready(tl.program_id(0)), tl.cdiv(S, BS)
    user = (program // blocks).to(tl.int64)
    step = (program % blocks) * BS + tl.arange(0, BS)
    d, n, m = tl.arange(0, PD), tl.arange(0, P1), tl.arange(0, P2)
    taken = (step < S)[:, None] & (d < D)[None, :]
    k = tl.load(keys + user * key_user + step.to(tl.int64)[:, None] * key_step + d[None, :], mask=taken, other=0.0)
    q = tl.load(query + user * query_row + d, mask=d < D, other=0.0)
    inner = (d < D)[:, None] & (n < N1)[None, :]
    weight = first + d[:, None] * N1 + n[None, :]
    y = tl.dot(k, tl.load(weight, mask=inner, other=0.0), input_precision="ieee")
    y = tl.dot(k * q[None, :], tl.load(weight + D * N1, mask=inner, other=0.0), y, input_precision="ieee")
    y += tl.load(row + user * row_row + n, mask=n < N1, other=0.0).to(tl.float32)[None, :]
    y = gated(y, first_gate, n, N1, FIRST, PRELU, DICE)
    y = tl.where((n < N1)[None, :], y, 0.0)  # NaN there where a key is infinite
    if DEEP:
        outer = (n < N1)[:, None] & (m < N2)[None, :]
        rest = tl.load(second + n[:, None] * N2 + m[None, :], mask=outer, other=0.0)
        y = tl.dot(y.to(k.dtype), rest, input_precision="ieee")
        y += tl.load(second_bias + m, mask=m < N2, other=0.0).to(tl.float32)[None, :]
        y = gated(y, second_gate, m, N2, SECOND, PRELU, DICE)
    last = tl.load(head + m, mask=m < N2, other=0.0).to(tl.float32)[None, :]
    score = tl.sum(tl.where((m < N2)[None, :], y * last, 0.0), 1) + tl.load(head_bias).to(tl.float32)
    tl.store(out + user * S + step, score.to(out.dtype.element_ty), mask=step < S)


def able(query: Any, keys: Any, row: Any, first: Any, first_gate: Any, second: Any, *rest: Any) -> bool:
    """Whether the kernel takes these operands: one dtype, and layers that fit."""
    n1, width = int(first.shape[1]), int(keys.shape[2])
    largest = lanes(n1) * max(lanes(width), 0 if second is None else lanes(int(second.shape[1])))
    given = (query, keys, row, first) if second is None else (query, keys, row, first, second)
    return keys.dtype in DTYPES and len({t.dtype for t in given}) == 1 and largest <= LARGEST


def activation_unit(
    query: torch.Tensor,
    keys: torch.Tensor,
    row: torch.Tensor,
    first: torch.Tensor,
    first_gate: torch.Tensor | None,
    second: torch.Tensor | None,
    second_bias: torch.Tensor | None,
    second_gate: torch.Tensor | None,
    head: torch.Tensor,
    head_bias: torch.Tensor,
    first_activation: int,
    second_activation: int,
) -> torch.Tensor:
    """The score of each step, [B, S], as `grc.kernels.activation_unit.reference`: query [B, D], keys [B, S, D], in float32,
    float16 or bfloat16. Layers are summed and activated in float32; the first one's outputs are rounded to their dtype."""
    users, steps, width = keys.shape
    n1 = first.shape[1]
    n2 = n1 if second is None else second.shape[1]
    query, keys, row = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, keys, row))
    out = keys.new_empty(users, steps)
    wrap_triton(grc_activation_unit)[(users * triton.cdiv(steps, STEPS),)](
        query, keys, row, first, head if first_gate is None else first_gate,
        head if second is None else second, head if second_bias is None else second_bias,
        head if second_gate is None else second_gate, head, head_bias, out,
        steps, query.stride(0), keys.stride(0), keys.stride(1), row.stride(0),
        D=width, N1=n1, N2=n2, PD=lanes(width), P1=lanes(n1), P2=lanes(n2), BS=STEPS,
        FIRST=first_activation, SECOND=second_activation, DEEP=second is not None, PRELU=PRELU, DICE=DICE, num_warps=4,
    )  # fmt: skip
    return out


register = registering(activation_unit)
