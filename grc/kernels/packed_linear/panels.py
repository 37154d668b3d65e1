"""The weight of a packed linear: panels as wide as one register tile of the ISA."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grc.errors import LoweringError

# columns of a panel, `kPanel` in grc/gemm.h: 4 vectors of 16 floats, or 2 of 8
PANEL = {"avx512": 64, "avx2": 16, "default": 16}

# `kNarrow` in grc/gemm.h: heads this narrow stay [N, K], because their panel would be mostly padding
NARROW = 4

Empty = Callable[..., Tensor]  # makes what a packed weight is written into, as torch.empty does


def pack(weight: Tensor, isa: str, empty: Empty = torch.empty) -> Tensor:
    """Lay a weight [N, K] out for `isa`: [ceil(N / panel), K, panel], zero-padded; [N, K] itself if N <= 4.

    It is written straight into what `empty` makes. Raises LoweringError for an ISA without a panel width or a weight that
    is not 2-D.
    """
    if isa not in PANEL:
        raise LoweringError(f'no packed weight for ISA "{isa}"', f"choose one of {', '.join(PANEL)}")
    if weight.dim() != 2:
        raise LoweringError(f"a weight to pack is [N, K], not {list(weight.shape)}")
    (n, k), weight = weight.shape, weight.detach()
    if n <= NARROW:
        return empty((n, k), dtype=weight.dtype).copy_(weight)
    width = PANEL[isa]
    full, rest = divmod(n, width)
    packed = empty((-(-n // width), k, width), dtype=weight.dtype)
    packed[:full] = weight[: n - rest].view(full, width, k).transpose(1, 2)
    if rest:
        packed[full, :, :rest] = weight[n - rest :].t()
        packed[full, :, rest:] = 0
    return packed


def unpack(packed: Tensor, out_features: int) -> Tensor:
    """The weight [N, K] out of `pack`'s result, N = out_features."""
    if packed.dim() == 2:
        return packed
    return packed.transpose(1, 2).reshape(packed.shape[0] * packed.shape[2], packed.shape[1])[:out_features]
