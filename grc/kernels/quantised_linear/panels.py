"""The weight of a quantised linear: int8 with a scale a column, or bfloat16, in panels with groups of steps side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from grc.errors import LoweringError
from grc.graph.match import finite
from grc.kernels.packed_linear.panels import PANEL, Empty

GROUP = {torch.int8: 4, torch.bfloat16: 2}  # `kGroup` in grc/low.h: what one lane of 32 bits holds
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LARGEST8 = 448.0  # of float8_e4m3fn
MAX_DEPTH = 65536  # `kMaxDepth` there: 65536 products of 255 and 127 fit into 32 bits
BLOCK = 1 << 18  # weights that are rounded at a time, which stay in the cache, so that rounding one holds no second one


@dataclass(frozen=True)
class Quantised:
    """A packed weight [ceil(N / panel), ceil(K / group), panel, group] and, of int8, its scales and sums [2 * N]."""

    packed: Tensor
    scale: Tensor | None


def quantise(weight: Tensor, dtype: torch.dtype, isa: str, empty: Empty = torch.empty) -> Quantised:
    """Bring a float32 weight [N, K] to int8 or bfloat16, and lay it out for `isa`, zero-padded.

    It is written block by block into what `empty` makes. Raises LoweringError for another dtype, an ISA without a panel
    width, a weight that is not 2-D, holds NaN or infinity, or is too deep for int8.
    """
    if dtype not in GROUP or isa not in PANEL:
        raise LoweringError(f'no quantised weight of {dtype} for ISA "{isa}"', "choose int8 or bfloat16")
    if weight.dim() != 2:
        raise LoweringError(f"a weight to quantise is [N, K], not {list(weight.shape)}")
    if not finite(weight):
        raise LoweringError("a weight to quantise holds NaN or infinity", "keep the layer in float32")
    (n, k), width, group = weight.shape, PANEL[isa], GROUP[dtype]
    if dtype is torch.int8 and k > MAX_DEPTH:
        raise LoweringError(f"a layer of {k} inputs is too deep for int8", f"the limit is {MAX_DEPTH}")
    packed = empty((-(-n // width), -(-k // group), width, group), dtype=dtype)
    ends = torch.empty(2, n)
    for rows in blocks(weight, width):
        block = weight[rows].detach()
        if dtype is torch.int8:
            block, ends[0, rows] = rounded8(block)
            ends[1, rows] = block.sum(1, dtype=torch.float32)
        padded = functional.pad(block.to(dtype), (0, -k % group, 0, -len(block) % width))
        panels = padded.view(len(padded) // width, width, packed.shape[1], group).transpose(1, 2)
        packed[rows.start // width :][: len(panels)] = panels
    return Quantised(packed, ends.view(-1) if dtype is torch.int8 else None)


def blocks(weight: Tensor, multiple: int = 1) -> Iterator[slice]:
    """All rows of a weight [N, K], about BLOCK numbers at a time, in multiples of so many rows."""
    n, k = weight.shape
    rows = multiple * max(BLOCK // max(multiple * k, 1), 1)
    return (slice(start, min(start + rows, n)) for start in range(0, n, rows))


def whole_numbers(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] as int8 of -127..127 and a scale [N]: symmetric, the largest weight of each column at the end."""
    whole, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight))
    for rows in blocks(weight):
        whole[rows], scale[rows] = rounded8(weight[rows])
    return whole, scale


def rounded8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(1).float() / 127.0
    scale = torch.where(scale > 0, scale, 1.0)
    return torch.round(weight.float() / scale[:, None]).clamp(-127, 127).to(torch.int8), scale


def scaled8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., K] as float8_e4m3fn, and the size [..., 1] of its one: the largest of each row at the end of the range.

    A row that holds NaN or infinity has NaN for its size.
    """
    narrow = rows.float()
    size = narrow.abs().amax(-1, keepdim=True) / LARGEST8
    inverse = torch.where(size > 0, 1.0 / size, 0.0)
    known = torch.isfinite(size) & torch.isfinite(inverse)
    steps = (narrow * torch.where(known, inverse, 0.0)).clamp(-LARGEST8, LARGEST8)
    return steps.to(torch.float8_e4m3fn), torch.where(known, size, torch.where(torch.isfinite(size), 0.0, torch.nan))


def rounded(weight: Tensor, form: str) -> Tensor:
    """The values [N, K] that a weight has in "int8", "fp8", "bf16" or "fp16", in float32."""
    if form in HALVES:
        return weight.to(HALVES[form]).float()
    if form == "fp8":
        steps, size = scaled8(weight)
        return steps.float() * size
    whole, scale = rounded8(weight)
    return whole.float() * scale[:, None]


def unpack(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The weight [N, K] out of its panels, in the packed dtype."""
    panels, steps, width, group = packed.shape
    return packed.transpose(1, 2).reshape(panels * width, steps * group)[:out_features, :in_features]
