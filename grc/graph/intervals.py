"""Between which numbers the integers of a graph lie, by what they are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from grc.graph.match import argument, aten, attribute, is_op, shape, static, value

# Each element is one of the first argument's.
MOVES = (
    aten.reshape, aten.view, aten.unsqueeze, aten.squeeze, aten.expand, aten.permute, aten.transpose, aten.slice, aten.select,
    aten.clone, aten.contiguous, aten.to, aten._to_copy, aten.repeat, aten.flip, aten.gather, aten.index_select, aten.index,
)  # fmt: skip
PLACES = (aten.topk, aten.sort, aten.max, aten.min)  # (values, their places along a dim)

Interval = tuple[float, float]
Known = Mapping[fx.Node, Interval]
ANY: Interval = (-math.inf, math.inf)


def intervals(graph: fx.GraphModule) -> dict[fx.Node, Interval]:
    """The least and the most that an element of each node may be, infinite where nothing is known."""
    known: dict[fx.Node, Interval] = {}
    for node in graph.graph.nodes:
        constant = attribute(graph, node)
        if constant is not None and constant.dtype in (torch.int32, torch.int64):  # bytes are tables, and may be large
            known[node] = (int(constant.min()), int(constant.max())) if constant.numel() else (0, 0)
        elif node.op == "call_function" and integers(value(node)):
            known[node] = made(known, node)
    return known


def interval(known: Known, node: Any) -> Interval:
    """That of a node, or of a number, which stands for itself."""
    return (node, node) if isinstance(node, int) else known.get(node, ANY)


def integers(found: Any) -> bool:
    kind = getattr(found, "dtype", torch.bool)
    return kind is not torch.bool and not kind.is_floating_point and not kind.is_complex


def made(known: Known, node: fx.Node) -> Interval:
    args = node.args
    if is_op(node, *MOVES):
        found, kind = interval(known, args[0]), torch.iinfo(value(node).dtype)
        kept = kind.bits >= 32 or (kind.min <= found[0] and found[1] <= kind.max)
        return found if kept else ANY  # a narrow type may have wrapped around
    if is_op(node, aten.cat):
        return around(known, args[0])
    if is_op(node, aten.where) and len(args) == 3:
        return around(known, args[1:])
    if is_op(node, aten.masked_fill):
        return around(known, (args[0], args[2]))
    if is_op(node, aten.clamp, aten.clamp_min, aten.clamp_max, aten.minimum, aten.maximum):
        return clamped(known, node)
    if is_op(node, aten.remainder):
        low, high = interval(known, args[1])
        return (0, high - 1) if low > 0 else ANY
    if is_op(node, aten.add, aten.sub) and len(args) == 2 and not node.kwargs:
        (low, high), (less, more) = interval(known, args[0]), interval(known, args[1])
        return (low + less, high + more) if is_op(node, aten.add) else (low - more, high - less)
    if is_op(node, aten.arange):
        return ranged(args)
    return placed(node)


def around(known: Known, parts: Any) -> Interval:
    found = [interval(known, part) for part in parts]
    return min(low for low, _ in found), max(high for _, high in found)


def clamped(known: Known, node: fx.Node) -> Interval:
    low, high = interval(known, node.args[0])
    least: Any = None
    most: Any = None
    if is_op(node, aten.clamp):
        least, most = argument(node, "min"), argument(node, "max")
    elif is_op(node, aten.clamp_min, aten.maximum):
        least = node.args[1]
    else:
        most = node.args[1]
    if least is not None:
        below, above = interval(known, least)
        low, high = max(low, below), max(high, above)
    if most is not None:
        below, above = interval(known, most)
        low, high = min(low, below), min(high, above)
    return low, high


def ranged(args: tuple[Any, ...]) -> Interval:
    """arange(end), arange(start, end) or arange(start, end, step)."""
    start, end, step = (0, *args, 1) if len(args) == 1 else (*args, 1) if len(args) == 2 else args
    if not (isinstance(start, int) and isinstance(step, int) and step > 0):
        return ANY
    return start, max(start, end - 1) if isinstance(end, int) else math.inf


def placed(node: fx.Node) -> Interval:
    """Places along a dim, as topk and argmax give them."""
    source: Any = node
    if getattr(node.target, "__name__", "") == "getitem" and node.args[1] == 1 and is_op(node.args[0], *PLACES):
        source = node.args[0]
    elif not is_op(node, aten.argmax, aten.argmin, aten.argsort):
        return ANY
    dim = argument(source, "dim")
    length: Any = shape(source.args[0])[dim] if isinstance(dim, int) else None
    return 0, length - 1 if static(length) else math.inf
