"""What is no site: floating-point constants that are read in a way that no lower format is for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from grc.graph.cost import bytes_of
from grc.graph.match import attribute
from grc.precision.sites import HALVED, layer_weight, readings

LEAST = 1000  # bytes: smaller ones, such as most biases, are not worth a line


@dataclass(frozen=True)
class Other:
    name: str
    bytes: int
    reason: str


def find_others(graph: fx.GraphModule) -> list[Other]:
    """Every floating-point constant of at least LEAST bytes that is no part of a site, the largest first."""
    sited = {reading.arena for reading in readings(graph)}
    for node in graph.graph.nodes:
        operands = [layer_weight(node), *(node.args[place] for place in HALVED.get(node.target, ()))]
        sited |= {str(operand.target) for operand in operands if is_plain(graph, operand)}
    found: dict[str, Other] = {}
    for node in graph.graph.nodes:
        tensor, name = attribute(graph, node), str(node.target)
        if tensor is not None and tensor.is_floating_point() and name not in sited and bytes_of(tensor) >= LEAST:
            found[name] = Other(name, bytes_of(tensor), reason(node, tensor))
    return sorted(found.values(), key=lambda other: -other.bytes)


def is_plain(graph: fx.GraphModule, operand: object) -> bool:
    """Whether an operand is a constant in float32, the only ones that sites are made of."""
    tensor = attribute(graph, operand)
    return tensor is not None and tensor.dtype is torch.float32


def reason(node: fx.Node, tensor: torch.Tensor) -> str:
    if tensor.itemsize <= 2:
        return f"the model holds it in {str(tensor.dtype)[6:]}"
    calls = [user.target for user in node.users if user.op == "call_function"]
    uses = dict.fromkeys(getattr(call, "_opname", None) or call.__name__ for call in calls)  # type: ignore[union-attr]
    return f"no lower format for its use in {' and '.join(uses)}" if uses else "an output of the model"
