"""The sizes and corners on which the pairwise dot products are tested."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from grc.kernels.fusion import Case
from grc.kernels.lookup.cases import random_arena, random_bags, random_ids
from grc.kernels.lookup.pooling import MAX, MEAN, NO_PADDING, SUM


def _case(
    name: str,
    features: int = 5,
    dim: int = 16,
    batch: int = 5,
    dense: bool = True,
    upper: bool = False,
    diagonal: bool = False,
    keep_dense: bool = False,
    lengths: Sequence[int] | None = None,
    jagged: bool = False,
    weighted: bool = False,
    flat: bool = False,
    pooling: int = SUM,
    padding: int = NO_PADDING,
    dtype: torch.dtype = torch.float32,
) -> Case:
    def build(seed: int) -> Sequence[Any]:
        rows = [5 + 3 * f for f in range(features)]
        pads = [padding if f % 2 else NO_PADDING for f in range(features)]
        arena, bases = random_arena(rows, [dim] * features, flat, dtype, seed)
        own = list(lengths or [1] * features)
        fixed = (random_ids(rows, own, batch, pads, seed), None)
        ids, offsets = random_bags(rows, batch, pads, seed) if jagged else fixed
        generator = torch.Generator().manual_seed(seed)
        weights = torch.rand(ids.shape, generator=generator).to(dtype) if weighted else None
        first = torch.randn(batch, dim, generator=generator).to(dtype) if dense else None
        own = [] if jagged else own
        pick = (upper, diagonal, keep_dense)
        return arena, ids, offsets, weights, first, bases, rows, dim, own, pooling, pads, *pick

    return Case(name, build)


CASES = (
    _case("dlrm", features=26, dim=64, batch=37, keep_dense=True),
    _case("dlrm, large batch", features=26, dim=64, batch=1500, keep_dense=True),
    _case("no dense", dense=False),
    _case("upper", features=20, upper=True),
    _case("diagonal", features=20, diagonal=True),
    _case("upper with diagonal", features=17, upper=True, diagonal=True, keep_dense=True),
    _case("batch 0", batch=0, keep_dense=True),
    _case("batch 1", batch=1, keep_dense=True),
    _case("one row", features=1, dense=False),
    _case("one row, diagonal", features=1, dense=False, diagonal=True),
    _case("two rows", features=1),
    _case("16 rows", features=16, dense=False, diagonal=True),
    _case("32 rows, upper", features=31, upper=True),
    _case("33 rows", features=33, dense=False),
    _case("64 rows", features=63, dim=32),
    _case("65 rows, upper with diagonal", features=65, dense=False, upper=True, diagonal=True),
    _case("width 1", dim=1, keep_dense=True),
    _case("width 13", dim=13, keep_dense=True),
    _case("width 129", dim=129, keep_dense=True),
    _case("flat arena", flat=True, dim=12),
    _case("bags", lengths=[3, 1, 0, 7, 2], keep_dense=True),
    _case("mean", lengths=[3] * 5, pooling=MEAN, padding=-1),
    _case("max", lengths=[3, 1, 2, 7, 2], pooling=MAX, padding=0),
    _case("padding", padding=-1),
    _case("weights", lengths=[2] * 5, weighted=True),
    _case("jagged", jagged=True, keep_dense=True),
    _case("jagged mean", jagged=True, pooling=MEAN, padding=2),
    _case("jagged weights", jagged=True, weighted=True),
    _case("float16", dim=20, keep_dense=True, dtype=torch.float16),
    _case("bfloat16", features=26, dim=64, keep_dense=True, dtype=torch.bfloat16),
    _case("bfloat16, width 13", dim=13, padding=-1, keep_dense=True, dtype=torch.bfloat16),
    _case("bfloat16, 65 rows", features=65, dim=96, dense=False, upper=True, diagonal=True, dtype=torch.bfloat16),
    _case("bfloat16, bags", lengths=[3, 1, 0, 7, 2], dim=20, dtype=torch.bfloat16),
)
