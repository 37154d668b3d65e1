"""How a row of a table lies in an arena of bytes: float32, float16, bfloat16, or 8 or 4 bits with a scale and an offset.

A row of 8 or 4 bits is its numbers (two to a byte, the first in the low half), then scale and offset in float16; a number
q stands for offset + q * scale. Rows begin at multiples of four bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grc.errors import LoweringError

# in the order of `RowFormat` in grc/rows.h
ROW_FORMATS = ("fp32", "fp16", "bf16", "int8", "int4")
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LEVELS = {"int8": 255, "int4": 15}
HALF_MAX = torch.finfo(torch.float16).max
LINE = 64  # bytes: every table begins on a cache line
CHUNK = 1 << 18  # numbers quantised at a time, so that converting a table holds no second one


def row_bytes(form: str, dim: int) -> int:
    """Bytes from one row to the next."""
    if form in FLOATS:
        size = dim * FLOATS[form].itemsize
    else:
        size = number_bytes(form, dim) + 4
    return -(-size // 4) * 4


def number_bytes(form: str, dim: int) -> int:
    """Bytes of a row's numbers, filled up so that the scale lies on a multiple of two."""
    size = dim if form == "int8" else -(-dim // 2)
    return size + size % 2


def steps(rows: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers [N, D] of 0..levels, scale [N, 1] and offset [N, 1], both float16 values in float32.

    The offset is rounded down and the scale up, so that every value lies between the least and the largest number: then
    none is further than half a step from its own. Raises LoweringError for rows that float16 can't scale.
    """
    levels = LEVELS[form]
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    if not bool(((low >= -HALF_MAX) & (high <= HALF_MAX)).all()):  # NaN is neither
        raise LoweringError(f"a table holds NaN or values that float16 can't scale, and can't be kept in {form}")
    offset = toward(low, -torch.inf)
    scale = toward((high.double() - offset) / levels, torch.inf)  # in float32 the smallest ranges would vanish
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    return torch.round((rows - offset) * inverse).clamp(0, levels), scale, offset


def toward(values: Tensor, end: float) -> Tensor:
    """The float16 next to each value on the side of `end`, as float32."""
    near = values.to(torch.float16)
    passed = near.to(values.dtype) > values if end < 0 else near.to(values.dtype) < values
    return torch.where(passed, torch.nextafter(near, torch.full_like(near, end)), near).float()


def rounded_rows(rows: Tensor, form: str) -> Tensor:
    """The values that rows [N, D] of float32 have in a format."""
    if form in FLOATS:
        return rows.to(FLOATS[form]).float()
    numbers, scale, offset = steps(rows, form)
    return numbers * scale + offset


def packed_rows(rows: Tensor, form: str) -> Tensor:
    """Rows [N, D] of float32 as bytes [N, row_bytes]."""
    count, dim = rows.shape
    out = torch.zeros(count, row_bytes(form, dim), dtype=torch.uint8)
    if form in FLOATS:
        data = rows.to(FLOATS[form]).contiguous().view(torch.uint8)
        out[:, : data.shape[1]] = data
        return out
    numbers, scale, offset = steps(rows, form)
    data = numbers.to(torch.uint8)
    if form == "int4":
        data = torch.nn.functional.pad(data, (0, dim % 2))
        data = data[:, 0::2] | (data[:, 1::2] << 4)
    out[:, : data.shape[1]] = data
    ends = torch.cat([scale, offset], 1).to(torch.float16).contiguous().view(torch.uint8)
    begin = number_bytes(form, dim)
    out[:, begin : begin + 4] = ends
    return out


def pack_table(table: Tensor, form: str, out: Tensor) -> None:
    """Write a table [R, D] into the bytes [R * row_bytes] of an arena, in pieces.

    Raises LoweringError for rows that the format can't hold.
    """
    target = out.view(table.shape[0], -1)
    rows = max(CHUNK // max(table.shape[1], 1), 1)
    for begin in range(0, table.shape[0], rows):
        piece = table[begin : begin + rows].detach().float()
        target[begin : begin + len(piece)] = packed_rows(piece, form)


def unpacked(found: Tensor, form: str, dim: int) -> Tensor:
    """Bytes [..., row_bytes] of gathered rows as float32 [..., dim]."""
    if form in FLOATS:
        return found[..., : dim * FLOATS[form].itemsize].contiguous().view(FLOATS[form]).float()
    begin = number_bytes(form, dim)
    ends = found[..., begin : begin + 4].contiguous().view(torch.float16).float()
    numbers = found[..., : dim if form == "int8" else -(-dim // 2)]
    if form == "int4":
        numbers = torch.stack([numbers & 15, numbers >> 4], -1).flatten(-2)[..., :dim]
    return numbers.float() * ends[..., :1] + ends[..., 1:]


def packing(formats: Sequence[str], starts: Sequence[int]) -> list[int]:
    """The `packing` of an op: format and first byte of each feature, one after the other."""
    return [value for form, start in zip(formats, starts, strict=True) for value in (ROW_FORMATS.index(form), start)]
