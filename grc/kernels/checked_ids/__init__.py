"""Ids as they are, once each was seen to have a row: what stands before a look-up that is not one of ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grc.kernels.fusion import Case, Cost, FusedOp


def reference(ids: Tensor, rows: int) -> Tensor:
    """A copy of ids [N], int32 or int64. The kernel raises IndexError where one is outside of 0..rows-1."""
    return ids.clone(memory_format=torch.contiguous_format)


def cost(ids: Tensor, rows: int) -> Cost:
    return Cost(2 * ids.numel() * ids.element_size(), ids.numel())


def case(name: str, count: int, rows: int, dtype: torch.dtype = torch.int64, step: int = 1) -> Case:
    def build(seed: int) -> Sequence[Any]:
        ids = torch.randint(rows, (count, step), generator=torch.Generator().manual_seed(seed)).to(dtype)
        return ids[:, 0], rows

    return Case(name, build)


CHECKED_IDS = FusedOp(
    schema="checked_ids(Tensor ids, int rows) -> Tensor",
    reference=reference,
    cpu=Path(__file__).parent / "cpu.cpp",
    cost=cost,
    cases=(
        case("one", 1, 7),
        case("none", 0, 7),
        case("history", 50, 500_000),
        case("int32", 133, 1000, torch.int32),
        case("strided", 67, 1000, step=3),
        case("strided int32", 5, 9, torch.int32, 2),
    ),
)
