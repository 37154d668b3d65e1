"""Sizes and edge cases of the activation unit: widths beside a vector's, every activation, views of the keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grc.kernels.fusion import Case
from grc.kernels.packed_linear.activations import DICE, PRELU, RELU, SIGMOID


def arguments(
    seed: int, batch: int, steps: int, width: int, n1: int, n2: int | None, activations: tuple[int, int] = (DICE, DICE)
) -> tuple[Any, ...]:
    """Arguments whose values in all layers are of order one; without n2 those of a unit of one hidden layer."""
    make = torch.Generator().manual_seed(seed)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*sizes, generator=make) * scale

    def gate(n: int, activation: int) -> Tensor | None:
        rows = {PRELU: 1, DICE: 3}.get(activation)
        return None if rows is None else normal(rows, n, scale=0.5)

    return (
        normal(batch, width),
        normal(batch, steps, width),
        normal(batch, n1),
        normal(2 * width, n1, scale=(2 * width) ** -0.5),
        gate(n1, activations[0]),
        *((None, None, None) if n2 is None else (normal(n1, n2, scale=n1**-0.5), normal(n2), gate(n2, activations[1]))),
        normal(n2 or n1, scale=(n2 or n1) ** -0.5),
        normal(1),
        *activations,
    )


def _strided(seed: int) -> tuple[Any, ...]:
    """Keys that are some columns of wider rows, queries that are one step of them."""
    _, _, *rest = arguments(seed, 6, 9, 12, 20, 10)
    wide = torch.randn(6, 10, 30, generator=torch.Generator().manual_seed(seed))
    return (wide[:, 9, 3:15], wide[:, :9, 3:15], *rest)


def _transposed(seed: int) -> tuple[Any, ...]:
    query, keys, *rest = arguments(seed, 3, 7, 16, 24, 8)
    return (query.t().contiguous().t(), keys.transpose(1, 2).contiguous().transpose(1, 2), *rest)


CASES = (
    Case("din", lambda seed: arguments(seed, 5, 50, 32, 80, 40)),
    Case("one user", lambda seed: arguments(seed, 1, 50, 32, 80, 40)),
    Case("a long history", lambda seed: arguments(seed, 2, 301, 16, 64, 16, (SIGMOID, SIGMOID))),
    Case("one step", lambda seed: arguments(seed, 9, 1, 8, 36, 4, (PRELU, RELU))),
    Case("narrow", lambda seed: arguments(seed, 4, 6, 3, 5, 2, (RELU, PRELU))),
    Case("wide", lambda seed: arguments(seed, 3, 7, 300, 130, 70, (DICE, PRELU))),
    Case("one hidden layer", lambda seed: arguments(seed, 5, 50, 32, 64, None)),
    Case("one narrow hidden layer", lambda seed: arguments(seed, 4, 9, 7, 5, None, (PRELU, 0))),
    Case("no users", lambda seed: arguments(seed, 0, 5, 8, 16, 8)),
    Case("no steps", lambda seed: arguments(seed, 3, 0, 8, 16, 8)),
    Case("strided", _strided),
    Case("transposed", _transposed),
)
