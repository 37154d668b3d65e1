"""`grc_cuda::checked_ids` in Triton: count the ids outside of a table before a gather that is not ours reads its rows."""

from __future__ import annotations

import torch
from torch.library import wrap_triton

from grc.kernels.dependent import ready
from grc.kernels.gpu_op import registering
from grc.kernels.rows import tell, tl, triton

BLOCK = 256  # ids of a program


@triton.jit
def grc_checked_ids(ids, out, told, N, step, rows, BLOCK: tl.constexpr, TOLD: tl.constexpr):  # type: ignore[no-untyped-def]
    at = ready(tl.program_id(0)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(ids + at * step, mask=at < N, other=0)
    bad = (index < 0) | (index >= rows)
    if TOLD:
        tell(bad.to(tl.int32), told)
    tl.store(out + at, tl.where(bad, 0, index), mask=at < N)


def checked_ids(ids: torch.Tensor, rows: int, told: torch.Tensor | None = None) -> torch.Tensor:
    """ids [N], int32 or int64, of any stride, with 0 for each outside of 0..rows-1. `told`, a `telling`, counts those."""
    out = torch.empty_like(ids, memory_format=torch.contiguous_format)
    wrap_triton(grc_checked_ids)[(triton.cdiv(ids.shape[0], BLOCK),)](
        ids, out, out if told is None else told, ids.shape[0], ids.stride(0), rows,
        BLOCK=BLOCK, TOLD=told is not None, num_warps=2,
    )  # fmt: skip
    return out


register = registering(checked_ids)
