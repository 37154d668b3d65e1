"""Sizes and edge cases of score_topk: few and many rows, k from 1 to N, remainders of a tile, views, masked items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from grc.kernels.cpp import target_isa
from grc.kernels.fusion import Case
from grc.kernels.packed_linear.panels import pack
from grc.kernels.quantised_linear.panels import Quantised, quantise


def arguments(
    seed: int, shape: Sequence[int], items: int, k: int, bias: bool = False, masked: int = 0
) -> tuple[Any, ...]:
    """Arguments for x of `shape` [..., D], scores of order one; the bias of the first `masked` items is -inf."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    weight = torch.randn(items, shape[-1], generator=generator) / max(shape[-1], 1) ** 0.5
    offset = torch.randn(items, generator=generator) if bias or masked else None
    if offset is not None:
        offset[:masked] = -torch.inf
    return x, weight, offset, k


def _strided(seed: int) -> tuple[Any, ...]:
    """The last step of every history, read in place."""
    x, *rest = arguments(seed, (5, 3, 24), 300, 11)
    return (x[:, -1], *rest)


def _transposed(seed: int) -> tuple[Any, ...]:
    x, *rest = arguments(seed, (9, 24), 300, 11)
    return (x.t().contiguous().t(), *rest)


def packed(arguments: Sequence[Any], isa: str | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """score_topk's arguments as packed_score_topk takes them, its items in `dtype`: float32, int8 or bfloat16."""
    x, weight, bias, k = arguments
    isa = isa or target_isa()
    made = Quantised(pack(weight, isa), None) if dtype is torch.float32 else quantise(weight, dtype, isa)
    return x, made.packed, made.scale, bias, weight.shape[0], k


def _packed(case: Case, dtype: torch.dtype) -> Case:
    return Case(f"{case.name}, {str(dtype)[6:]}", lambda seed: packed(case.build(seed), dtype=dtype))


CASES = (
    Case("row", lambda seed: arguments(seed, (1, 64), 3000, 100)),
    Case("vector", lambda seed: arguments(seed, (31,), 200, 10)),
    Case("empty", lambda seed: arguments(seed, (0, 16), 100, 10)),
    Case("best one", lambda seed: arguments(seed, (7, 33), 1000, 1)),
    Case("none wanted", lambda seed: arguments(seed, (3, 8), 50, 0)),
    Case("all wanted", lambda seed: arguments(seed, (4, 19), 333, 333, bias=True)),
    Case("three items", lambda seed: arguments(seed, (6, 40), 3, 2, bias=True)),
    Case("masked", lambda seed: arguments(seed, (13, 50), 700, 20, masked=1)),
    Case("mostly masked", lambda seed: arguments(seed, (2, 50), 130, 40, masked=110)),
    Case("rows of steps", lambda seed: arguments(seed, (3, 5, 17), 1030, 21)),
    Case("deep", lambda seed: arguments(seed, (5, 700), 500, 9)),
    Case("large batch", lambda seed: arguments(seed, (301, 64), 2049, 50, bias=True)),
    Case("strided", _strided),
    Case("transposed", _transposed),
)
PACKED_CASES = tuple(_packed(case, dtype) for dtype in (torch.float32, torch.int8, torch.bfloat16) for case in CASES)
