"""Sizes and edge cases of the packed linear: every epilogue, every remainder of a tile, views of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grc.kernels.cpp import target_isa
from grc.kernels.fusion import Case
from grc.kernels.packed_linear.panels import pack


def arguments(
    seed: int,
    shape: Sequence[int],
    n: int,
    activation: int = 0,
    bias: bool = True,
    mul: bool = False,
    add: bool = False,
    isa: str | None = None,
) -> tuple[Any, ...]:
    """Arguments for x of `shape` [..., K] and N = n, the weight scaled so that y is of order one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    k = shape[-1]
    y = (*shape[:-1], n)
    weight = pack(normal(n, k) / max(k, 1) ** 0.5, isa or target_isa())
    return (
        normal(*shape),
        weight,
        normal(n) if bias else None,
        normal(*y) if mul else None,
        normal(*y) if add else None,
        n,
        activation,
    )


def _strided(seed: int) -> tuple[Any, ...]:
    """Rows 40 floats apart: read in place."""
    x, *rest = arguments(seed, (9, 40), 70)
    weight = pack(torch.randn(70, 33, generator=torch.Generator().manual_seed(seed)) / 6, target_isa())
    return (x[:, 3:36], weight, *rest[1:])


def _transposed(seed: int) -> tuple[Any, ...]:
    """Columns apart: copied."""
    x, *rest = arguments(seed, (9, 40), 70)
    return (x.t().contiguous().t(), *rest)


def _cross(seed: int) -> tuple[Any, ...]:
    """A cross layer of DCN, x0 * (W x + b) + x, with x0 and x the same tensor."""
    x, weight, bias, _, _, n, activation = arguments(seed, (37, 45), 45)
    return (x, weight, bias, x, x, n, activation)


CASES = (
    Case("row", lambda seed: arguments(seed, (1, 415), 512, activation=1)),
    Case("vector", lambda seed: arguments(seed, (31,), 20)),
    Case("empty", lambda seed: arguments(seed, (0, 16), 32)),
    Case("head", lambda seed: arguments(seed, (65, 257), 1, activation=5)),
    Case("three-heads", lambda seed: arguments(seed, (7, 80), 3, bias=False)),
    Case("rows-of-steps", lambda seed: arguments(seed, (3, 5, 96), 130, activation=2)),
    Case("deep", lambda seed: arguments(seed, (14, 1100), 17, bias=False, add=True)),
    Case("tall", lambda seed: arguments(seed, (301, 64), 96, activation=4)),
    Case("wide", lambda seed: arguments(seed, (2, 13), 1000, activation=3, mul=True)),
    Case("everything", lambda seed: arguments(seed, (50, 40), 80, activation=6, mul=True, add=True)),
    Case("cross", _cross),
    Case("strided", _strided),
    Case("transposed", _transposed),
)
