"""`grc_cuda::bag_dot` in Triton: look up, pool, and take all pairwise dot products without writing the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.library import wrap_triton

from grc.kernels.bag_dot.integers import LARGEST, grc_byte_dot
from grc.kernels.bag_dot.triangle import triangle, write
from grc.kernels.dependent import ready
from grc.kernels.gpu_op import registering
from grc.kernels.rows import (
    INT4,
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
from grc.kernels.tiles import lanes
from grc.kernels.ways import as_measured


class Config(NamedTuple):
    """Programs at most, each of which takes samples one after another; its warps; columns of the rows held at once; and
    how many samples' rows are on their way into shared memory while one is multiplied."""

    programs: int
    warps: int
    block: int
    stages: int


# Of each of the three, the first is taken where none was timed.
CONFIGS = (
    Config(132 * 12, 1, 128, 3),
    Config(132 * 8, 1, 128, 3),
    Config(132 * 12, 1, 128, 5),
    Config(132 * 8, 2, 128, 3),
    Config(132 * 12, 2, 128, 3),
    Config(132 * 6, 2, 128, 7),
    Config(132 * 6, 4, 128, 3),
    Config(1 << 30, 1, 128, 1),
    Config(1 << 30, 4, 128, 1),
    Config(132 * 12, 1, 64, 3),
)
# In float32 wider blocks, or fewer warps, spill: the operands of all three passes are held at once.
FLOAT32_CONFIGS = (
    Config(1 << 30, 2, 32, 1),
    Config(1 << 30, 1, 32, 1),
    Config(132 * 8, 1, 32, 3),
    Config(132 * 8, 2, 32, 3),
    Config(132 * 4, 4, 64, 3),
    Config(1 << 30, 4, 64, 1),
)
# Fewer columns at once let more rows share a load and its addresses.
INTEGER_CONFIGS = (Config(132 * 12, 1, 64, 3), Config(132 * 12, 1, 64, 5), Config(132 * 16, 1, 32, 3))
# How float32 products are taken: "ieee" on the CUDA cores, or "tf32x3" in three passes of the tensor cores. Those split
# each factor into two tf32 numbers of 11 bits and leave out the product of the two lower ones, so that a sum is off by at
# most 2**-21 of the sum of its terms' sizes. On an H200, 26 features of 128: 2.7 times as fast, and nearer to float64
# than torch's own product; with few short rows torch is nearer.
FLOAT32 = "tf32x3"
TF32X3 = 2.0**-21
# Packed rows of one id a bag are multiplied as integers where there are so many of them, of so many columns: with fewer,
# to unpack them takes fewer instructions than what follows their product. Sums of the most columns still fit in 32 bits.
LEAST_ROWS, LEAST_COLUMNS, MOST_COLUMNS = 17, 64, 2**17 - 1
INTEGERS, FIXED = 2.0**-19, 1.0 / LARGEST.value  # what these products may lose: see `bag_dot`


def tiles_of(given: Mapping[str, Any]) -> tuple[Config, ...]:
    """The tiles that a call may take: which is the fastest is timed where it will run."""
    if by_integers(given["arena"], **{name: given[name] for name in CALL}):
        return INTEGER_CONFIGS
    return FLOAT32_CONFIGS if answer_dtype(given["arena"]) is torch.float32 else CONFIGS


CALL = ("offsets", "weights", "dense", "bases", "dim", "lengths", "packing")


def by_integers(
    arena: torch.Tensor,
    offsets: Any,
    weights: Any,
    dense: Any,
    bases: Sequence[int],
    dim: int,
    lengths: Sequence[int],
    packing: Sequence[int] | None,
) -> bool:
    """Whether rows of 8 or 4 bits are multiplied as integers, for which there must be enough of them.

    For an id that has no row that kernel reads the arena's first bytes, so there must be some.
    """
    if not packing or offsets is not None or weights is not None or set(lengths) != {1}:
        return False
    nodes, pitch = len(bases) + (dense is not None), layout(arena, bases, [dim] * len(bases), packing).pitch[0]
    return nodes >= LEAST_ROWS and LEAST_COLUMNS <= dim <= MOST_COLUMNS and arena.numel() >= pitch


