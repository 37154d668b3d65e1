"""Rules for sums of looked-up rows with a weight for each, as masked means are written: a product, which pools them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from grc.graph.match import (
    argument,
    aten,
    attribute,
    call_arguments,
    finite,
    is_op,
    only_user,
    same_shape,
    same_size,
    shape,
    value,
)
from grc.graph.rewrite import Rewriter
from grc.passes.products import is_zero, weighted_rows


def weighted_sum(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """sum(w * E, 1) over looked-up rows `[B, S, D]`, with a weight `[B, S, 1]` for each: `[B, 1, S] @ [B, S, D]`.

    Inductor on a CPU would gather the numbers of such a sum one by one. A mask is a weight too: as a factor, and where what it
    hides is filled with zeros.
    """
    if not is_op(node, aten.sum) or argument(node, "dtype") is not None or "dim" not in call_arguments(node):
        return None
    product: Any = node.args[0]
    if not isinstance(value(product), Tensor) or value(product).dim() != 3 or only_user(product) is None:
        return None
    if [d % 3 for d in argument(node, "dim") or ()] != [1]:
        return None
    for rows, weights, shown in factors(edit, product):
        while is_op(weights, aten.expand):
            weights = weights.args[0]
        if not is_op(rows, aten.embedding) or not same_shape(rows, product):
            continue
        if not isinstance(weights, fx.Node) or not isinstance(value(weights), Tensor):
            continue
        (batch, steps, width), each = shape(rows), shape(weights)
        if len(each) != 3 or each[2] != 1 or not (same_size(each[0], batch) and same_size(each[1], steps)):
            continue
        dtype = value(rows).dtype
        if not isinstance(width, int) or value(product).dtype is not dtype:
            continue
        if value(weights).dtype.is_floating_point and value(weights).dtype is not dtype:
            continue
        if shown is not None and not is_finite(edit, rows.args[0]):  # as a product, a row that is hidden must be zero
            continue
        weights = edit.call(aten.logical_not.default, weights) if shown is False else weights
        weights = weights if value(weights).dtype is dtype else edit.call(aten.to.dtype, weights, dtype)
        total = weighted_rows(edit, weights, rows)
        return total if argument(node, "keepdim") else edit.reshape(total, -1, width)
    return None


def factors(edit: Rewriter, node: fx.Node) -> list[tuple[Any, Any, bool | None]]:
    """A product as rows and their weights, whichever they are. Where the weights only say which rows are filled with zeros,
    whether they are true of those that are shown."""
    if is_op(node, aten.mul):
        return [(node.args[0], node.args[1], None), (node.args[1], node.args[0], None)]
    if is_op(node, aten.masked_fill) and is_zero(edit, node.args[2]):
        return [(node.args[0], node.args[1], False)]
    if is_op(node, aten.where) and len(node.args) == 3:
        mask, yes, no = node.args
        return [(yes, mask, True)] if is_zero(edit, no) else [(no, mask, False)] if is_zero(edit, yes) else []
    return []


def is_finite(edit: Rewriter, table: Any) -> bool:
    tensor = attribute(edit.module, table)
    return tensor is not None and finite(tensor)
