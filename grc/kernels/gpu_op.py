"""GPU operators: functions that launch Triton kernels, as `grc_cuda::NAME`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.library import triton_op


def registering(function: Callable[..., Any]) -> Callable[[], torch._ops.OpOverload]:
    """What defines `grc_cuda::NAME` when it is first asked for it; torch.export keeps that whole, and AOTInductor compiles
    the kernels that `function` launches in."""

    @functools.cache
    def register() -> torch._ops.OpOverload:
        triton_op(f"grc_cuda::{function.__name__}", function, mutates_args=())
        return getattr(torch.ops.grc_cuda, function.__name__).default

    return register
