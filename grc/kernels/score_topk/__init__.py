"""Score every item of a table and keep the best k: on a CPU without ever writing the scores of all items."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from grc.kernels.fusion import Cost, FusedOp
from grc.kernels.packed_linear.panels import unpack
from grc.kernels.quantised_linear import QUANTISED_LINEAR
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
    x: Tensor, packed: Tensor, scale: Tensor | None, bias: Tensor | None, out_features: int, k: int
) -> tuple[Tensor, Tensor]:
    """`reference` over a packed weight [N, D], N = out_features: in float32, packed by `packed_linear.pack`, or in int8 or
    bfloat16, packed by `quantised_linear.quantise`, whose scores are those of a quantised linear."""
    if packed.dtype not in (torch.int8, torch.bfloat16):
        return reference(x, unpack(packed, out_features), bias, k)
    scores = QUANTISED_LINEAR.reference(x, packed, scale, bias, None, None, out_features, 0)
    values, indices = torch.topk(scores, k)
    return values, indices


def moved(x: Tensor, items: int, bias: Tensor | None, k: int, number: int) -> Cost:
    """Rows, items of so many bytes a number and bias read once, k scores and int64 items a row written; two operations a
    weight and row."""
    width = x.shape[-1]
    rows = x.shape[:-1].numel()
    read = rows * width + (0 if bias is None else items)
    return Cost((read + rows * k) * x.element_size() + items * width * number + rows * k * 8, 2 * rows * items * width)


def cost(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> Cost:
    return moved(x, weight.shape[0], bias, k, weight.element_size())


def packed_cost(
    x: Tensor, packed: Tensor, scale: Tensor | None, bias: Tensor | None, out_features: int, k: int
) -> Cost:
    return moved(x, out_features, bias, k, packed.element_size())


SCORE_TOPK = FusedOp(
    schema="score_topk(Tensor x, Tensor weight, Tensor? bias, int k) -> (Tensor values, Tensor indices)",
    reference=reference,
    cpu=None,  # needs the weight in panels, which lowering packs: see lowering/pack.py
    cost=cost,
    cases=CASES,
)

PACKED_SCORE_TOPK = FusedOp(
    schema=(
        "packed_score_topk(Tensor x, Tensor packed, Tensor? scale, Tensor? bias, int out_features, int k) "
        "-> (Tensor values, Tensor indices)"
    ),
    reference=packed_reference,
    cpu=Path(__file__).parent / "cpu.cpp",
    cost=packed_cost,
    cases=PACKED_CASES,
)
