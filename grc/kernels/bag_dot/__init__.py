"""Look up, pool, and take all pairwise dot products of the features (DLRM's interaction)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from grc.kernels.bag_dot.cases import CASES
from grc.kernels.fusion import Cost, FusedOp
from grc.kernels.lookup.pooling import pooled_rows, widened


def reference(
    arena: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    dense: Tensor | None,
    bases: Sequence[int],
    rows: Sequence[int],
    dim: int,
    lengths: Sequence[int],
    pooling: int,
    padding: Sequence[int],
    upper: bool,
    diagonal: bool,
    keep_dense: bool,
    packing: Sequence[int] = (),
) -> Tensor:
    """One triangle of T @ T^T, row by row, T = [dense; pooled rows] of shape [B, N, dim] (Naumov et al. 2019, 2.1.3).

    dense is [B, dim] in the arena's dtype. The result is [B, N * (N - 1) / 2], plus N with the diagonal, plus dim in
    front with keep_dense, in the arena's dtype. Look-up arguments are those of `lookup`; beside an arena of bytes, dense
    and the result are float32.
    """
    dims = [dim] * len(bases)
    blocks = pooled_rows(arena, ids, offsets, weights, bases, rows, dims, lengths, pooling, padding, packing)
    if dense is not None:
        blocks = [dense.unsqueeze(1), *blocks]
    tile = widened(torch.cat(blocks, 1) if len(blocks) > 1 else blocks[0])
    products = torch.bmm(tile, tile.transpose(1, 2)).flatten(1)
    n = tile.shape[1]
    if upper:
        chosen = [i * n + j for i in range(n) for j in range(i + (not diagonal), n)]
    else:
        chosen = [i * n + j for i in range(n) for j in range(i + diagonal)]
    pairs = products.index_select(1, torch.tensor(chosen, dtype=torch.int64, device=ids.device))
    pairs = pairs if packing else pairs.to(arena.dtype)
    return torch.cat([dense, pairs], 1) if keep_dense and dense is not None else pairs


def cost(arena: Tensor, ids: Tensor, *rest: object) -> Cost:
    """Every row and dense input read once, the triangle written once; half of 2 * N * N * dim operations a sample."""
    offsets, dense, bases, dim, diagonal, keep = rest[0], rest[2], rest[3], rest[5], rest[10], rest[11]
    assert isinstance(bases, (list, tuple)) and isinstance(dim, int)
    batch = (offsets.shape[0] - 1) // len(bases) if isinstance(offsets, Tensor) else ids.shape[0]
    n = len(bases) + (dense is not None)
    pairs = n * (n - 1) // 2 + (n if diagonal else 0)
    elements = ids.numel() * dim + batch * (pairs + (dim if dense is not None else 0) + (dim if keep else 0))
    return Cost(elements * arena.element_size() + ids.numel() * ids.element_size(), 2 * batch * pairs * dim)


BAG_DOT = FusedOp(
    schema=(
        "bag_dot(Tensor arena, Tensor ids, Tensor? offsets, Tensor? weights, Tensor? dense, int[] bases, int[] rows, "
        "int dim, int[] lengths, int pooling, int[] padding, bool upper, bool diagonal, bool keep_dense, "
        "int[] packing=[]) -> Tensor"
    ),
    reference=reference,
    cpu=Path(__file__).parent / "cpu.cpp",
    cost=cost,
    cases=CASES,
)
