"""Between which numbers a tensor of integers lies, by what it is made of."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from grc.graph.match import argument, aten, attribute, is_op, shape, static, value

VIEWS = (
    aten.reshape, aten.view, aten.unsqueeze, aten.squeeze, aten.expand, aten.permute, aten.transpose, aten.slice, aten.select,
    aten.clone, aten.contiguous, aten.to, aten._to_copy, aten.repeat, aten.flip, aten.gather, aten.index_select, aten.index,
)  # fmt: skip
PLACES = (aten.topk, aten.sort, aten.max, aten.min)  # (values, their places along a dim)

Interval = tuple[float, float]
ANY: Interval = (-math.inf, math.inf)


def interval(graph: fx.GraphModule, node: Any) -> Interval:
    """The least and the most that an element may be, infinite where nothing is known. A number stands for itself."""
    if isinstance(node, int):
        return node, node
    constant = attribute(graph, node)
    if constant is not None:
        return (float(constant.min()), float(constant.max())) if constant.numel() else (0, 0)
    if not isinstance(node, fx.Node) or node.op != "call_function" or floating(node):
        return ANY
    args = node.args
    if is_op(node, *VIEWS):
        return ANY if floating(args[0]) else interval(graph, args[0])
    if is_op(node, aten.cat):
        return around(graph, args[0])
    if is_op(node, aten.where) and len(args) == 3:
        return around(graph, args[1:])
    if is_op(node, aten.masked_fill):
        return around(graph, (args[0], args[2]))
    if is_op(node, aten.clamp, aten.clamp_min, aten.clamp_max, aten.minimum, aten.maximum):
        return clamped(graph, node)
    if is_op(node, aten.remainder):
        return 0, interval(graph, args[1])[1] - 1 if interval(graph, args[1])[0] > 0 else math.inf
    if is_op(node, aten.add, aten.sub) and len(args) == 2:
        (low, high), (less, more) = interval(graph, args[0]), interval(graph, args[1])
        return (low + less, high + more) if is_op(node, aten.add) else (low - more, high - less)
    if is_op(node, aten.arange):
        return ranged(args)
    return placed(node)


def floating(node: Any) -> bool:
    found = value(node)
    return hasattr(found, "dtype") and found.dtype.is_floating_point


def around(graph: fx.GraphModule, parts: Any) -> Interval:
    found = [interval(graph, part) for part in parts]
    return min(low for low, _ in found), max(high for _, high in found)


def clamped(graph: fx.GraphModule, node: fx.Node) -> Interval:
    low, high = interval(graph, node.args[0])
    least: Any = None
    most: Any = None
    if is_op(node, aten.clamp):
        least, most = argument(node, "min"), argument(node, "max")
    elif is_op(node, aten.clamp_min, aten.maximum):
        least = node.args[1]
    else:
        most = node.args[1]
    if least is not None:
        below, above = interval(graph, least)
        low, high = max(low, below), max(high, above)
    if most is not None:
        below, above = interval(graph, most)
        low, high = min(low, below), min(high, above)
    return low, high


def ranged(args: tuple[Any, ...]) -> Interval:
    """arange(end), arange(start, end) or arange(start, end, step)."""
    start, end, step = (0, *args, 1) if len(args) == 1 else (*args, 1) if len(args) == 2 else args
    if not (isinstance(start, int) and isinstance(step, int) and step > 0):
        return ANY
    return start, max(start, end - 1) if isinstance(end, int) else math.inf


def placed(node: fx.Node) -> Interval:
    """Places of a dim, as topk and argmax give them."""
    source: Any = node
    if getattr(node.target, "__name__", "") == "getitem" and node.args[1] == 1 and is_op(node.args[0], *PLACES):
        source = node.args[0]
    elif not is_op(node, aten.argmax, aten.argmin, aten.argsort):
        return ANY
    dim = argument(source, "dim")
    length: Any = shape(source.args[0])[dim] if isinstance(dim, int) else None
    return 0, length - 1 if static(length) else math.inf
