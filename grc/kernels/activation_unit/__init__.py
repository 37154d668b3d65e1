"""The local activation unit of target attention (DIN; Zhou et al. 2018, figure 2): how much each step of a user's history
says about one candidate, by a small network over both."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from grc.kernels.activation_unit.cases import CASES
from grc.kernels.fusion import Cost, FusedOp
from grc.kernels.packed_linear.activations import ACTIVATIONS, DICE, PRELU


def activated(y: Tensor, activation: int, gate: Tensor | None) -> Tensor:
    """An activation of y [..., N]. PReLU's gate is [1, N]: alpha. Dice's is [3, N]: alpha, scale and shift, and
    with p = sigmoid(scale * y + shift), which is the normalised y, it is y * (alpha + (1 - alpha) * p)."""
    if activation == PRELU:
        return torch.where(y > 0, y, gate[0] * y)  # type: ignore[index]
    if activation == DICE:
        alpha, scale, shift = gate.unbind(0)  # type: ignore[union-attr]
        return y * (alpha + (1 - alpha) * torch.sigmoid(scale * y + shift))
    return list(ACTIVATIONS.values())[activation](y)


def reference(
    query: Tensor,
    keys: Tensor,
    row: Tensor,
    first: Tensor,
    first_gate: Tensor | None,
    second: Tensor | None,
    second_bias: Tensor | None,
    second_gate: Tensor | None,
    head: Tensor,
    head_bias: Tensor,
    first_activation: int,
    second_activation: int,
) -> Tensor:
    """The score of each step, [B, S]: act2(act1([k, k * q] @ first + row) @ second + second_bias) @ head + head_bias.

    query [B, D]; keys [B, S, D]; row [B, N1], what is the same for all steps; first [2 D, N1], for the keys and then for
    their products with the query; second [N1, N2], or None for a unit of one hidden layer; head [N2], or [N1] without
    second; head_bias [1]. Gates are as in `activated`. All are of one dtype.
    """
    pairs = torch.cat([keys, keys * query.unsqueeze(1)], -1)
    y = activated(pairs @ first + row.unsqueeze(1), first_activation, first_gate)
    if second is not None and second_bias is not None:
        y = activated(y @ second + second_bias, second_activation, second_gate)
    return y @ head + head_bias


def cost(
    query: Tensor,
    keys: Tensor,
    row: Tensor,
    first: Tensor,
    first_gate: Tensor | None,
    second: Tensor | None,
    *rest: object,
) -> Cost:
    """Everything read once, the scores written once; the first layer's weights are joined for each user."""
    users, steps, width = keys.shape
    n1, n2 = (first.shape[1], 1) if second is None else second.shape
    read = query.numel() + keys.numel() + row.numel() + first.numel() + (0 if second is None else second.numel())
    flops = 2 * users * (width * n1 + steps * (width * n1 + n1 * n2 + (0 if second is None else n2)))
    return Cost((read + users * steps) * 4, flops)


ACTIVATION_UNIT = FusedOp(
    schema=(
        "activation_unit(Tensor query, Tensor keys, Tensor row, Tensor first, Tensor? first_gate, Tensor? second, "
        "Tensor? second_bias, Tensor? second_gate, Tensor head, Tensor head_bias, int first_activation, "
        "int second_activation) -> Tensor"
    ),
    reference=reference,
    cpu=Path(__file__).parent / "cpu.cpp",
    cost=cost,
    cases=CASES,
    only_float32=True,
)
