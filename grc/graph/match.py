"""Matching: read the arguments of aten calls by name, follow values through views, and say why something does not match."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


class Miss(Exception):
    """A fusion almost applies; the message is the reason that it does not."""


def is_op(value: object, *packets: Any) -> bool:
    """True when `value` is a call of one of these operators (any overload)."""
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return False
    target = value.target
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    return packet in packets


def argument(node: fx.Node, name: str) -> Any:
    """An argument by its schema name, whether it was passed by position, by keyword, or left at its default."""
    if name in node.kwargs:
        return node.kwargs[name]
    for position, arg in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if arg.name == name:
            return node.args[position] if position < len(node.args) else arg.default_value
    raise KeyError(f"{node.target} has no argument {name}")


def call_arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call by name, in the order of its schema, defaults filled in."""
    return {entry.name: argument(node, entry.name) for entry in node.target._schema.arguments}  # type: ignore[union-attr]


def value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def static(size: Any) -> bool:
    return isinstance(size, int)


def same_size(a: Any, b: Any) -> bool:
    """Equal as expressions: no guard is added to the graph's symbols."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return str(a) == str(b)


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    x, y = shape(a), shape(b)
    return len(x) == len(y) and all(same_size(i, j) for i, j in zip(x, y, strict=True))


def attribute(module: fx.GraphModule, node: Any) -> torch.Tensor | None:
    """The tensor behind a get_attr node."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found: Any = module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found if isinstance(found, torch.Tensor) else None


def constant_list(module: fx.GraphModule, node: Any) -> list[int] | None:
    """The values of a small integer constant."""
    tensor = attribute(module, node)
    if tensor is None or tensor.is_floating_point() or tensor.numel() > 1 << 20:
        return None
    return tensor.flatten().tolist()


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
TORCH = f"{Path(torch.__file__).parent}/"
INSTALLED = ("site-packages", "dist-packages", sysconfig.get_path("stdlib"))


def where(node: fx.Node) -> str:
    """`file.py:41` of the line that made a value, as `source_line` chooses it."""
    return source_line(node)[0]


def source_text(node: fx.Node) -> str:
    """That line itself, as the stack trace has it."""
    return source_line(node)[1]


def source_line(node: fx.Node) -> tuple[str, str]:
    """The innermost line of the user's own files; of a model that is a library's, the innermost that is not torch's."""
    lines = (node.meta.get("stack_trace") or "").strip().splitlines()
    frames = [(i, found) for i, line in enumerate(lines) if (found := FRAME.search(line))]
    model = [f for f in frames if not f[1]["file"].startswith((TORCH, "torch/"))]
    own = [f for f in model if not any(folder in f[1]["file"] for folder in INSTALLED)]
    chosen = own or model or frames
    if not chosen:
        return "", ""
    place, found = chosen[-1]
    text = lines[place + 1].strip() if place + 1 < len(lines) else ""
    return f"{found['file'].rpartition('/')[2]}:{found['line']}", text


def finite(tensor: torch.Tensor) -> bool:
    """Whether a constant holds neither NaN nor infinity, found without anything of its size."""
    return not tensor.numel() or all(bool(torch.isfinite(end)) for end in tensor.aminmax())
