"""A batch norm in eval mode is one scale and one shift for each column."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from torch import Tensor, fx

from grc.graph.match import argument, aten, attribute, is_op


class BatchNorm(NamedTuple):
    """`source * scale + shift`, with float64 numbers [C] for the columns, which are dimension 1 of the source."""

    source: fx.Node
    scale: Tensor
    shift: Tensor


def batch_norm(module: fx.GraphModule, node: Any) -> BatchNorm | None:
    """The batch norm behind a value, where its statistics are constants."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem or node.args[1] != 0:
        return None
    call: Any = node.args[0]
    if not is_op(call, aten._native_batch_norm_legit_no_training):
        return None
    names = ("weight", "bias", "running_mean", "running_var")
    given = [argument(call, name) for name in names]
    tensors = [attribute(module, entry) for entry in given]
    if any((entry is None) != (tensor is None) for entry, tensor in zip(given, tensors, strict=True)):
        return None
    weight, bias, mean, var = (None if t is None else t.detach().double() for t in tensors)
    if mean is None or var is None:
        return None
    scale = (var + argument(call, "eps")).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    return BatchNorm(call.args[0], scale, shift)