@triton.jit
def grc_bag_dot(  # type: ignore[no-untyped-def]
    arena, ids, offsets, weights, dense, tables, out, told, B, V,
    id_row, id_step, weight_row, weight_step, dense_row, dense_step,
    F: tl.constexpr, D: tl.constexpr, PITCH: tl.constexpr, SCALE: tl.constexpr, ALIGN: tl.constexpr, FORM: tl.constexpr,
    PAIRS: tl.constexpr, WIDTH: tl.constexpr,
    DENSE: tl.constexpr, IN_PLACE: tl.constexpr, KEEP: tl.constexpr, UPPER: tl.constexpr, DIAGONAL: tl.constexpr,
    ONE: tl.constexpr, JAGGED: tl.constexpr, WEIGHTED: tl.constexpr, PADDED: tl.constexpr, POOLING: tl.constexpr,
    P: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, TOLD: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = F + DENSE
    HEAD: tl.constexpr = D if KEEP else 0
    # Columns of 4 bits that share a byte: a product of rows is the sum of that of their first and of their second ones.
    SHARED: tl.constexpr = 2 if FORM == 4 else 1
    n = tl.arange(0, P)
    feature = n - DENSE
    known = (feature >= 0) & (feature < F)
    start = tl.load(tables + feature, mask=known, other=0)
    rows = tl.load(tables + F + feature, mask=known, other=0)
    padding = tl.load(tables + 2 * F + feature, mask=known, other=0) if PADDED else 0
    i = n[:, None]
    pair, chosen = triangle(n, N, UPPER, DIAGONAL)
    bad = tl.zeros([P], tl.int32)
    for at in tl.range(ready(tl.program_id(0)), B, tl.num_programs(0), num_stages=STAGES):
        sample = tl.full([], 0, tl.int64) + at
        line = out + sample * WIDTH
        if ONE:
            index = tl.load(ids + sample * id_row + feature * id_step, mask=known, other=0).to(tl.int64)
            wanted = known & (index != padding) if PADDED else known
            sound = wanted & (index >= 0) & (index < rows)
            bad += (known & outside(index, rows, padding, PADDED)).to(tl.int32)
        elif JAGGED:
            first, count = bag(offsets, feature, sample, B, V, known)
        else:
            first = tl.load(tables + 3 * F + feature, mask=known, other=0)
            count = tl.load(tables + 4 * F + feature, mask=known, other=0)
        gram = tl.zeros([P, P], tl.float32)
        for step in tl.static_range(0, D, BLOCK * SHARED):
            for part in tl.static_range(SHARED):
                left = step // SHARED
                inner = left + tl.arange(0, BLOCK)
                column = inner * SHARED + part
                inside = inner < D // SHARED
                if ONE and FORM == 0 and (IN_PLACE or not DENSE):
                    offset = tl.multiple_of(start + index * PITCH, ALIGN)
                    place = arena + offset[:, None] + column[None, :]
                    if DENSE:
                        # The dense row is one more row to fetch: nothing stands between the loads and the product.
                        place = tl.where(i == 0, (dense + sample * dense_row + column)[None, :], place)
                        tile = tl.load(place, mask=(sound | (n == 0))[:, None] & inside[None, :], other=0.0)
                    else:
                        tile = tl.load(place, mask=sound[:, None] & inside[None, :], other=0.0)
                else:
                    if ONE:
                        found = fetch(
                            arena, start, index, rows, PITCH, SCALE, wanted, left, D // SHARED, BLOCK, ALIGN, FORM, part
                        )
                        tile = found.to(out.dtype.element_ty)
                    else:
                        pooled, met = pool(
                            arena, ids, weights, sample * id_row + first * id_step, id_step,
                            sample * weight_row + first * weight_step, weight_step, count,
                            start, rows, PITCH, SCALE, padding, left, D // SHARED,
                            P, BLOCK, ALIGN, FORM, part, POOLING, PADDED, WEIGHTED, 1,
                        )  # fmt: skip
                        tile = pooled.to(out.dtype.element_ty)
                        if step + part == 0:
                            bad += met
                    if DENSE:
                        head = tl.load(dense + sample * dense_row + column * dense_step, mask=inside, other=0.0)
                        if FORM > 0:  # row 0 holds zeros; a choice takes elements one by one, a product two at once
                            tile += (i == 0).to(tl.float16) * head.to(tl.float16)[None, :]
                        else:
                            tile = tl.where(i == 0, head.to(out.dtype.element_ty)[None, :], tile)
                if KEEP:
                    head = tl.load(dense + sample * dense_row + column * dense_step, mask=inside, other=0.0)
                    tl.store(line + column, head.to(out.dtype.element_ty), mask=inside)
                gram = tl.dot(tile, tl.trans(tile), gram, input_precision=PRECISION)
        write(line, pair + HEAD, chosen, gram, HEAD + PAIRS, REST, WIDTH)
    if TOLD:
        tell(bad, told)


def lists(
    arena: torch.Tensor,
    bases: Sequence[int],
    rows: Sequence[int],
    dim: int,
    lengths: Sequence[int],
    padding: Sequence[int],
    packing: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """What the kernel reads of each feature: its `tables`."""
    sizes = lengths or [0] * len(bases)
    start = layout(arena, bases, [dim] * len(bases), packing).start
    return (*start, *rows, *padding, *columns(sizes), *sizes)


def bag_dot(
    arena: torch.Tensor,
    ids: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    dense: torch.Tensor | None,
    bases: list[int],
    rows: list[int],
    dim: int,
    lengths: list[int],
    pooling: int,
    padding: list[int],
    upper: bool,
    diagonal: bool,
    keep_dense: bool,
    packing: list[int] | None = None,
    tables: torch.Tensor | None = None,
    told: torch.Tensor | None = None,
    tiles: list[int] | None = None,
    width: int = 0,
) -> torch.Tensor:
    """All pairs of T = [dense; pooled rows]: [B, pairs], or [B, dim + pairs] if keep_dense (DLRM; Naumov et al. 2019).

    arena [R, dim] or [E], float32, float16 or bfloat16, or bytes with their `packing`, all of 8 or all of 4 bits, which
    give float16; ids [B, sum(lengths)] of any strides, or [V] with offsets [F * B + 1]; dense [B, dim]. The strict lower
    triangle in row-major order, or with `upper` the upper one, with `diagonal` the diagonal too. Sums in float32; pooled
    rows are rounded to the answer's dtype, as in plain torch; a float32 result is within TF32X3 of |T| @ |T|^T. Ids
    outside their table give rows of zeros; `told`, a `telling`, counts them.
    Rows of 8 or 4 bits are multiplied as integers where that is less work (LEAST_ROWS, LEAST_COLUMNS): before it is rounded
    to float16, the product of two is then within INTEGERS * dim of that of the largest sizes that their scales and offsets
    can give. The dense row is taken in steps of FIXED of its largest size, and gives NaN if it is not finite.
    `tables` are this call's `lists` on the device; without them they are made here. `tiles` are those that were measured,
    as `as_measured` reads them. With `width`, columns of zeros follow up to it: rows that begin on 16 bytes are stored, and
    read by a product, in whole vectors. Raises LoweringError for an arena whose rows are not contiguous and for weights
    with a pooling other than sum.
    """
    check(arena, weights, pooling)
    count = len(bases)
    batch = ids.shape[0] if offsets is None else (offsets.shape[0] - 1) // count
    form, _, pitch, scale, _, align = layout(arena, bases, [dim] * count, packing)
    dtype = answer_dtype(arena)
    has_dense = dense is not None
    keep = keep_dense and has_dense
    nodes = count + has_dense
    one = offsets is None and weights is None and set(lengths) == {1}
    integers = by_integers(arena, offsets, weights, dense, bases, dim, lengths, packing)
    usual = (INTEGER_CONFIGS if integers else FLOAT32_CONFIGS if dtype is torch.float32 else CONFIGS)[0]
    pairs = nodes * (nodes + 1 if diagonal else nodes - 1) // 2
    head = dim if keep else 0
    width = max(width, pairs + head)
    out = arena.new_empty(batch, width, dtype=dtype)
    id_row, id_step = strides(ids)
    weight_row, weight_step = (0, 0) if weights is None else strides(weights)
    dense_row, dense_step = (0, 0) if dense is None else strides(dense)
    if tables is None:
        tables = table(lists(arena, bases, rows, dim, lengths, padding, packing), arena.device)
    size = lanes(nodes)
    rest = triton.next_power_of_2(width - head - pairs) if width > head + pairs else 0
    padded = any(p != NO_PADDING for p in padding)
    widest = triton.next_power_of_2(dim // (2 if form == INT4 else 1))
    for choice, asked in as_measured(batch, tiles, usual):
        grid, block = (torch.sym_min(batch, choice.programs) * asked,), min(choice.block, widest)
        if integers:
            wrap_triton(grc_byte_dot)[grid](
                arena, ids, arena if dense is None else dense, tables, out, tables if told is None else told, batch,
                id_row, id_step, dense_row, dense_step,
                F=count, D=dim, PITCH=pitch[0], SCALE=scale[0], ALIGN=align, FORM=form, PAIRS=pairs, WIDTH=width,
                DENSE=int(has_dense), KEEP=keep, UPPER=upper, DIAGONAL=diagonal, PADDED=padded,
                P=max(32, size), REST=rest, K=max(32, block), STAGES=choice.stages, TOLD=told is not None,
                num_warps=max(choice.warps, size // 32),
            )  # fmt: skip
        else:
            wrap_triton(grc_bag_dot)[grid](
                arena, ids, ids if offsets is None else offsets.contiguous(), arena if weights is None else weights,
                arena if dense is None else dense, tables, out, tables if told is None else told, batch, ids.shape[0],
                id_row, id_step, weight_row, weight_step, dense_row, dense_step,
                F=count, D=dim, PITCH=pitch[0], SCALE=scale[0], ALIGN=align, FORM=form, PAIRS=pairs, WIDTH=width,
                DENSE=int(has_dense), KEEP=keep, UPPER=upper, DIAGONAL=diagonal,
                IN_PLACE=dense is not None and dense.dtype == arena.dtype and dense_step == 1,
                ONE=one, JAGGED=offsets is not None, WEIGHTED=weights is not None, PADDED=padded,
                POOLING=pooling, P=size, REST=rest, BLOCK=max(16, block), STAGES=choice.stages,
                PRECISION=FLOAT32 if dtype == torch.float32 else "ieee", TOLD=told is not None, num_warps=choice.warps,
            )  # fmt: skip
    return out


register = registering(bag_dot)
