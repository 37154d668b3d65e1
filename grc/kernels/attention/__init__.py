"""Attention of every head of short user histories in one pass: scores, masks, softmax or SiLU, and the weighted sum."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from grc.errors import LoweringError
from grc.graph.attention import SILU, SOFTMAX, STRICT_SOFTMAX
from grc.kernels.attention.cases import CASES
from grc.kernels.fusion import Cost, FusedOp

__all__ = ["ATTENTION", "SILU", "SOFTMAX", "STRICT_SOFTMAX"]


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    factor: Tensor | None,
    scale: float,
    gain: float,
    kind: int,
    causal: bool,
) -> Tensor:
    """gain * (weights(q k^T * scale + bias) * factor) v of every head, its heads side by side: [B, N, H * V].

    q is [B, N, H, D], k [B, M, H, D], v [B, M, H, V]. bias and factor broadcast to [B, H, N, M]; a boolean bias is
    True where a query sees a key. With causal, query i sees keys 0 to i. weights is softmax over the keys (kind 0 or 1;
    Vaswani et al. 2017, equation 1), or pointwise SiLU (kind 2; HSTU, Zhai et al. 2024, equation 2), which gives 0
    where the score is -inf, and to which alone factor belongs. Raises LoweringError for another kind, or for a factor
    of softmax.
    """
    if not 0 <= kind <= SILU:
        raise LoweringError(f"attention has no kind {kind}", f"choose 0 to {SILU}")
    if factor is not None and kind != SILU:
        raise LoweringError("softmax attention takes no factor", "add its logarithm to bias")
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if causal:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        if bias is None or bias.dtype is torch.bool:
            bias = seen if bias is None else seen & bias
        else:
            bias = bias.masked_fill(~seen, -torch.inf)
    alike = bias is None or bias.dtype in (torch.bool, q.dtype)
    if kind == SOFTMAX and alike:
        heads = functional.scaled_dot_product_attention(q, k, v, bias, scale=scale) * gain
    else:
        scores = torch.matmul(q * scale, k.transpose(2, 3))
        if bias is not None:
            scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype is torch.bool else scores + bias
        if kind == SILU:
            weights = functional.silu(scores).masked_fill(scores == -torch.inf, 0.0)
            weights = weights if factor is None else weights * factor
        else:
            weights = torch.softmax(scores, -1)
        heads = torch.matmul(weights.to(v.dtype), v) * gain
    return heads.transpose(1, 2).flatten(2).contiguous()


def cost(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, factor: Tensor | None, *rest: object) -> Cost:
    """Every operand read once, the result written once; two operations a score and element of k and of v."""
    causal = bool(rest[-1])
    read = sum(t.numel() * t.element_size() for t in (q, k, v, bias, factor) if t is not None)
    batch, queries, heads, width = q.shape
    scores = batch * heads * queries * k.shape[1] // (2 if causal else 1)
    written = batch * queries * heads * v.shape[3] * q.element_size()
    return Cost(read + written, 2 * scores * (width + v.shape[3]))


ATTENTION = FusedOp(
    schema=(
        "attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? factor, float scale, float gain, int kind, "
        "bool causal) -> Tensor"
    ),
    reference=reference,
    cpu=Path(__file__).parent / "cpu.cpp",
    cost=cost,
    cases=CASES,
    only_float32=True,
)
