"""The sizes and corners on which the factorisation machine is tested."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from grc.kernels.fusion import Case
from grc.kernels.lookup.cases import random_arena, random_ids
from grc.kernels.lookup.pooling import NO_PADDING


def _case(
    name: str,
    features: int = 5,
    dim: int = 16,
    batch: int = 5,
    linear: int | None = 2,
    padding: int = NO_PADDING,
    dtype: torch.dtype = torch.float32,
    summed: bool = True,
    keep: bool = True,
) -> Case:
    """`linear` is the rank of the linear weights, None for none."""

    def build(seed: int) -> Sequence[Any]:
        rows = [5 + 3 * f for f in range(features)]
        pads = [padding if f % 2 else NO_PADDING for f in range(features)]
        arena, bases = random_arena(rows, [dim] * features, False, dtype, seed)
        weights = torch.randn(arena.shape[0], generator=torch.Generator().manual_seed(seed)).to(dtype)
        first = None if linear is None else weights.view(-1, *[1] * (linear - 1))
        ids = random_ids(rows, [1] * features, batch, pads, seed)
        return arena, first, ids, bases, rows, dim, pads, [], summed, keep

    return Case(name, build)


CASES = (
    _case("deepfm", features=39, batch=37),
    _case("deepfm, large batch", features=39, batch=2500),
    _case("no linear term", linear=None),
    _case("flat linear weights", linear=1),
    _case("bi-interaction", linear=None, features=39, batch=37, summed=False),
    _case("bi-interaction, large batch", linear=None, batch=2500, summed=False, keep=False),
    _case("bi-interaction, width 133", linear=None, dim=133, padding=0, summed=False),
    _case("bi-interaction, bfloat16", linear=None, dim=12, dtype=torch.bfloat16, summed=False),
    _case("rows unread", keep=False),
    _case("batch 0", batch=0),
    _case("batch 1", batch=1),
    _case("one feature", features=1),
    _case("two features", features=2),
    _case("width 1", dim=1),
    _case("width 10", dim=10),
    _case("width 64", dim=64, features=26),
    _case("width 133", dim=133),
    _case("padding", padding=0),
    _case("padding of -1", padding=-1, linear=1),
    _case("float16", dim=12, dtype=torch.float16),
    _case("bfloat16", dim=40, dtype=torch.bfloat16),
)
