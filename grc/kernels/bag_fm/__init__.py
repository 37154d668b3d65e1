"""Look up one row per feature and take the factorisation machine's second-order term in the same pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from grc.kernels.bag_fm.cases import CASES
from grc.kernels.fusion import Cost, FusedOp
from grc.kernels.lookup.pooling import NO_PADDING, SUM, pooled_rows, widened


def reference(
    arena: Tensor,
    linear: Tensor | None,
    ids: Tensor,
    bases: Sequence[int],
    rows: Sequence[int],
    dim: int,
    padding: Sequence[int],
    packing: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Rows [B, F * dim] and 0.5 * sum_d((sum_f E)^2 - sum_f E^2) + sum_f linear[bases[f] + id_f] as [B, 1].

    arena is [R, dim], linear [R] or [R, 1], ids [B, F]; both results have the arena's dtype (Rendle 2010; DeepFM, Guo
    et al. 2017). An id equal to padding[f] is a row of zeros and has no linear term. Of an arena
    of bytes [E], `packing` says where rows lie, as in `lookup`; bases still number the rows of linear, and results are
    float32.
    """
    ones, dims = [1] * len(bases), [dim] * len(bases)
    blocks = pooled_rows(arena, ids, None, None, bases, rows, dims, ones, SUM, padding, packing)
    found = torch.cat(blocks, 1) if len(blocks) > 1 else blocks[0]
    wide = widened(found)
    fm = 0.5 * (wide.sum(1).square() - wide.square().sum(1)).sum(1, keepdim=True)
    if linear is not None:
        keep = None
        if any(value != NO_PADDING for value in padding):
            keep = ids != torch.tensor(list(padding), dtype=torch.int64, device=ids.device)
            ids = torch.where(keep, ids, 0)
        row = ids + torch.tensor(list(bases), dtype=torch.int64, device=ids.device)
        terms = widened(functional.embedding(row, linear.reshape(-1, 1)).squeeze(-1))
        terms = terms if keep is None else torch.where(keep, terms, 0)
        fm = fm + terms.sum(1, keepdim=True)
    return found.flatten(1), fm if packing else fm.to(arena.dtype)


def cost(arena: Tensor, linear: Tensor | None, ids: Tensor, *rest: object) -> Cost:
    """Every row read and written once, every linear weight read once; three operations an element."""
    dim = rest[2]
    assert isinstance(dim, int)
    elements = ids.numel() * dim
    moved = 2 * elements + ids.shape[0] + (0 if linear is None else ids.numel())
    return Cost(moved * arena.element_size() + ids.numel() * ids.element_size(), 3 * elements)


BAG_FM = FusedOp(
    schema=(
        "bag_fm(Tensor arena, Tensor? linear, Tensor ids, int[] bases, int[] rows, int dim, int[] padding, "
        "int[] packing=[]) -> (Tensor, Tensor)"
    ),
    reference=reference,
    cpu=Path(__file__).parent / "cpu.cpp",
    cost=cost,
    cases=CASES,
)
