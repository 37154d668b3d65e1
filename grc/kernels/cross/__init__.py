"""The cross layer of DCN: x0 * (W y + b) + x, with y = x (full rank) or y = V x (low rank)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grc.kernels.fusion import Case, Cost, FusedOp


def reference(x0: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """x0, x: [B, D]; y: [B, K]; weight: [D, K]; bias: [D]. Returns [B, D] (DCN V2; Wang et al. 2021, equation 1)."""
    return x0 * torch.nn.functional.linear(y, weight, bias) + x


def cost(x0: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor) -> Cost:
    """The weight read once, the three operands and the result moved once."""
    moved = weight.numel() + y.numel() + 3 * x0.numel()
    return Cost(moved * x0.element_size(), 2 * x0.shape[0] * weight.numel())


def case(name: str, batch: int, width: int, rank: int, biased: bool = True) -> Case:
    def build(seed: int) -> Sequence[Any]:
        make = torch.Generator().manual_seed(seed)
        x0, x = (torch.randn(batch, width, generator=make) for _ in range(2))
        y = x if rank == width else torch.randn(batch, rank, generator=make)
        weight = torch.randn(width, rank, generator=make) / rank**0.5
        return x0, y, weight, torch.randn(width, generator=make) if biased else None, x

    return Case(name, build)


CASES = (
    case("full rank", 5, 24, 24),
    case("low rank", 4, 33, 8),
    case("no bias", 3, 16, 16, biased=False),
    case("one row", 1, 40, 40),
    case("no rows", 0, 16, 16),
    case("one column", 3, 1, 1),
)

CROSS = FusedOp(
    schema="cross(Tensor x0, Tensor y, Tensor weight, Tensor? bias, Tensor x) -> Tensor",
    reference=reference,
    cpu=None,  # packed_linear's epilogue: see lowering/pack.py
    cost=cost,
    cases=CASES,
)
