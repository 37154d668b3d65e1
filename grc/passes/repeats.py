"""Rules for values that are repeated: whichever way it was written, an expand, which stores nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from grc.graph.match import argument, aten, is_op, same_size, shape, static, value
from grc.graph.rewrite import Rewriter


def repeat_of_one(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """repeat and repeat_interleave along dimensions of one number: an expand."""
    if is_op(node, aten.repeat):
        source, times = node.args
        if len(times) != value(source).dim():  # type: ignore[arg-type]
            return None
        repeats = {dim: count for dim, count in enumerate(times) if count != 1}  # type: ignore[arg-type]
    elif is_op(node, aten.repeat_interleave) and counted(node.args[1]) and argument(node, "dim") is not None:
        source = node.args[0]
        repeats = {argument(node, "dim") % value(node).dim(): node.args[1]}
    else:
        return None
    if not all(same_size(shape(source)[dim], 1) for dim in repeats):  # type: ignore[arg-type]
        return None
    return edit.call(aten.expand.default, source, [repeats.get(dim, -1) for dim in range(value(node).dim())])


def repeat_of_rows(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """Each row of `[B, D]` several times, by repeat_interleave or a repeat that is cut into rows: an expand of `[B, 1, D]`."""
    if is_op(node, aten.repeat_interleave) and argument(node, "dim") in (0, -2):
        source, count = node.args[:2]
    elif is_op(node, aten.reshape) and is_op(node.args[0], aten.repeat):
        source, times = node.args[0].args  # type: ignore[union-attr]
        if len(times) != 2 or times[0] != 1:  # type: ignore[arg-type]
            return None
        count = times[1]  # type: ignore[index]
    else:
        return None
    if not counted(count) or value(source).dim() != 2 or value(node).dim() not in (2, 3):
        return None
    width = shape(source)[1]  # type: ignore[arg-type]
    steps = value(count) if isinstance(count, fx.Node) else count
    if not static(width) or not same_size(shape(node)[-1], width):
        return None
    if value(node).dim() == 3 and not same_size(shape(node)[1], steps):
        return None
    rows = edit.call(aten.expand.default, edit.reshape(source, -1, 1, width), [-1, count, -1])  # type: ignore[arg-type]
    return rows if value(node).dim() == 3 else edit.reshape(rows, -1, width)


def counted(count: Any) -> bool:
    """Whether a number of times is one number: not a tensor of several."""
    return isinstance(count, int) or (isinstance(count, fx.Node) and not isinstance(value(count), Tensor))
