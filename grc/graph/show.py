"""Show a graph to people: one line a value, with its shape and the user's line that made it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from grc.graph.match import where


def show(module: fx.GraphModule) -> str:
    """The graph as text. Constants first, then inputs, then one line per call: `%rows = grc.lookup(%arena, %ids)`."""
    return "\n".join(line(node) for node in module.graph.nodes) + "\n"


def line(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {text(node.args[0])}"
    kind = described(node.meta.get("val"))
    if node.op == "placeholder":
        return f"%{node.name} : {kind} = input"
    if node.op == "get_attr":
        return f"%{node.name} : {kind} = get_attr[{node.target}]"
    arguments = [text(a) for a in node.args] + [f"{k}={text(v)}" for k, v in node.kwargs.items()]
    origin = where(node)
    return f"%{node.name} : {kind} = {call_name(node.target)}({', '.join(arguments)})" + (
        f"  # {origin}" if origin else ""
    )


def call_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._opname}"
    return getattr(target, "__name__", str(target))


def text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        if len(value) > 8 and all(not isinstance(v, fx.Node) for v in value):
            head = ", ".join(text(v) for v in value[:3])
            return f"[{head}, ... {len(value)} values]"
        return "[" + ", ".join(text(v) for v in value) + "]"
    return str(value)


def described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}[{', '.join(str(s) for s in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(described(v) for v in value) + ")"
    return type(value).__name__
