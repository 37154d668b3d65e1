"""`grc_cuda::lookup` in Triton: look up, pool and concatenate all tables in one launch.

The output is cut into chunks of up to 16 bytes, and a thread owns whole chunks: writes are contiguous whatever the
widths of the tables, and no lane idles on the narrow ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.library import wrap_triton

from grc.kernels.dependent import ready
from grc.kernels.gpu_op import registering
from grc.kernels.rows import (
    ARENA,
    NO_PADDING,
    answer_dtype,
    bag,
    check,
    columns,
    fetch,
    layout,
    outside,
    pool,
    strides,
    table,
    tell,
    tl,
    triton,
)
from grc.kernels.ways import as_measured


class Config(NamedTuple):
    """Chunks of a program, and its warps: chunks / (32 * warps) reads are in flight in each thread."""

    chunks: int
    warps: int


# The first is taken where none was timed: on an H200 it is the fastest of large outputs, or within a tenth of that.
CONFIGS = (
    Config(512, 8),
    Config(64, 2),
    Config(128, 4),
    Config(256, 2),
    Config(256, 4),
    Config(512, 4),
    Config(1024, 4),
    Config(1024, 8),
)
# Rows of 8 and 4 bits have chunks of twice the columns.
PACKED_CONFIGS = (Config(128, 4), *(tile for tile in CONFIGS if tile != (128, 4)))


def tiles_of(given: Mapping[str, Any]) -> tuple[Config, ...]:
    """The tiles that a call may take: which is the fastest is timed where it will run."""
    return PACKED_CONFIGS if given["packing"] else CONFIGS


@triton.jit
def grc_lookup(  # type: ignore[no-untyped-def]
    arena, ids, offsets, weights, tables, out, told, B, V,
    id_row, id_step, weight_row, weight_step,
    F: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PITCH: tl.constexpr, VEC: tl.constexpr, ALIGN: tl.constexpr,
    ONE: tl.constexpr, JAGGED: tl.constexpr, WEIGHTED: tl.constexpr, PADDED: tl.constexpr,
    POOLING: tl.constexpr, UNROLL: tl.constexpr, CHUNKS: tl.constexpr, FORM: tl.constexpr, TOLD: tl.constexpr,
):  # fmt: skip
    begin = ready(tl.program_id(0)).to(tl.int64) * CHUNKS
    # 64-bit division once a program; the chunks divide small numbers by a constant.
    origin = begin // WIDTH
    local = (begin - origin * WIDTH).to(tl.int32) + tl.arange(0, CHUNKS)
    sample = origin + local // WIDTH
    chunk = local % WIDTH
    live = sample < B
    if COLUMNS > 0:
        feature = chunk // COLUMNS
        column = (chunk % COLUMNS) * VEC
    else:
        feature = tl.load(tables + 8 * F + chunk).to(tl.int32)
        column = chunk * VEC - tl.load(tables + 7 * F + feature).to(tl.int32)
    leading = column == 0
    ahead = column // 2 if FORM == 4 else column  # elements of the arena before this chunk of a row
    start = tl.load(tables + feature) + ahead
    scale = tl.load(tables + 6 * F + feature) - ahead if FORM > 0 else 0
    rows = tl.load(tables + F + feature)
    pitch = PITCH if PITCH > 0 else tl.load(tables + 2 * F + feature)
    padding = tl.load(tables + 3 * F + feature) if PADDED else 0
    if ONE:
        index = tl.load(ids + sample * id_row + feature * id_step, mask=live, other=0).to(tl.int64)
        wanted = live & (index != padding) if PADDED else live
        bad = (live & outside(index, rows, padding, PADDED)).to(tl.int32)
        value = fetch(arena, start, index, rows, pitch, scale, wanted, 0, VEC, VEC, ALIGN, FORM, 2)
    else:
        if JAGGED:
            first, count = bag(offsets, feature, sample, B, V, live)
        else:
            first = tl.load(tables + 4 * F + feature)
            count = tl.where(live, tl.load(tables + 5 * F + feature), 0)
        value, bad = pool(
            arena, ids, weights, sample * id_row + first * id_step, id_step,
            sample * weight_row + first * weight_step, weight_step, count,
            start, rows, pitch, scale, padding, 0, VEC,
            CHUNKS, VEC, ALIGN, FORM, 2, POOLING, PADDED, WEIGHTED, UNROLL,
        )  # fmt: skip
    if TOLD:
        tell(tl.where(leading, bad, 0), told)  # the chunks of one row read the same ids: the first one counts them
    place = (begin + tl.arange(0, CHUNKS)) * VEC
    tl.store(out + place[:, None] + tl.arange(0, VEC)[None, :], value.to(out.dtype.element_ty), mask=live[:, None])


def lists(
    arena: torch.Tensor,
    bases: Sequence[int],
    rows: Sequence[int],
    dims: Sequence[int],
    lengths: Sequence[int],
    padding: Sequence[int],
    packing: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """What the kernel reads of each feature, and for features of different widths of each chunk: its `tables`."""
    lies = layout(arena, bases, dims, packing)
    sizes = lengths or [0] * len(dims)
    values = (*lies.start, *rows, *lies.pitch, *padding, *columns(sizes), *sizes, *lies.scale)
    if len(set(dims)) == 1:
        return values
    owner = [f for f, dim in enumerate(dims) for _ in range(dim // lies.vec)]
    return (*values, *columns(dims), *owner)


def lookup(
    arena: torch.Tensor,
    ids: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    bases: list[int],
    rows: list[int],
    dims: list[int],
    lengths: list[int],
    pooling: int,
    padding: list[int],
    packing: list[int] | None = None,
    tables: torch.Tensor | None = None,
    told: torch.Tensor | None = None,
    tiles: list[int] | None = None,
) -> torch.Tensor:
    """Look up F features in their tables, pool each bag, and concatenate: [B, sum(dims)] in the arena's dtype.

    arena [R, D] or [E], float32, float16 or bfloat16, or bytes with their `packing`, all of 8 or all of 4 bits, which give
    float16; ids [B, sum(lengths)] of any strides, or [V] with offsets [F * B + 1]; int32 or int64. Ids outside their table
    read nothing and give rows of zeros; `told`, a `telling`, counts them. `tables` are this call's `lists` on the
    device; without them they are made here. `tiles` are those that were measured, as `as_measured` reads them. Raises
    LoweringError for an arena whose rows are not contiguous and for weights with a pooling other than sum.
    """
    check(arena, weights, pooling)
    count = len(dims)
    batch = ids.shape[0] if offsets is None else (offsets.shape[0] - 1) // count
    form, _, pitch, _, vec, align = layout(arena, bases, dims, packing)
    widths = [dim // vec for dim in dims]
    total = sum(widths)
    dtype = answer_dtype(arena)
    usual = (CONFIGS if form == ARENA else PACKED_CONFIGS)[0]
    uniform = len(set(dims)) == 1
    if tables is None:
        tables = table(lists(arena, bases, rows, dims, lengths, padding, packing), arena.device)
    out = arena.new_empty(batch, total * vec, dtype=dtype)
    id_row, id_step = strides(ids)
    weight_row, weight_step = (0, 0) if weights is None else strides(weights)
    for choice, asked in as_measured(batch, tiles, usual):
        wrap_triton(grc_lookup)[(triton.cdiv(batch * total, choice.chunks) * asked,)](
            arena, ids, ids if offsets is None else offsets.contiguous(), arena if weights is None else weights,
            tables, out, tables if told is None else told, batch, ids.shape[0], id_row, id_step, weight_row, weight_step,
            F=count, WIDTH=total, COLUMNS=widths[0] if uniform else 0, PITCH=pitch[0] if len(set(pitch)) == 1 else 0,
            VEC=vec, ONE=offsets is None and weights is None and set(lengths) == {1},
            JAGGED=offsets is not None, WEIGHTED=weights is not None, PADDED=any(p != NO_PADDING for p in padding),
            POOLING=pooling, UNROLL=4 if offsets is not None or max(lengths) > 2 else 2, CHUNKS=choice.chunks,
            FORM=form, ALIGN=align, TOLD=told is not None,
            num_warps=choice.warps,
        )  # fmt: skip
    return out


register = registering(lookup)
