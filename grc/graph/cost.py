"""Cost: parameters, bytes and floating-point operations of each layer and table of a graph, for one row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from grc.graph.match import aten, attribute, is_op, value


@dataclass(frozen=True)
class Layer:
    """One constant of the model and what reading it for one row costs."""

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: int
    flops: int


def layers(graph: fx.GraphModule) -> list[Layer]:
    """Every parameter of the graph, as a table, a linear layer or other; FLOPs are for one row of the batch."""
    found: dict[str, Layer] = {}
    for node in graph.graph.nodes:
        tensor = attribute(graph, node)
        if tensor is None:
            continue
        kind, flops = role(node, tensor)
        found[str(node.target)] = Layer(str(node.target), kind, tuple(tensor.shape), bytes_of(tensor), flops)
    return sorted(found.values(), key=lambda layer: -layer.bytes)


def bytes_of(tensor: torch.Tensor) -> int:
    """Those of a sparse tensor are of its numbers alone."""
    return (tensor.numel() if tensor.layout is torch.strided else tensor._nnz()) * tensor.itemsize


def role(node: fx.Node, tensor: torch.Tensor) -> tuple[str, int]:
    for user in node.users:
        if is_op(user, aten.embedding, aten.embedding_bag) and user.args[0] is node:
            return "table", 0
        if is_op(user, aten.linear) and len(user.args) > 1 and user.args[1] is node:
            return "linear", 2 * tensor.numel() * rows_per_sample(user.args[0])
        if is_op(user, aten.layer_norm, aten.batch_norm, aten.rms_norm):
            return "norm", 0
    return "other", 0


def rows_per_sample(x: Any) -> int:
    """How many rows of a product one sample makes: the static leading sizes of `[B, S, K]`."""
    count = 1
    for size in value(x).shape[:-1]:
        count *= size if isinstance(size, int) else 1
    return count
