"""All pairwise dot products of packed rows, one id a bag, from the exact products of their integers.

A row is x = s * q + c with integers q of 8 bits and sign, so that of D columns

    x . y = s_x s_y (q_x . q_y) + c_x t_y + t_x c_y,    t = s * sum(q) + D / 2 * c.

The tensor cores take the bytes of rows as they lie, for q_x . q_y and, beside a row of ones, for sum(q). Nothing is
unpacked: float32 begins after the sums.
"""

from __future__ import annotations

from grc.kernels.bag_dot.triangle import triangle, write
from grc.kernels.dependent import ready
from grc.kernels.rows import INTERPRETED, outside, tell, tl, triton

# Four bytes at a time: q - 128 of 8 bits, and 16 * (q - 8) of the lower and upper 4 bits.
EIGHT_BITS = tl.constexpr("xor.b32 $0, $1, 0x80808080;")
LOW_BITS = tl.constexpr("{ .reg .b32 t; shl.b32 t, $1, 4; lop3.b32 $0, t, 0xf0f0f0f0, 0x80808080, 0x6a; }")
HIGH_BITS = tl.constexpr("lop3.b32 $0, $1, 0xf0f0f0f0, 0x80808080, 0x6a;")
# A dense row is taken in fixed point, 256 * high + low of two bytes with sign.
LARGEST = tl.constexpr(127 * 256 + 127)
# A number of at most 2**22 plus this has it, rounded, in its bits minus those of this: a conversion in an addition.
SHIFT = tl.constexpr(1.5 * 2**23)
SHIFT_BITS = tl.constexpr(0x4B400000)


