"""A linear layer of 8-bit rows for the tensor cores of a GPU: int8 or float8_e4m3fn, with a scale for every row of both
operands. Which step brings x to 8 bits is plain aten, so that Inductor computes it where x is made."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from grc.kernels.fusion import Cost, FusedOp
from grc.kernels.quantised_linear import stepped
from grc.kernels.quantised_linear.panels import scaled8, whole_numbers

__all__ = ["SCALED_LINEAR", "rows_in_8_bits", "weight_in_8_bits"]

MIDDLE = 128  # of the 256 steps of an int8 row, which are 0..255 on a CPU and -128..127 here


def reference(
    x: Tensor,
    size: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    sums: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """((x + shift) @ weight.T) * size * scale + bias in float16, of shape [..., N].

    x is [..., K] and weight [N, K], both int8 or both float8_e4m3fn; size [..., 1] and scale [N], float32, are what one
    step of their rows is worth; shift [..., 1], int32, brings int8 steps to where zero is a whole number, by way of sums
    [N] = weight.sum(1), int32; bias is [N], float32. Sums of int8 are exact. A row whose size is NaN gives NaN
    (W8A8 with a scale a token and a channel: Yao et al. 2022, ZeroQuant; fp8: Micikevicius et al. 2022).
    """
    y = functional.linear(x.double(), weight.double())
    if shift is not None and sums is not None:
        y = y + shift.double() * sums.double()
    y = y * size.double() * scale.double()
    return (y if bias is None else y + bias.double()).to(torch.float16)


def rows_in_8_bits(x: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of x [..., K] as `scaled_linear` takes them: steps, their size [..., 1], and for int8 their shift [..., 1].

    The steps of int8 are those of the CPU's kernel, so that a layer gives the same numbers on every device.
    """
    if form == "fp8":
        steps, size = scaled8(x)
        return steps, size, None
    whole, size, zero = stepped(x)
    return (whole - MIDDLE).to(torch.int8), size, (MIDDLE - zero).to(torch.int32)


def weight_in_8_bits(weight: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """A weight [N, K] as `scaled_linear` takes it: steps, scale [N], and for int8 the sums [N] of the steps."""
    if form == "fp8":
        steps, size = scaled8(weight)
        return steps, size[:, 0].contiguous(), None
    whole, scale = whole_numbers(weight)
    return whole, scale, whole.sum(1, dtype=torch.int32)


def cost(x: Tensor, size: Tensor, shift: Tensor | None, weight: Tensor, *rest: Tensor | None) -> Cost:
    """Every operand read once, the float16 result written once; two operations a weight and row."""
    (n, k), m = weight.shape, x.shape[:-1].numel()
    read = sum(t.numel() * t.element_size() for t in (x, size, shift, weight, *rest) if t is not None)
    return Cost(read + 2 * m * n, 2 * m * n * k)


SCALED_LINEAR = FusedOp(
    schema=(
        "scaled_linear(Tensor x, Tensor size, Tensor? shift, Tensor weight, Tensor scale, Tensor? sums, Tensor? bias) "
        "-> Tensor"
    ),
    reference=reference,
    cpu=None,
    cost=cost,
)
