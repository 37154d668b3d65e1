"""A linear layer of few rows and what follows it, on a GPU: launches and latency, not arithmetic, are its time."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from grc.kernels.attention import reference as attention
from grc.kernels.packed_linear import finished


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mul: Tensor | None,
    add: Tensor | None,
    activation: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """act(norm(x) @ weight.T + bias) * mul + add, of shape [..., N]: x is [..., K], weight [N, K], bias [N].

    mul and add have the result's shape; activation is a place in ACTIVATIONS. With eps, norm is layer norm by scale and
    shift [K]. With mul = x0 and add = x this is a cross layer of DCN v2 (Wang et al. 2021, eq. 1).
    """
    if eps is not None:
        x = functional.layer_norm(x, [x.shape[-1]], scale, shift, eps)
    return finished(functional.linear(x, weight, bias), mul, add, activation)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    gain: float,
    kind: int,
    causal: bool,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    activation: int,
) -> Tensor:
    """act(attention(q, k, v) @ weight.T + bias) + add, the attention without masks and its heads side by side."""
    heads = attention(q, k, v, None, None, scale, gain, kind, causal)
    return reference(heads, weight, bias, None, add, activation)