@triton.jit
def signed(byte, FORM: tl.constexpr, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """The numbers of 8 bits in bytes, or of 4 bits the first or second ones, as integers with sign: 128 less, or 8 less and
    16 times as large."""
    if INTERPRETED:
        number = byte if FORM == 3 else ((byte & 240) if PART == 1 else (byte & 15) * 16)
        return (number ^ 128).to(tl.int8, bitcast=True)
    elif FORM == 3:
        return tl.inline_asm_elementwise(EIGHT_BITS, "=r,r", [byte], dtype=tl.int8, is_pure=True, pack=4)
    elif PART == 1:
        return tl.inline_asm_elementwise(HIGH_BITS, "=r,r", [byte], dtype=tl.int8, is_pure=True, pack=4)
    else:
        return tl.inline_asm_elementwise(LOW_BITS, "=r,r", [byte], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def pieces(dense, row, step, live, D: tl.constexpr, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """A dense row in pieces of K columns."""
    found = ()
    for left in tl.static_range(0, D, K):
        column = left + tl.arange(0, K)
        piece = tl.load(dense + row + column * step, mask=(column < D) & live, other=0.0)
        found = found + (piece,)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def grc_byte_dot(  # type: ignore[no-untyped-def]
    arena, ids, dense, tables, out, told, B, id_row, id_step, dense_row, dense_step,
    F: tl.constexpr, D: tl.constexpr, PITCH: tl.constexpr, SCALE: tl.constexpr, ALIGN: tl.constexpr, FORM: tl.constexpr,
    PAIRS: tl.constexpr, WIDTH: tl.constexpr,
    DENSE: tl.constexpr, KEEP: tl.constexpr, UPPER: tl.constexpr, DIAGONAL: tl.constexpr, PADDED: tl.constexpr,
    P: tl.constexpr, REST: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr, TOLD: tl.constexpr,
):  # fmt: skip
    HEAD: tl.constexpr = D if KEEP else 0
    # Columns that share a byte, bytes of a row, and how many columns are read beyond it. Those hold -128.
    SHARED: tl.constexpr = 2 if FORM == 4 else 1
    W: tl.constexpr = D // SHARED
    BLOCKS: tl.constexpr = (W + K - 1) // K
    BEYOND: tl.constexpr = (BLOCKS * K - W) * SHARED
    # Sums of at most 2**22 become float32 with what they begin at.
    SMALL: tl.constexpr = D <= 256
    # As in grc_bag_dot: torch can't tell what a kernel writes to that loads these in a function of several answers.
    n = tl.arange(0, P)
    feature = n - DENSE
    known = (feature >= 0) & (feature < F)
    start = tl.load(tables + feature, mask=known, other=0)
    rows = tl.load(tables + F + feature, mask=known, other=0)
    padding = tl.load(tables + 2 * F + feature, mask=known, other=0) if PADDED else 0
    i = n[:, None]
    j = n[None, :]
    pair, chosen = triangle(n, F + DENSE, UPPER, DIAGONAL)
    bad = tl.zeros([P], tl.int32)
    first = ready(tl.program_id(0))
    programs = tl.num_programs(0)
    if DENSE:
        head = pieces(dense, first.to(tl.int64) * dense_row, dense_step, True, D, K * SHARED)
    for at in tl.range(first, B, programs, num_stages=STAGES):
        sample = tl.full([], 0, tl.int64) + at
        line = out + sample * WIDTH
        index = tl.load(ids + sample * id_row + feature * id_step, mask=known, other=0).to(tl.int64)
        wanted = known & (index != padding) if PADDED else known
        sound = wanted & (index >= 0) & (index < rows)
        bad += (known & outside(index, rows, padding, PADDED)).to(tl.int32)
        # Where there is no row, the first bytes of the arena are read: without a scale and an offset they count as zeros.
        # A mask would cost more than all else of a load.
        row = arena + tl.multiple_of(tl.where(sound, start + index * PITCH, 0), ALIGN)
        ends = (row + SCALE).to(tl.pointer_type(tl.float16))[:, None] + tl.arange(0, 2)[None, :]
        ends = tl.load(ends, mask=sound[:, None], other=0.0)
        gram = tl.full([P, P], (SHIFT_BITS if SMALL else 0) - 128 * 128 * BEYOND, tl.int32)
        total = tl.full([P, 1], 128 * BEYOND, tl.int32)
        if DENSE:
            bits = tl.full([], 0, tl.int32)  # of the largest size: those of NaN are larger than all
            for block in tl.static_range(BLOCKS):
                size = head[block].to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
                bits = tl.maximum(bits, tl.max(size, 0))
            most = bits.to(tl.float32, bitcast=True)
            fixed = LARGEST / tl.maximum(most, 1e-30)
            summed = tl.full([], 0, tl.int32)
            square = tl.full([], 0.0, tl.float32)
            lows = tl.zeros([P, 1], tl.int32)
            highs = tl.zeros([P, 1], tl.int32)
        for block in tl.static_range(BLOCKS):
            inner = block * K + tl.arange(0, K)
            if W % K == 0:
                byte = tl.load(row[:, None] + inner[None, :])
            else:
                byte = tl.load(row[:, None] + inner[None, :], mask=(inner < W)[None, :], other=0)
            if DENSE:
                value = head[block].to(tl.float32)
                number = (value * fixed + SHIFT).to(tl.int32, bitcast=True)
                low = number.to(tl.int8)
                high = ((number + 128) >> 8).to(tl.int8)
                summed += tl.sum(number.to(tl.int16).to(tl.int32), 0)
                if DIAGONAL:
                    square += tl.sum(value * value, 0)
                if KEEP:
                    column = block * K * SHARED + tl.arange(0, K * SHARED)
                    tl.store(line + column, head[block].to(out.dtype.element_ty), mask=column < D)
                if SHARED == 2:
                    low, next_low = tl.split(tl.reshape(low, [K, 2]))
                    high, next_high = tl.split(tl.reshape(high, [K, 2]))
            for part in tl.static_range(SHARED):
                tile = signed(byte, FORM, part)
                gram = tl.dot(tile, tl.trans(tile), gram, out_dtype=tl.int32)
                total = tl.dot(tile, tl.full([K, 1], 1, tl.int8), total, out_dtype=tl.int32)
                if DENSE:
                    if part == 1:
                        low, high = next_low, next_high
                    lows = tl.dot(tile, low[:, None], lows, out_dtype=tl.int32)
                    highs = tl.dot(tile, high[:, None], highs, out_dtype=tl.int32)
        scale, offset = tl.split(ends.to(tl.float32))
        if FORM == 4:
            scale = scale * 0.0625
        centre = offset + 128.0 * scale
        s = scale[:, None]
        c = centre[:, None]
        t = s * total.to(tl.float32) + c * (0.5 * D)
        across = scale[None, :]
        if SMALL:
            scaled = across * gram.to(tl.float32, bitcast=True) - across * SHIFT
        else:
            scaled = across * gram.to(tl.float32)
        products = s * scaled + (c * tl.trans(t) + t * centre[None, :])
        if DENSE:
            unit = most * (1.0 / LARGEST) + (most - most)  # NaN for an infinite row
            beside = unit * (s * (highs.to(tl.float32) * 256.0 + lows.to(tl.float32)) + c * summed.to(tl.float32))
            products = tl.where(i == 0, tl.trans(beside), products) if UPPER else tl.where(j == 0, beside, products)
            if DIAGONAL:
                products = tl.where((i == 0) & (j == 0), square, products)
        write(line, pair + HEAD, chosen, products, HEAD + PAIRS, REST, WIDTH)
        if DENSE:  # on its way together with the next rows
            head = pieces(dense, (sample + programs) * dense_row, dense_step, at + programs < B, D, K * SHARED)
    if TOLD:
        tell(bad, told)
