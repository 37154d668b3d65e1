"""A linear layer with its weight in int8 or bfloat16, packed in panels for one ISA, and what follows it in the same pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from grc.kernels.fusion import Cost, FusedOp
from grc.kernels.packed_linear import finished
from grc.kernels.quantised_linear.cases import CASES
from grc.kernels.quantised_linear.panels import (
    HALVES,
    MAX_DEPTH,
    Quantised,
    blocks,
    quantise,
    rounded,
    scaled8,
    unpack,
)

__all__ = ["MAX_DEPTH", "QUANTISED_LINEAR", "Quantised", "quantise", "rounded", "simulated"]


def reference(
    x: Tensor,
    packed: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    mul: Tensor | None,
    add: Tensor | None,
    out_features: int,
    activation: int,
) -> Tensor:
    """act(q(x) @ W.T + bias) * mul + add, of shape [..., N]: x is [..., K], W [N, K] packed by `quantise`, bias [N].

    With int8, W[n] is scale[n] times integers of -127..127, and q(x) rounds each row of x to 256 steps between its least
    and its largest value, zero among them (dynamic quantisation, a scale a token: Yao et al. 2022, ZeroQuant, section
    4.1); the sums are exact. With bfloat16, q(x) rounds to bfloat16 and sums are float32. mul and add have the result's
    shape; the kernel's GELU is within 9.2e-5. A row that holds NaN or infinity gives NaN. Raises LoweringError for an
    activation that is not 0 to 6.
    """
    weight = unpack(packed, out_features, x.shape[-1]).to(x.dtype)
    if scale is None:
        y = functional.linear(x.to(torch.bfloat16).to(x.dtype), weight, bias)
    else:
        steps, size = centred(x)
        y = functional.linear(steps, weight) * (size * scale[:out_features].to(x.dtype))
        y = y if bias is None else y + bias
    return finished(y, mul, add, activation)


def centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x as whole numbers of steps from zero (-255..255), and the size of a step, [..., 1]."""
    whole, size, zero = stepped(x)
    return (whole - zero).to(x.dtype), size.to(x.dtype)


def stepped(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of x as whole numbers of steps (0..255), the size of a step, [..., 1], and which step is zero, [..., 1].

    All are float32, in which the kernel computes too. A row that holds NaN or infinity has NaN for its size.
    """
    narrow = x.float()
    low, high = narrow.amin(-1, keepdim=True).clamp(max=0.0), narrow.amax(-1, keepdim=True).clamp(min=0.0)
    size = (high - low) / 255.0
    inverse = torch.where(size > 0, 1.0 / size, 0.0)
    known = torch.isfinite(size) & torch.isfinite(inverse)
    inverse = torch.where(known, inverse, 0.0)
    zero = torch.round(-low * inverse)
    steps = (torch.round(narrow * inverse) + zero).clamp(0.0, 255.0)
    steps = torch.where(inverse == 0, zero, steps)
    return steps, torch.where(known, size, torch.where(torch.isfinite(size), 0.0, torch.nan)), zero


def simulated(x: Tensor, weight: Tensor, bias: Tensor | None, form: str) -> Iterator[Tensor]:
    """What a layer gives whose float32 weight [N, K] is kept in this format, [..., n] for some columns after the others.

    Nothing is packed, and the weight is rounded for those columns alone: in the cache that takes less time than the
    product, so that no rounded copy needs to be held.
    """
    size = None
    if form in HALVES:
        x = x.to(HALVES[form]).float()
    elif form == "fp8":
        steps, size = scaled8(x)
        x = steps.float()
    elif form != "fp32":
        x, size = centred(x)
    for rows in blocks(weight):
        own = weight[rows] if form == "fp32" else rounded(weight[rows], form)
        if size is None:
            yield functional.linear(x, own, None if bias is None else bias[rows])
        else:
            y = functional.linear(x, own).mul_(size)
            yield y if bias is None else y.add_(bias[rows])


def cost(x: Tensor, packed: Tensor, *rest: object) -> Cost:
    """x, the weight and the epilogue's operands read once, the result written once; two operations a weight and row."""
    operands, n = rest[:4], rest[4]
    assert isinstance(n, int)
    m, k = x.shape[:-1].numel(), x.shape[-1]
    read = sum(t.numel() * t.element_size() for t in (x, packed, *operands) if isinstance(t, Tensor))
    return Cost(read + m * n * x.element_size(), 2 * m * n * k)


QUANTISED_LINEAR = FusedOp(
    schema=(
        "quantised_linear(Tensor x, Tensor packed, Tensor? scale, Tensor? bias, Tensor? mul, Tensor? add, "
        "int out_features, int activation) -> Tensor"
    ),
    reference=reference,
    cpu=Path(__file__).parent / "cpu.cpp",
    cost=cost,
    cases=CASES,
)
