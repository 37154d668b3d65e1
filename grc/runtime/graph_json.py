"""A graph of aten operators as JSON: what the eager engine runs, with no model source, no pickle and no compiler."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from grc.errors import ArtifactError

Json = Any
MODULES = {"operator": operator, "_operator": operator, "math": math, "torch": torch}
CONSTANTS = {torch.dtype: "dtype", torch.device: "device", torch.layout: "layout", torch.memory_format: "memory_format"}


def encode_graph(graph: fx.Graph) -> Json:
    """The nodes in order. Raises ArtifactError for a node that is no operator (a nested graph)."""
    nodes = []
    for node in graph.nodes:
        if node.op == "output":
            nodes.append({"op": "output", "args": encode(node.args[0])})
        elif node.op in ("placeholder", "get_attr"):
            nodes.append({"op": node.op, "name": node.name, "target": str(node.target)})
        else:
            entry = {"name": node.name, "call": target_name(node.target), "args": encode(node.args)}
            if node.kwargs:
                entry["kwargs"] = {k: encode(v) for k, v in node.kwargs.items()}
            nodes.append(entry)
    return nodes


def target_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = getattr(target, "__module__", "")
    if module in MODULES and not isinstance(target, torch._ops.HigherOrderOperator):
        return f"{module}:{target.__name__}"
    raise ArtifactError(f"{target} is no plain operator", "leave control flow (cond, map, scan) to --engine inductor")


def encode(value: Any) -> Json:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [encode(v) for v in value]
    for kind, name in CONSTANTS.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ArtifactError(f"a graph argument of type {type(value).__name__} can't be stored")


def decode_graph(nodes: Json, tensors: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    """A GraphModule that runs the stored graph on these constants.

    Raises ArtifactError naming an operator that this host lacks.
    """
    graph = fx.Graph()
    root = torch.nn.Module()
    made: dict[str, Any] = {}
    for entry in nodes:
        kind = entry.get("op", "call")
        if kind == "output":
            graph.output(tuple(decode(v, made) for v in entry["args"]))
        elif kind == "placeholder":
            made[entry["name"]] = graph.placeholder(entry["name"])
        elif kind == "get_attr":
            flat = entry["target"].replace(".", "__")
            root.register_buffer(flat, tensors[entry["target"]])
            made[entry["name"]] = graph.get_attr(flat)
        else:
            args = tuple(decode(v, made) for v in entry["args"])
            kwargs = {k: decode(v, made) for k, v in entry.get("kwargs", {}).items()}
            made[entry["name"]] = graph.call_function(find_target(entry["call"]), args, kwargs)
    return fx.GraphModule(root, graph)


def decode(value: Json, made: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [decode(v, made) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return made[content]
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device(content)
    return getattr(torch, content)


def find_target(name: str) -> Any:
    module, colon, attribute = name.partition(":")
    if colon:
        return getattr(MODULES[module], attribute)
    namespace, operator_name, overload = name.split(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), operator_name), overload)
    except (AttributeError, RuntimeError):
        raise ArtifactError(
            f"the artifact needs the operator {namespace}::{operator_name}, which is not loaded here",
            f"import the package that defines {namespace}:: before grc.load()",
        ) from None
