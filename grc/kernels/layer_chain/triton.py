"""`grc_cuda::layer_chain` in Triton: a chain of narrow layers in one launch, its values in registers all the way.

Every program takes a block of rows through all steps, which are compiled in, and reads every weight once, from L2: a weight
of 128 columns takes about as long as the launch that it saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.library import wrap_triton

from grc.kernels import layer_chain as kinds
from grc.kernels.dependent import ready
from grc.kernels.gpu_op import registering
from grc.kernels.layer_chain import decode, outputs
from grc.kernels.rows import tl, triton
from grc.kernels.small_linear.triton import activate
from grc.kernels.ways import by_count

# The fastest on an H200 for 200 to 25,600 rows. A wide layer at the end is shared by several programs, as long as that many
# fit on the device at once.
FEW, SOME = 1024, 4800  # rows up to which programs have 16 of them, and up to which those of 64 share a wide layer
NARROW = 4096  # rows up to which programs have 16 of them where no layer is wide
BLOCK = tl.constexpr(128)  # columns of a wide layer at a time

INPUT = tl.constexpr(kinds.INPUT)
LINEAR = tl.constexpr(kinds.LINEAR)
WIDE = tl.constexpr(kinds.WIDE)
NORM = tl.constexpr(kinds.NORM)
ACTIVATION = tl.constexpr(kinds.ACTIVATION)
ADD = tl.constexpr(kinds.ADD)
MUL = tl.constexpr(kinds.MUL)
ROW = tl.constexpr(kinds.ROW)
UNEQUAL = tl.constexpr(kinds.UNEQUAL)
COLUMN_ADD = tl.constexpr(kinds.COLUMN_ADD)
COLUMN_MUL = tl.constexpr(kinds.COLUMN_MUL)
SHIFT = tl.constexpr(kinds.SHIFT)
SCALE = tl.constexpr(kinds.SCALE)
PRELU = tl.constexpr(kinds.PRELU)
OUTPUT = tl.constexpr(kinds.OUTPUT)


class Config(NamedTuple):
    """Rows of a program, and how many programs take the same rows."""

    rows: int
    shares: int


@triton.jit
def share(SHARES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which of the programs for the same rows this is."""
    return tl.program_id(0) % SHARES


