"""Sites: the tables and layers of a graph that may be kept in fewer bits, each under the name of its weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from grc.graph.cost import rows_per_sample
from grc.graph.match import aten, attribute, is_op, value
from grc.kernels import CROSS, SCORE_TOPK
from grc.kernels.quantised_linear import MAX_DEPTH
from grc.precision.formats import BITS

LAYER, TABLE = "layer", "table"


@dataclass
class Site:
    """One weight: the nodes that read it, its bytes in float32, and what it does for a row of a request."""

    name: str
    kind: str
    nodes: list[fx.Node]
    elements: int
    work: int  # elements read for one row of the batch, times the rows that each is multiplied with
    width: int = 0  # of a table's rows
    features: list[tuple[fx.Node, int]] = field(default_factory=list)  # of a table: look-up and feature
    head: bool = False  # what it computes is an output, but for an activation
    reason: str | None = None  # why it must stay in float32

    @property
    def bytes(self) -> int:
        return 4 * self.elements

    def lowered_bytes(self, form: str) -> int:
        return self.elements * BITS[form] // 8


def find_sites(graph: fx.GraphModule) -> list[Site]:
    """Every float32 layer of a constant weight, in the order of the graph, then every table."""
    found: dict[str, Site] = {}
    for node in graph.graph.nodes:
        weight = layer_weight(node)
        tensor = attribute(graph, weight)
        if tensor is None or tensor.dim() != 2 or tensor.dtype is not torch.float32:
            continue
        site = found.get(str(weight.target))
        if site is None:
            site = found[str(weight.target)] = Site(str(weight.target), LAYER, [], tensor.numel(), 0)
            site.reason = refused(tensor)
        site.nodes.append(node)
        site.head |= feeds_output(node)
        site.work += tensor.numel() * rows_per_sample(operand(node))
        if node.target is SCORE_TOPK.overload:
            site.reason = "its scores are ranked in float32"
    return list(found.values())


def layer_weight(node: fx.Node) -> Any:
    """The weight that a node multiplies with, or None."""
    if is_op(node, aten.linear):
        return node.args[1]
    if node.target is CROSS.overload:
        return node.args[2]
    if node.target is SCORE_TOPK.overload:
        return node.args[1]
    return None


def operand(node: fx.Node) -> fx.Node:
    return node.args[1 if node.target is CROSS.overload else 0]  # type: ignore[return-value]


def refused(weight: torch.Tensor) -> str | None:
    if not bool(torch.isfinite(weight).all()):
        return "its weight holds NaN or infinity"
    if weight.shape[1] > MAX_DEPTH:
        return f"{weight.shape[1]} inputs are too many for exact sums of int8"
    return None


PASSING = (
    aten.sigmoid, aten.softmax, aten.reshape, aten.view, aten.squeeze, aten.unsqueeze, aten.flatten, aten.tanh,
    aten.clamp, aten.log_softmax, aten.select, aten.slice,
)  # fmt: skip


def feeds_output(node: fx.Node) -> bool:
    """True where what a layer computes is an answer, or becomes one through an activation alone."""
    return any(reader.op == "output" for reader in readers(node))


def readers(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if is_op(user, *PASSING) and value(user) is not None:
            yield from readers(user)
        else:
            yield user
