"""A float32 linear layer with its weight packed in panels for one ISA, and what follows it in the same pass."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.nn import functional

from grc.errors import LoweringError
from grc.kernels.fusion import Cost, FusedOp
from grc.kernels.packed_linear.activations import ACTIVATIONS
from grc.kernels.packed_linear.cases import CASES
from grc.kernels.packed_linear.panels import pack, unpack

__all__ = ["ACTIVATIONS", "PACKED_LINEAR", "finished", "pack", "unpack"]


def finished(y: Tensor, mul: Tensor | None, add: Tensor | None, activation: int) -> Tensor:
    """act(y) * mul + add, all of one shape. Raises LoweringError for an activation that is not 0 to 6."""
    if not 0 <= activation < len(ACTIVATIONS):
        raise LoweringError(f"linear layers have no activation {activation}", f"choose 0 to {len(ACTIVATIONS) - 1}")
    y = list(ACTIVATIONS.values())[activation](y)
    y = y if mul is None else y * mul
    return y if add is None else y + add


def reference(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    mul: Tensor | None,
    add: Tensor | None,
    out_features: int,
    activation: int,
) -> Tensor:
    """act(x @ W.T + bias) * mul + add, of shape [..., N]: x is [..., K], W [N, K] packed by `pack`, bias [N].

    mul and add have the result's shape. With mul = x0 and add = x this is a cross layer of DCN v2 (Wang et al. 2021,
    eq. 1). Raises LoweringError for an activation that is not 0 to 6.
    """
    return finished(functional.linear(x, unpack(packed, out_features), bias), mul, add, activation)


def cost(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    mul: Tensor | None,
    add: Tensor | None,
    out_features: int,
    activation: int,
) -> Cost:
    """Every operand read once, the result written once; two operations a weight and row."""
    k = x.shape[-1]
    m = x.shape[:-1].numel()
    read = m * k + out_features * k + sum(t.numel() for t in (bias, mul, add) if t is not None)
    return Cost((read + m * out_features) * x.element_size(), 2 * m * out_features * k)


PACKED_LINEAR = FusedOp(
    schema=(
        "packed_linear(Tensor x, Tensor packed, Tensor? bias, Tensor? mul, Tensor? add, int out_features, "
        "int activation) -> Tensor"
    ),
    reference=reference,
    cpu=Path(__file__).parent / "cpu.cpp",
    cost=cost,
    cases=CASES,
)
