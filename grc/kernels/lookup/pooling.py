"""Pooled embedding rows in plain aten: what the look-up ops mean, and their portable form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from grc.graph.jagged import ended
from grc.kernels.lookup.row_formats import ROW_FORMATS, row_bytes, unpacked

SUM, MEAN, MAX = 0, 1, 2
NO_PADDING = -(2**63)


def pooled_rows(
    arena: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    bases: Sequence[int],
    rows: Sequence[int],
    dims: Sequence[int],
    lengths: Sequence[int],
    pooling: int,
    padding: Sequence[int],
    packing: Sequence[int] = (),
) -> list[Tensor]:
    """Every feature's bags pooled: blocks [B, features, dim] in feature order, one block if all share a 2-D arena.

    Sums run in float32 for a float16 or bfloat16 arena and are rounded once, at the end. In an arena of bytes, `packing`
    gives each feature's format and first byte, and the result is float32.
    """
    if arena.dim() == 2:
        if offsets is not None:
            return [_jagged(arena, ids, offsets, weights, bases, pooling, padding, range(len(bases)))]
        return [_fixed(arena, ids, weights, bases, lengths, pooling, padding)]
    blocks, start = [], 0
    for f, (base, count, dim) in enumerate(zip(bases, rows, dims, strict=True)):
        if packing:
            form, base = ROW_FORMATS[packing[2 * f]], packing[2 * f + 1]
            pitch = row_bytes(form, dim)
            table = Packed(arena.narrow(0, base, count * pitch).view(count, pitch), form, dim)
        else:
            table = arena.narrow(0, base, count * dim).view(count, dim)
        if offsets is not None:
            blocks.append(_jagged(table, ids, offsets, weights, [0] * len(bases), pooling, padding, range(f, f + 1)))
            continue
        own = ids.narrow(1, start, lengths[f])
        scale = None if weights is None else weights.narrow(1, start, lengths[f])
        blocks.append(_fixed(table, own, scale, [0], lengths[f : f + 1], pooling, padding[f : f + 1]))
        start += lengths[f]
    return blocks


@dataclass(frozen=True)
class Packed:
    """A table of bytes [R, row_bytes], whose rows are unpacked as they are gathered."""

    bytes: Tensor
    form: str
    dim: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def shape(self) -> tuple[Any, int]:
        return self.bytes.shape[0], self.dim


def _rows(table: Tensor | Packed, ids: Tensor) -> Tensor:
    """Rows [..., D] of any table."""
    if isinstance(table, Packed):
        return unpacked(table.bytes[ids], table.form, table.dim)
    return functional.embedding(ids, table)


def _fixed(
    table: Tensor | Packed,
    ids: Tensor,
    weights: Tensor | None,
    bases: Sequence[int],
    lengths: Sequence[int],
    pooling: int,
    padding: Sequence[int],
) -> Tensor:
    """[B, T] ids to [B, F, D]."""
    keep = None
    if any(value != NO_PADDING for value in padding):
        keep = ids != _per_column(padding, lengths, ids)
        ids = torch.where(keep, ids, 0)
    found = _rows(table, ids + _per_column(bases, lengths, ids) if any(bases) else ids)
    if weights is None and all(length == 1 for length in lengths):
        return found if keep is None else torch.where(keep.unsqueeze(-1), found, 0)
    found = widened(found)
    if weights is not None:
        found = found * weights.unsqueeze(-1)
    if len(set(lengths)) == 1:
        shape = (ids.shape[0], len(lengths), lengths[0])
        mask = None if keep is None else keep.view(shape)
        return _reduce(found.view(*shape, table.shape[1]), mask, pooling).to(table.dtype)
    masks = [None] * len(lengths) if keep is None else list(keep.split(list(lengths), 1))
    parts = zip(found.split(list(lengths), 1), masks, strict=True)
    return torch.stack([_reduce(part, mask, pooling) for part, mask in parts], 1).to(table.dtype)


def _reduce(found: Tensor, keep: Tensor | None, pooling: int) -> Tensor:
    """[..., L, D] rows to [..., D]; an empty bag gives zeros."""
    if found.shape[-2] == 0:
        return found.sum(-2)
    if pooling == MAX:
        if keep is None:
            return found.amax(-2)
        best = torch.where(keep.unsqueeze(-1), found, float("-inf")).amax(-2)
        return torch.where(keep.any(-1, keepdim=True), best, 0)
    if keep is None:
        return found.sum(-2) if pooling == SUM else found.mean(-2)
    total = torch.where(keep.unsqueeze(-1), found, 0).sum(-2)
    return total if pooling == SUM else total / keep.sum(-1, keepdim=True).clamp(min=1)


def _jagged(
    table: Tensor | Packed,
    ids: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    bases: Sequence[int],
    pooling: int,
    padding: Sequence[int],
    features: range,
) -> Tensor:
    """[V] ids with feature-major offsets to [B, len(features), D]; ids of other features are passed over."""
    batch = (offsets.shape[0] - 1) // len(bases)
    first, bags = features.start * batch, len(features) * batch
    position = torch.arange(ids.shape[0], device=ids.device)
    bag = ended(offsets[1:].to(torch.int64), position) - first
    keep = (bag >= 0) & (bag < bags) & (position >= offsets[0])
    # One bag more than there are collects everything that belongs to none of them.
    bag = torch.where(keep, bag, bags)
    feature = torch.where(keep, (bag + first) // max(batch, 1), 0)
    if any(value != NO_PADDING for value in padding):
        keep = keep & (ids != torch.tensor(list(padding), device=ids.device)[feature])
        bag = torch.where(keep, bag, bags)
    row = torch.where(keep, ids + torch.tensor(list(bases), device=ids.device)[feature], 0)
    found = widened(_rows(table, row))
    if weights is not None:
        found = found * weights.unsqueeze(-1)
    width = table.shape[1]
    if pooling == MAX:
        empty = found.new_full((bags + 1, width), float("-inf"))
        total = empty.scatter_reduce(0, bag.unsqueeze(-1).expand(-1, width), found, "amax")
        total = torch.where(_counts(bag, bags).unsqueeze(-1) > 0, total, 0)
    else:
        total = found.new_zeros((bags + 1, width)).index_add(0, bag, found)
        if pooling == MEAN:
            total = total / _counts(bag, bags).clamp(min=1).unsqueeze(-1)
    return total[:bags].view(len(features), batch, width).transpose(0, 1).to(table.dtype)


def _counts(bag: Tensor, bags: int) -> Tensor:
    return bag.new_zeros(bags + 1).index_add(0, bag, torch.ones_like(bag))


def widened(found: Tensor) -> Tensor:
    """float32 for the 16-bit types, in which sums would lose their small terms; anything else as it is."""
    return found.float() if found.dtype in (torch.float16, torch.bfloat16) else found


def _per_column(values: Sequence[int], lengths: Sequence[int], ids: Tensor) -> Tensor:
    """One value per feature to one per column of ids: [T]."""
    spread = [value for value, length in zip(values, lengths, strict=True) for _ in range(length)]
    return torch.tensor(spread, dtype=torch.int64, device=ids.device)
