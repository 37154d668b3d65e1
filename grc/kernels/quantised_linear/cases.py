"""Sizes and edge cases of the quantised linear: both formats, every epilogue, every remainder of a tile and of a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grc.kernels.cpp import target_isa
from grc.kernels.fusion import Case
from grc.kernels.quantised_linear.panels import quantise


def arguments(
    seed: int,
    shape: Sequence[int],
    n: int,
    dtype: torch.dtype = torch.int8,
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

    y = (*shape[:-1], n)
    weight = quantise(normal(n, shape[-1]) / max(shape[-1], 1) ** 0.5, dtype, isa or target_isa())
    return (
        normal(*shape),
        weight.packed,
        weight.scale,
        normal(n) if bias else None,
        normal(*y) if mul else None,
        normal(*y) if add else None,
        n,
        activation,
    )


def _strided(seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Rows 40 floats apart: read in place."""
    x = torch.randn(9, 40, generator=torch.Generator().manual_seed(seed))
    return (x[:, 3:36], *arguments(seed, (9, 33), 70, dtype)[1:])


def _pair(name: str, **options: Any) -> tuple[Case, Case]:
    def build(dtype: torch.dtype) -> Any:
        return lambda seed: arguments(seed, dtype=dtype, **options)

    return Case(f"{name}, int8", build(torch.int8)), Case(f"{name}, bfloat16", build(torch.bfloat16))


CASES = (
    *_pair("row", shape=(1, 415), n=512, activation=1),
    *_pair("vector", shape=(31,), n=20),
    *_pair("empty", shape=(0, 16), n=32),
    *_pair("head", shape=(65, 257), n=1, activation=5),
    *_pair("rows of steps", shape=(3, 5, 96), n=130, activation=2),
    *_pair("deep", shape=(14, 1101), n=17, bias=False, add=True),
    *_pair("tall", shape=(301, 64), n=96, activation=4),
    *_pair("wide", shape=(2, 13), n=1000, activation=3, mul=True),
    *_pair("everything", shape=(50, 40), n=80, activation=6, mul=True, add=True),
    Case("strided, int8", lambda seed: _strided(seed, torch.int8)),
    Case("strided, bfloat16", lambda seed: _strided(seed, torch.bfloat16)),
)
