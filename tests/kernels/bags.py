"""Cases of the look-up kernels, and their float64 oracle: plain loops over bags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from grc.kernels.lookup.row_formats import LINE, pack_table, packing, rounded_rows, row_bytes
from grc.runtime.mapped import telling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_PADDING = -(2**63)


@dataclass(frozen=True)
class Bags:
    """Tables and ids of one case; `lengths` None makes jagged bags of 0 to 4 ids."""

    dims: tuple[int, ...] = (8, 8, 8)
    lengths: tuple[int, ...] | None = (1, 1, 1)
    rows: tuple[int, ...] = (11, 7, 30)
    pooling: int = 0
    padding: tuple[int, ...] = (NO_PADDING,) * 3
    batch: int = 5
    index: torch.dtype = torch.int64
    strided: bool = False
    weighted: bool = False
    bad: bool = False
    flat: bool = False
    pitch: int = 0


LOOKUPS = {
    "plain": Bags(),
    "int32": Bags(index=torch.int32),
    "strided": Bags(strided=True, index=torch.int32),
    "odd width": Bags(dims=(5, 5, 5)),
    "width 48": Bags(dims=(48, 48, 48)),
    "mixed widths": Bags(dims=(4, 16, 8), flat=True),
    "mixed odd widths": Bags(dims=(3, 17, 8), flat=True),
    "mixed widths pooled": Bags(dims=(4, 16, 8), flat=True, lengths=(2, 5, 1), pooling=1),
    "wide rows": Bags(pitch=12),
    "padding": Bags(padding=(3, 0, NO_PADDING)),
    "padding -1": Bags(padding=(-1, -1, -1), lengths=(2, 3, 1), pooling=1),
    "bad ids": Bags(bad=True),
    "bad ids int32": Bags(bad=True, index=torch.int32),
    "bad ids where one table has padding": Bags(bad=True, padding=(NO_PADDING, 0, 3)),
    "sum": Bags(lengths=(3, 1, 6)),
    "mean": Bags(lengths=(3, 1, 6), pooling=1, padding=(3, 0, 2), strided=True),
    "max": Bags(lengths=(3, 2, 6), pooling=2, padding=(3, 0, 2)),
    "weights": Bags(lengths=(3, 1, 6), weighted=True, strided=True),
    "jagged": Bags(lengths=None),
    "jagged int32": Bags(lengths=None, index=torch.int32, pooling=1, padding=(3, 0, 2)),
    "jagged max": Bags(lengths=None, pooling=2),
    "jagged weights": Bags(lengths=None, weighted=True),
    "jagged mixed": Bags(lengths=None, dims=(4, 16, 8), flat=True, pooling=2, padding=(3, 0, 2)),
    "batch 1": Bags(batch=1),
    "batch 0": Bags(batch=0),
    "jagged batch 0": Bags(batch=0, lengths=None),
    "many programs": Bags(batch=65, dims=(16, 16, 16)),
}
DOTS = {name: case for name, case in LOOKUPS.items() if len(set(case.dims)) == 1}
FMS = {name: case for name, case in DOTS.items() if case.lengths == (1, 1, 1)}


def make(case: Bags, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """The arguments that all look-ups share."""
    g = torch.Generator().manual_seed(seed)
    pitch = case.pitch or case.dims[0]
    if case.flat:
        sizes = [r * d for r, d in zip(case.rows, case.dims, strict=True)]
        bases = [16 + sum(sizes[:f]) for f in range(len(sizes))]
        arena = torch.randn(16 + sum(sizes), generator=g)
    else:
        bases = [2 + sum(case.rows[:f]) for f in range(len(case.rows))]
        arena = torch.randn(2 + sum(case.rows), pitch, generator=g)
    arena = arena.to(DEVICE, dtype)
    features = len(case.rows)
    if case.lengths is None:
        counts = torch.randint(0, 5, (features, case.batch), generator=g)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.flatten().cumsum(0)])
        parts = [torch.randint(0, case.rows[f], (int(counts[f].sum()),), generator=g) for f in range(features)]
        ids = torch.cat(parts)
    else:
        offsets = None
        shapes = zip(case.rows, case.lengths, strict=True)
        parts = [torch.randint(0, size, (case.batch, length), generator=g) for size, length in shapes]
        ids = torch.cat(parts, 1)
        for f in range(features):
            if case.padding[f] != NO_PADDING and case.batch > 2:
                column = sum(case.lengths[:f])
                ids[0, column : column + case.lengths[f]] = case.padding[f]
                ids[1, column] = case.padding[f]
        if case.bad:
            ids[0, 0], ids[1, 1], ids[2, 2], ids[3, 0] = -1, case.rows[1], 2**31 - 1, -(2**31)
            ids[4, 0] = NO_PADDING if case.index == torch.int64 else -(2**31)
    weights = torch.randn(ids.shape, generator=g).to(DEVICE, dtype) if case.weighted else None
    ids = ids.to(DEVICE, case.index)
    if case.strided:
        ids = torch.stack([ids, ids.flip(0)], 2).transpose(0, 1).contiguous().transpose(0, 1)[:, :, 0]
        assert not ids.is_contiguous()
    return {
        "arena": arena[:, : case.dims[0]] if case.pitch else arena,
        "ids": ids,
        "offsets": None if offsets is None else offsets.to(DEVICE, case.index),
        "weights": weights,
        "bases": bases,
        "rows": list(case.rows),
        "dims": list(case.dims),
        "lengths": list(case.lengths or ()),
        "pooling": case.pooling,
        "padding": list(case.padding),
    }


def packed(a: dict[str, Any], form: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The arguments with an arena of bytes, with the values that its rows stand for in float32, and with the largest of
    each row in all its columns: what an offset and a multiple of the scale, both float16, may be rounded by."""
    arena, starts, parts, end = a["arena"].cpu(), [], [], 0
    exact, sizes = arena.clone(), arena.clone()
    for base, size, dim in zip(a["bases"], a["rows"], a["dims"], strict=True):
        own = slice(base, base + size) if arena.dim() == 2 else slice(base, base + size * dim)
        table = arena[own].reshape(size, dim)
        exact[own] = rounded_rows(table, form).view_as(exact[own])
        sizes[own] = table.abs().amax(1, keepdim=True).expand_as(table).reshape(exact[own].shape)
        length = -(-size * row_bytes(form, dim) // LINE) * LINE
        out = torch.full((length,), 255, dtype=torch.uint8)
        pack_table(table, form, out[: size * row_bytes(form, dim)])
        starts.append(end)
        parts.append(out)
        end += length
    bytes_ = torch.cat(parts).to(DEVICE)
    where = packing([form] * len(starts), starts)
    return {**a, "arena": bytes_, "packing": where}, {**a, "arena": exact}, {**a, "arena": sizes}


def pooled(a: dict[str, Any], absolute: bool = False) -> list[torch.Tensor]:
    """F tensors [B, dims[f]] in float64; `absolute` sums magnitudes, to bound the rounding."""
    arena = a["arena"].double().cpu()
    ids, weights = a["ids"].long().cpu(), a["weights"]
    weights = None if weights is None else weights.double().cpu()
    features = len(a["rows"])
    batch = ids.shape[0] if a["offsets"] is None else (a["offsets"].numel() - 1) // features
    outs = []
    for f, (base, size, dim) in enumerate(zip(a["bases"], a["rows"], a["dims"], strict=True)):
        table = arena[base : base + size] if arena.dim() == 2 else arena[base : base + size * dim].view(size, dim)
        out = torch.zeros(batch, dim, dtype=torch.float64)
        for b in range(batch):
            if a["offsets"] is None:
                at = sum(a["lengths"][:f])
                where: Any = (b, slice(at, at + a["lengths"][f]))
            else:
                where = slice(int(a["offsets"][f * batch + b]), int(a["offsets"][f * batch + b + 1]))
            bag = ids[where]
            kept = bag != a["padding"][f]
            known = (bag >= 0) & (bag < size)
            got = torch.where(known[:, None], table[bag.clamp(0, size - 1)], 0.0)
            if weights is not None:
                got = got * weights[where][:, None]
            got = (got.abs() if absolute else got)[kept]
            if len(got):
                out[b] = (got.sum(0), got.mean(0), got.amax(0))[a["pooling"]]
        outs.append(out)
    return outs


def counted(op: Any, *values: Any, **more: Any) -> tuple[Any, int]:
    """A call's answer, and how many bad ids its kernels told of."""
    counter = torch.zeros(1, dtype=torch.int64, pin_memory=DEVICE == "cuda")
    answer = op(*values, told=telling(counter).to(DEVICE), **more)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return answer, int(counter)


def outside(a: dict[str, Any]) -> int:
    """How many ids of all bags are neither in their table nor its padding."""
    ids, found = a["ids"].long().cpu(), 0
    batch = ids.shape[0] if a["offsets"] is None else (a["offsets"].numel() - 1) // len(a["rows"])
    for f, (size, padding) in enumerate(zip(a["rows"], a["padding"], strict=True)):
        if a["offsets"] is None:
            at = sum(a["lengths"][:f])
            bags = ids[:, at : at + a["lengths"][f]]
        else:
            bags = ids[int(a["offsets"][f * batch]) : int(a["offsets"][(f + 1) * batch])]
        beyond = (bags < 0) | (bags >= size)
        found += int((beyond & ((bags != padding) | (bags == NO_PADDING))).sum())
    return found


def close(out: torch.Tensor, want: torch.Tensor, magnitude: torch.Tensor, rounds: float = 2.0) -> None:
    """Within `rounds` roundings to the output's dtype of the sum of magnitudes."""
    assert out.shape == want.shape
    error = (out.double().cpu() - want).abs()
    bound = rounds * torch.finfo(out.dtype).eps * magnitude + 1e-30
    assert bool((error <= bound).all()), f"worst {(error / bound).max():.3g} of the bound"


def triangle(products: torch.Tensor, upper: bool, diagonal: bool) -> torch.Tensor:
    """One triangle of [B, N, N], row by row."""
    n = products.shape[1]
    i, j = torch.triu_indices(n, n, 0 if diagonal else 1) if upper else torch.tril_indices(n, n, 0 if diagonal else -1)
    return products[:, i, j]


def pairs(nodes: torch.Tensor, upper: bool, diagonal: bool) -> torch.Tensor:
    return triangle(nodes @ nodes.transpose(1, 2), upper, diagonal)
