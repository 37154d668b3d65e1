"""`grc_cuda::bag_fm` in Triton: look up, and sum all second-order interactions while the rows are in registers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.library import wrap_triton

from grc.errors import LoweringError
from grc.kernels.dependent import ready
from grc.kernels.gpu_op import registering
from grc.kernels.rows import NO_PADDING, answer_dtype, check, fetch, layout, outside, strides, table, tell, tl, triton
from grc.kernels.ways import as_measured


class Config(NamedTuple):
    """Samples that a program takes one after another, and its warps."""

    samples: int
    warps: int


# The first is taken where none was timed: the fastest at every batch on an H200 for 26 features of 128.
CONFIGS = (Config(1, 1), Config(1, 2), Config(1, 4), Config(2, 1), Config(2, 2), Config(4, 1), Config(4, 2))


def tiles_of(given: Mapping[str, Any]) -> tuple[Config, ...]:
    """The tiles that a call may take: which is the fastest is timed where it will run."""
    return CONFIGS


@triton.jit
def grc_bag_fm(  # type: ignore[no-untyped-def]
    arena, linear, ids, tables, rows_out, fm_out, told, B, id_row, id_step,
    F: tl.constexpr, D: tl.constexpr, PITCH: tl.constexpr, SCALE: tl.constexpr, FORM: tl.constexpr, ALIGN: tl.constexpr,
    LINEAR_PITCH: tl.constexpr,
    LINEAR: tl.constexpr, SUMMED: tl.constexpr, KEEP: tl.constexpr, PADDED: tl.constexpr, TOLD: tl.constexpr,
    P: tl.constexpr, BLOCK: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    feature = tl.arange(0, P)
    known = feature < F
    start = tl.load(tables + feature, mask=known, other=0)
    rows = tl.load(tables + F + feature, mask=known, other=0)
    padding = tl.load(tables + 2 * F + feature, mask=known, other=0) if PADDED else 0
    bad = tl.zeros([P], tl.int32)
    program = ready(tl.program_id(0)).to(tl.int64)
    for s in tl.static_range(SAMPLES):
        sample = program * SAMPLES + s
        live = known & (sample < B)
        index = tl.load(ids + sample * id_row + feature * id_step, mask=live, other=0).to(tl.int64)
        wanted = live & (index != padding) if PADDED else live
        bad += (live & outside(index, rows, padding, PADDED)).to(tl.int32)
        fm = tl.full([], 0.0, tl.float32)
        for at in tl.static_range(0, D, BLOCK):
            column = at + tl.arange(0, BLOCK)
            inside = column < D
            found = fetch(arena, start, index, rows, PITCH, SCALE, wanted, at, D, BLOCK, ALIGN, FORM, 2)
            tile = found.to(rows_out.dtype.element_ty)
            place = sample * (F * D) + feature[:, None] * D + column[None, :]
            if KEEP:
                tl.store(rows_out + place, tile, mask=live[:, None] & inside[None, :])
            wide = tile.to(tl.float32)
            total = tl.sum(wide, 0)
            second = total * total - tl.sum(wide * wide, 0)
            if SUMMED:
                fm += 0.5 * tl.sum(second, 0)
            else:
                place = sample * D + column
                tl.store(fm_out + place, (0.5 * second).to(fm_out.dtype.element_ty), mask=inside & (sample < B))
        if LINEAR:
            first = tl.load(tables + 3 * F + feature, mask=known, other=0)
            sound = wanted & (index >= 0) & (index < rows)
            term = tl.load(linear + (first + index) * LINEAR_PITCH, mask=sound, other=0.0)
            fm += tl.sum(term.to(tl.float32), 0)
        if SUMMED:
            tl.store(fm_out + sample, fm.to(fm_out.dtype.element_ty), mask=sample < B)
    if TOLD:
        tell(bad, told)


def lists(
    arena: torch.Tensor,
    bases: Sequence[int],
    rows: Sequence[int],
    dim: int,
    padding: Sequence[int],
    packing: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """What the kernel reads of each feature: its `tables`."""
    return (*layout(arena, bases, [dim] * len(bases), packing).start, *rows, *padding, *bases)


def bag_fm(
    arena: torch.Tensor,
    linear: torch.Tensor | None,
    ids: torch.Tensor,
    bases: list[int],
    rows: list[int],
    dim: int,
    padding: list[int],
    packing: list[int] | None = None,
    summed: bool = True,
    keep: bool = True,
    tables: torch.Tensor | None = None,
    told: torch.Tensor | None = None,
    tiles: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [B, F * dim], their factorisation machine [B, 1] (Rendle 2010; DeepFM, Guo et al. 2017), or without `summed`
    their bi-interaction pooling [B, dim] (He & Chua 2017). Without `keep` the rows are [B, 0].

    arena [R, dim], float32, float16 or bfloat16, or bytes with their `packing`, all of 8 or all of 4 bits, which give
    float16; linear [R] or [R, 1]; ids [B, F] of any strides, int32 or int64. The sums are taken in float32. Ids outside
    their table read nothing and give zeros; `told`, a `telling`, counts them. `tables` are this call's `lists` on the
    device; without them they are made here. `tiles` are those that were measured, as `as_measured` reads them. Raises
    LoweringError for an arena whose rows are not contiguous, and for linear weights beside a 1-D arena, whose bases don't
    count rows, or beside a machine that is not summed.
    """
    check(arena, None, 0)
    if linear is not None and arena.dim() != 2 and not packing:
        raise LoweringError("linear weights are numbered by rows, and a 1-D arena counts elements", "use a 2-D arena")
    if linear is not None and not summed:
        raise LoweringError("a linear term belongs to the sum over the width", "sum, or leave out linear")
    count = len(bases)
    batch = ids.shape[0]
    form, _, pitch, scale, _, align = layout(arena, bases, [dim] * count, packing)
    dtype = answer_dtype(arena)
    flat = arena.new_empty(batch, count * dim if keep else 0, dtype=dtype)
    fm = arena.new_empty(batch, 1 if summed else dim, dtype=dtype)
    id_row, id_step = strides(ids)
    if tables is None:
        tables = table(lists(arena, bases, rows, dim, padding, packing), arena.device)
    for choice, asked in as_measured(batch, tiles, CONFIGS[0]):
        wrap_triton(grc_bag_fm)[(triton.cdiv(batch, choice.samples) * asked,)](
            arena, arena if linear is None else linear, ids, tables, flat, fm,
            tables if told is None else told, batch, id_row, id_step,
            F=count, D=dim, PITCH=pitch[0], SCALE=scale[0], FORM=form,
            LINEAR_PITCH=0 if linear is None else linear.stride(0), ALIGN=align, LINEAR=linear is not None,
            SUMMED=summed, KEEP=keep,
            PADDED=any(p != NO_PADDING for p in padding), TOLD=told is not None,
            P=triton.next_power_of_2(count), BLOCK=min(128, triton.next_power_of_2(dim)), SAMPLES=choice.samples,
            num_warps=choice.warps,
        )  # fmt: skip
    return flat, fm


register = registering(bag_fm)
