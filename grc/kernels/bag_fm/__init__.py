"""Look up one row per feature and take the factorisation machine's second-order term in the same pass, summed or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from grc.errors import LoweringError
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
    summed: bool = True,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """Rows [B, F * dim] and 0.5 * sum_d((sum_f E)^2 - sum_f E^2) + sum_f linear[bases[f] + id_f] as [B, 1].

    arena is [R, dim], linear [R] or [R, 1], ids [B, F]; both results have the arena's dtype (Rendle 2010; DeepFM, Guo
    et al. 2017). Without `summed` the second is 0.5 * ((sum_f E)^2 - sum_f E^2) as [B, dim], bi-interaction pooling (He &
    Chua 2017); without `keep` the first, which nothing reads then, is [B, 0]. An id equal to padding[f] is a row of zeros
    and has no linear term. Of an arena of bytes [E], `packing` says where rows lie, as in `lookup`; bases still number the
    rows of linear, and results are float32. Raises LoweringError for linear weights that are not summed.
    """
    if linear is not None and not summed:
        raise LoweringError("a linear term belongs to the sum over the width", "sum, or leave out linear")
    ones, dims = [1] * len(bases), [dim] * len(bases)
    blocks = pooled_rows(arena, ids, None, None, bases, rows, dims, ones, SUM, padding, packing)
    found = torch.cat(blocks, 1) if len(blocks) > 1 else blocks[0]
    wide = widened(found)
    fm = 0.5 * (wide.sum(1).square() - wide.square().sum(1))
    fm = fm.sum(1, keepdim=True) if summed else fm
    if linear is not None:
        known = None
        if any(value != NO_PADDING for value in padding):
            known = ids != torch.tensor(list(padding), dtype=torch.int64, device=ids.device)
            ids = torch.where(known, ids, 0)
        row = ids + torch.tensor(list(bases), dtype=torch.int64, device=ids.device)
        terms = widened(functional.embedding(row, linear.reshape(-1, 1)).squeeze(-1))
        terms = terms if known is None else torch.where(known, terms, 0)
        fm = fm + terms.sum(1, keepdim=True)
    flat = found.flatten(1) if keep else found.new_empty(found.shape[0], 0)
    return flat, fm if packing else fm.to(arena.dtype)


def cost(
    arena: Tensor,
    linear: Tensor | None,
    ids: Tensor,
    bases: Sequence[int],
    rows: Sequence[int],
    dim: int,
    padding: Sequence[int],
    packing: Sequence[int] = (),
    summed: bool = True,
    keep: bool = True,
) -> Cost:
    """Every row read once, and written once where it is kept, every linear weight read once; three operations an element."""
    elements = ids.numel() * dim
    moved = (1 + keep) * elements + ids.shape[0] * (1 if summed else dim) + (0 if linear is None else ids.numel())
    return Cost(moved * arena.element_size() + ids.numel() * ids.element_size(), 3 * elements)


BAG_FM = FusedOp(
    schema=(
        "bag_fm(Tensor arena, Tensor? linear, Tensor ids, int[] bases, int[] rows, int dim, int[] padding, "
        "int[] packing=[], bool summed=True, bool keep=True) -> (Tensor, Tensor)"
    ),
    reference=reference,
    cpu=Path(__file__).parent / "cpu.cpp",
    cost=cost,
    cases=CASES,
)
