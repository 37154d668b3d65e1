"""Move a captured graph to another device: its constants, and every device that a call names or leaves to the default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from grc.errors import LoweringError
from grc.graph.match import aten
from grc.graph.rewrite import copy_graph, find_attribute


def moved(
    graph: fx.GraphModule, device: torch.device, put: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[fx.GraphModule, dict[str, torch.Tensor]]:
    """A copy of the graph on `device`, and its constants as they were, by path. `put` moves one tensor.

    Models are captured on the CPU, so that a model file needs no word about devices. What its nodes say about their
    values stays as it was but for the device. Raises LoweringError for control flow, whose bodies are graphs of their own.
    """
    copy = copy_graph(graph)
    originals: dict[str, torch.Tensor] = {}
    for path in sorted({str(node.target) for node in copy.graph.nodes if node.op == "get_attr"}):
        tensor = find_attribute(copy, path)
        if not isinstance(tensor, torch.Tensor):
            raise LoweringError(f"{path} is a graph of its own (cond, map or scan), which is not moved to a GPU")
        originals[path] = tensor.detach()
        set_attribute(copy, path, put(tensor.detach()), isinstance(tensor, nn.Parameter))
    for node in copy.graph.nodes:
        if node.op == "call_function":
            # A view fits the strides that a kernel gives its result, and another device's kernel may give others.
            node.target = aten.reshape.default if node.target is aten.view.default else node.target
            node.args = on(node.args, device)
            node.kwargs = on(node.kwargs, device)
            if creates(node):
                node.kwargs = {**node.kwargs, "device": device}
    copy.recompile()
    return copy, originals


def set_attribute(module: nn.Module, path: str, tensor: torch.Tensor, parameter: bool) -> None:
    prefix, _, name = path.rpartition(".")
    owner = module.get_submodule(prefix)
    delattr(owner, name)
    if parameter:
        owner.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    else:
        owner.register_buffer(name, tensor)


def on(arguments: Any, device: torch.device) -> Any:
    """The arguments of a call with every device that they name replaced."""
    if isinstance(arguments, torch.device):
        return device
    if isinstance(arguments, dict):
        return {key: on(value, device) for key, value in arguments.items()}
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(on(value, device) for value in arguments)
    return arguments


def creates(node: fx.Node) -> bool:
    """A factory that leaves its device to the default: no tensor among its arguments tells it where to be."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or "device" in node.kwargs:
        return False
    names = [argument.name for argument in schema.arguments]
    if "device" not in names or names.index("device") < len(node.args):
        return False
    return not any(isinstance(n.meta.get("val"), torch.Tensor) for n in node.all_input_nodes)
