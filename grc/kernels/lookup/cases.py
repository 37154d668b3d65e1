"""The sizes and corners on which every look-up is tested."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grc.kernels.fusion import Case
from grc.kernels.lookup.pooling import MAX, MEAN, NO_PADDING, SUM


def random_arena(
    rows: Sequence[int], dims: Sequence[int], flat: bool, dtype: torch.dtype, seed: int
) -> tuple[Tensor, list[int]]:
    """An arena and the base of each table in it; every third table leaves a gap before the next, as real ones may."""
    gaps = [3 * (f % 3 == 2) for f in range(len(rows))]
    sizes = [(r + g) * (d if flat else 1) for r, d, g in zip(rows, dims, gaps, strict=True)]
    bases = [sum(sizes[:f]) for f in range(len(sizes))]
    shape = (sum(sizes),) if flat else (sum(sizes), dims[0])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype), bases


def random_ids(rows: Sequence[int], lengths: Sequence[int], batch: int, padding: Sequence[int], seed: int) -> Tensor:
    """[B, sum(lengths)] ids, a third of them padding where a feature has any."""
    generator = torch.Generator().manual_seed(seed)
    columns = []
    for f, length in enumerate(lengths):
        own = torch.randint(rows[f], (batch, length), generator=generator)
        if padding[f] != NO_PADDING:
            own = torch.where(torch.rand(own.shape, generator=generator) < 0.34, padding[f], own)
        columns.append(own)
    return torch.cat(columns, 1)


def random_bags(rows: Sequence[int], batch: int, padding: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
    """[V] ids of bags of 0 to 6, and their feature-major offsets [F * B + 1]."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(7, (len(rows) * batch,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    per_feature = counts.view(len(rows), batch).sum(1).tolist()
    tables = enumerate(zip(rows, per_feature, padding, strict=True))
    parts = [random_ids([r], [n], 1, [p], seed + f)[0] for f, (r, n, p) in tables]
    return torch.cat(parts), offsets


def _case(
    name: str,
    rows: Sequence[int],
    dims: Sequence[int],
    batch: int = 5,
    lengths: Sequence[int] | None = None,
    jagged: bool = False,
    weighted: bool = False,
    flat: bool = False,
    pooling: int = SUM,
    padding: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Case:
    def build(seed: int) -> Sequence[Any]:
        pads = list(padding or [NO_PADDING] * len(rows))
        arena, bases = random_arena(rows, dims, flat, dtype, seed)
        own = list(lengths or [1] * len(rows))
        fixed = (random_ids(rows, own, batch, pads, seed), None)
        ids, offsets = random_bags(rows, batch, pads, seed) if jagged else fixed
        weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)).to(dtype) if weighted else None
        return arena, ids, offsets, weights, bases, list(rows), list(dims), [] if jagged else own, pooling, pads

    return Case(name, build)


_THREE = (7, 50, 11)

CASES = (
    _case("one id each", _THREE, [16] * 3),
    _case("26 features", [40] * 26, [64] * 26, batch=37),
    _case("one feature", [9], [8]),
    _case("batch 0", _THREE, [16] * 3, batch=0),
    _case("batch 1", _THREE, [16] * 3, batch=1),
    _case("large batch", _THREE, [24] * 3, batch=3000),
    _case("width 1", _THREE, [1] * 3),
    _case("width 13", _THREE, [13] * 3),
    _case("width 131", _THREE, [131] * 3),
    _case("mixed widths", _THREE, [4, 33, 16], flat=True),
    _case("mixed widths, bags", _THREE, [5, 64, 17], flat=True, lengths=[2, 1, 4], pooling=MEAN),
    _case("mixed widths, jagged", _THREE, [5, 20, 7], flat=True, jagged=True, padding=[0, NO_PADDING, -1]),
    _case("sum of equal bags", _THREE, [16] * 3, lengths=[4] * 3),
    _case("sum of unequal bags", _THREE, [20] * 3, lengths=[1, 9, 3]),
    _case("an empty feature", _THREE, [20] * 3, lengths=[2, 0, 3]),
    _case("mean", _THREE, [16] * 3, lengths=[4, 2, 1], pooling=MEAN),
    _case("max", _THREE, [16] * 3, lengths=[4, 2, 1], pooling=MAX),
    _case("padding", _THREE, [16] * 3, padding=[0, -1, NO_PADDING]),
    _case("mean with padding", _THREE, [18] * 3, lengths=[3] * 3, pooling=MEAN, padding=[0, -1, NO_PADDING]),
    _case("max with padding", _THREE, [18] * 3, lengths=[3, 1, 2], pooling=MAX, padding=[0, -1, NO_PADDING]),
    _case("weights", _THREE, [16] * 3, lengths=[3] * 3, weighted=True),
    _case("weights of single ids", _THREE, [16] * 3, weighted=True, padding=[1, 1, 1]),
    _case("jagged sum", _THREE, [16] * 3, jagged=True),
    _case("jagged batch 0", _THREE, [16] * 3, batch=0, jagged=True),
    _case("jagged mean", _THREE, [12] * 3, jagged=True, pooling=MEAN, padding=[2, -1, NO_PADDING]),
    _case("jagged max", _THREE, [12] * 3, jagged=True, pooling=MAX, padding=[2, -1, NO_PADDING]),
    _case("jagged weights", _THREE, [12] * 3, jagged=True, weighted=True),
    _case("float16", _THREE, [19] * 3, lengths=[3, 1, 2], dtype=torch.float16),
    _case("bfloat16", _THREE, [40] * 3, lengths=[3, 1, 2], pooling=MEAN, dtype=torch.bfloat16),
    _case("bfloat16 rows", _THREE, [40] * 3, dtype=torch.bfloat16),
)