@triton.jit
def vector(vectors, PLACE: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(vectors + PLACE + tl.arange(0, LANES))[None, :]


@triton.jit
def product(  # type: ignore[no-untyped-def]
    v, weights, vectors, AT: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr, BIAS: tl.constexpr,
    first, N: tl.constexpr,
):  # fmt: skip
    """Columns first .. first + N - 1 of v @ W + bias, in float32."""
    column = first + tl.arange(0, N)
    weight = tl.load(weights + AT + tl.arange(0, K)[:, None] * LANES + column[None, :])
    total = tl.dot(v.to(weight.dtype), weight)
    if BIAS >= 0:
        total += vector(vectors + first, BIAS, N)
    return total


@triton.jit
def norm(  # type: ignore[no-untyped-def]
    v, vectors, N: tl.constexpr, LANES: tl.constexpr, EPS: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr
):  # fmt: skip
    inside = (tl.arange(0, LANES) < N)[None, :]
    mean = tl.sum(tl.where(inside, v, 0.0), 1)[:, None] / N
    centred = tl.where(inside, v - mean, 0.0)
    spread = tl.sum(centred * centred, 1)[:, None] / N
    value = centred * tl.rsqrt(spread + EPS)
    if SCALE >= 0:
        value *= vector(vectors, SCALE, LANES)
    if SHIFT >= 0:
        value += vector(vectors, SHIFT, LANES)
    return value


@triton.jit
def value_of(  # type: ignore[no-untyped-def]
    CODE: tl.constexpr, AT: tl.constexpr, values, inputs, pitches, weights, vectors, row, live
):  # fmt: skip
    """The value [ROWS, lanes] that step AT adds, in float32."""
    if CODE[AT][0] == INPUT:
        column = tl.arange(0, CODE[AT][3])
        seen = live[:, None] & (column < CODE[AT][2])[None, :]
        place = inputs[CODE[AT][1]] + row[:, None] * pitches[CODE[AT][1]] + column[None, :]
        return tl.load(place, mask=seen, other=0.0).to(tl.float32)
    elif CODE[AT][0] == LINEAR:
        return product(
            values[CODE[AT][1]], weights, vectors, CODE[AT][2], CODE[AT][3], CODE[AT][5], CODE[AT][6], 0, CODE[AT][5]
        )
    elif CODE[AT][0] == NORM:
        return norm(values[CODE[AT][1]], vectors, CODE[AT][2], CODE[AT][3], CODE[AT][4], CODE[AT][5], CODE[AT][6])
    elif CODE[AT][0] == ACTIVATION:
        return activate(values[CODE[AT][1]], CODE[AT][2])
    elif CODE[AT][0] == ADD:
        return values[CODE[AT][1]] + values[CODE[AT][2]]
    elif CODE[AT][0] == MUL:
        return values[CODE[AT][1]] * values[CODE[AT][2]]
    elif CODE[AT][0] == ROW:
        number = tl.load(inputs[CODE[AT][2]] + row * pitches[CODE[AT][2]], mask=live, other=0)
        return values[CODE[AT][1]] * number.to(tl.float32)[:, None]
    elif CODE[AT][0] == UNEQUAL:
        number = tl.load(inputs[CODE[AT][2]] + row * pitches[CODE[AT][2]], mask=live, other=0)
        return values[CODE[AT][1]] * (number != CODE[AT][3]).to(tl.float32)[:, None]
    elif CODE[AT][0] == COLUMN_ADD:
        return values[CODE[AT][1]] + vector(vectors, CODE[AT][2], CODE[AT][3])
    elif CODE[AT][0] == COLUMN_MUL:
        return values[CODE[AT][1]] * vector(vectors, CODE[AT][2], CODE[AT][3])
    elif CODE[AT][0] == PRELU:
        v = values[CODE[AT][1]]
        return tl.where(v < 0, v * vector(vectors, CODE[AT][2], CODE[AT][3]), v)
    elif CODE[AT][0] == SHIFT:
        return values[CODE[AT][1]] + CODE[AT][2]
    else:
        return values[CODE[AT][1]] * CODE[AT][2]


@triton.jit
def put(v, out, row, live, first, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write a value to the columns from `first` on of an output that has N."""
    column = first + tl.arange(0, v.shape[1])
    place = out + row[:, None] * N + column[None, :]
    tl.store(place, v.to(out.dtype.element_ty), mask=live[:, None] & (column < N)[None, :])


@triton.jit
def put_product(  # type: ignore[no-untyped-def]
    v, weights, vectors, out, row, live, AT: tl.constexpr, K: tl.constexpr, N: tl.constexpr, LANES: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    for block in tl.static_range(0, LANES, BLOCK * SHARES):
        first = block + share(SHARES) * BLOCK
        if first < LANES:
            total = product(v, weights, vectors, AT, K, LANES, BIAS, first, BLOCK)
            put(activate(total, ACTIVATION), out, row, live, first, N)


@triton.jit
def grc_layer_chain(  # type: ignore[no-untyped-def]
    x0, x1, x2, x3, x4, x5, y0, y1, y2, y3, y4, y5, weights, vectors, R, p0, p1, p2, p3, p4, p5,
    CODE: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    inputs, outputs, pitches = (x0, x1, x2, x3, x4, x5), (y0, y1, y2, y3, y4, y5), (p0, p1, p2, p3, p4, p5)
    row = (ready(tl.program_id(0)) // SHARES).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < R
    values = ()
    for at in tl.static_range(STEPS):
        if CODE[at][0] == OUTPUT:
            put(values[CODE[at][1]], outputs[CODE[at][2]], row, live & (share(SHARES) == 0), 0, CODE[at][3])
        elif CODE[at][0] == WIDE:
            put_product(
                values[CODE[at][1]], weights, vectors, outputs[CODE[at][8]], row, live, CODE[at][2], CODE[at][3],
                CODE[at][4], CODE[at][5], CODE[at][6], CODE[at][7], SHARES,
            )  # fmt: skip
        else:
            new = value_of(CODE, at, values, inputs, pitches, weights, vectors, row, live)
            values = values + (new,)  # type: ignore[assignment] # noqa: RUF005


def layer_chain(
    inputs: Sequence[torch.Tensor], weights: torch.Tensor, vectors: torch.Tensor, code: str
) -> list[torch.Tensor]:
    """Take rows through a chain of layers: [R, n] for each output, in the weights' dtype or float32.

    inputs [..., n], at most INPUTS of them with R rows each, or [..., 1] where a step multiplies by it; weights, float16 or
    bfloat16, and vectors, float32, are flat; `code` are the steps of `grc.kernels.layer_chain`, encoded. Values are float32
    and rounded where they are factors of a product or written.
    """
    steps = decode(code)
    rows = [x.reshape(-1, x.shape[-1]) for x in inputs]
    rows = [x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in rows]
    count = rows[0].shape[0]
    given = [*rows, *[weights] * (kinds.INPUTS - len(rows))]
    pitches = [*(x.stride(0) for x in rows), *[0] * (kinds.INPUTS - len(rows))]
    dtypes = weights.dtype, torch.float32
    made = [weights.new_empty(count, width, dtype=dtypes[wide]) for width, wide in outputs(steps)]
    for choice, asked in configs(steps, count):
        wrap_triton(grc_layer_chain)[(triton.cdiv(count, choice.rows) * choice.shares * asked,)](
            *given, *made, *[weights] * (kinds.OUTPUTS - len(made)), weights, vectors, count, *pitches,
            CODE=steps, STEPS=len(steps), ROWS=choice.rows, SHARES=choice.shares, num_warps=4,
        )  # fmt: skip
    return made


def configs(steps: Sequence[kinds.Step], count: Any) -> list[tuple[Config, Any]]:
    """How to launch for a number of rows, each way with 1 or 0: of several, where it is unknown, a run takes one.

    Few rows lie in many small programs, which share the columns of wide layers; of many rows a program takes more, since
    every one of them reads the weights.
    """
    wide = max((int(step[5]) // BLOCK.value for step in steps if step[0] == kinds.WIDE), default=1)
    smaller = [(Config(16, wide), FEW), (Config(64, min(wide, 4)), SOME)] if wide > 1 else [(Config(16, 1), NARROW)]
    return by_count(count, smaller, Config(64, 1))


register = registering(layer_chain)
