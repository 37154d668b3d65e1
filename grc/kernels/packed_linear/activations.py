"""The activations that an epilogue computes, by their numbers in the schemas and in `Activation` of grc/gemm.h."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from grc.graph.match import argument, aten, is_op

NONE, RELU, GELU, GELU_TANH, SILU, SIGMOID, TANH, PRELU, DICE = range(9)

# those without numbers for each column, in the order above
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}

OPERATORS = {aten.relu: RELU, aten.silu: SILU, aten.sigmoid: SIGMOID, aten.tanh: TANH}


def activation_code(node: Any) -> int:
    """The activation that a node is of its first argument, or NONE."""
    if is_op(node, aten.gelu):
        return GELU if argument(node, "approximate") == "none" else GELU_TANH
    return next((code for op, code in OPERATORS.items() if is_op(node, op)), NONE)
