"""Score every item of a table and keep the best k, without ever writing the scores of all items."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from grc.kernels.fusion import Cost, FusedOp
from grc.kernels.packed_linear.panels import unpack
from grc.kernels.score_topk.cases import CASES, PACKED_CASES

__all__ = ["PACKED_SCORE_TOPK", "SCORE_TOPK"]


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of x @ weight.T + bias and their items, both [..., k], falling; items are int64.

    x is [..., D], weight [N, D], bias [N], 0 <= k <= N. NaN counts as larger than every number, as in torch. Which of
    equal scores come first is torch's choice here, and the lowest item in the kernel.
    """
    values, indices = torch.topk(functional.linear(x, weight, bias), k)
    return values, indices


def packed_reference(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, k: int
) -> tuple[Tensor, Tensor]:
    """`reference` over a float32 weight [N, D] packed by `grc.kernels.packed_linear.pack`; N = out_features."""
    return reference(x, unpack(packed, out_features), bias, k)


def moved(x: Tensor, items: int, bias: Tensor | None, k: int) -> Cost:
    """Rows, items and bias read once, k scores and int64 items a row written; two operations a weight and row."""
    width = x.shape[-1]
    rows = x.shape[:-1].numel()
    read = rows * width + items * width + (0 if bias is None else items)
    return Cost((read + rows * k) * x.element_size() + rows * k * 8, 2 * rows * items * width)


def cost(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> Cost:
    return moved(x, weight.shape[0], bias, k)


def packed_cost(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, k: int) -> Cost:
    return moved(x, out_features, bias, k)


SCORE_TOPK = FusedOp(
    schema="score_topk(Tensor x, Tensor weight, Tensor? bias, int k) -> (Tensor values, Tensor indices)",
    reference=reference,
    cpu=None,  # needs the weight in panels, which lowering packs: see lowering/pack.py
    cost=cost,
    cases=CASES,
)

PACKED_SCORE_TOPK = FusedOp(
    schema=(
        "packed_score_topk(Tensor x, Tensor packed, Tensor? bias, int out_features, int k) "
        "-> (Tensor values, Tensor indices)"
    ),
    reference=packed_reference,
    cpu=Path(__file__).parent / "cpu.cpp",
    cost=packed_cost,
    cases=PACKED_CASES,
)
