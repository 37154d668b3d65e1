"""Look up, pool and concatenate the bags of many features in one pass over one arena."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from grc.kernels.fusion import Cost, FusedOp
from grc.kernels.lookup.cases import CASES
from grc.kernels.lookup.pooling import pooled_rows


def reference(
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
) -> Tensor:
    """Pooled rows of every feature side by side: [B, sum(dims)] in the arena's dtype.

    The arena is [R, D] with bases in rows, or [E] with bases in elements; ids are [B, sum(lengths)], or [V] with
    feature-major offsets [F * B + 1] (the order of TorchRec's KeyedJaggedTensor). Of an arena of bytes [E], `packing`
    gives the format and the first byte of each feature's table, and the result is float32.
    """
    bags = pooled_rows(arena, ids, offsets, weights, bases, rows, dims, lengths, pooling, padding, packing)
    return torch.cat([bag.flatten(1) for bag in bags], 1) if len(bags) > 1 else bags[0].flatten(1)


def cost(arena: Tensor, ids: Tensor, *rest: object) -> Cost:
    """Every row read once, every output written once; pooling adds once per element read."""
    bases, dims, lengths = rest[2], rest[4], rest[5]
    assert isinstance(bases, (list, tuple)) and isinstance(dims, (list, tuple)) and isinstance(lengths, (list, tuple))
    samples = ids.shape[0] if lengths else (rest[0].shape[0] - 1) // len(bases)  # type: ignore[attr-defined]
    read = sum(d * n for d, n in zip(dims, lengths, strict=True)) * samples if lengths else ids.numel() * max(dims)
    written = samples * sum(dims)
    return Cost((read + written) * arena.element_size() + ids.numel() * ids.element_size(), read)


LOOKUP = FusedOp(
    schema=(
        "lookup(Tensor arena, Tensor ids, Tensor? offsets, Tensor? weights, int[] bases, int[] rows, int[] dims, "
        "int[] lengths, int pooling, int[] padding, int[] packing=[]) -> Tensor"
    ),
    reference=reference,
    cpu=Path(__file__).parent / "cpu.cpp",
    cost=cost,
    cases=CASES,
)
