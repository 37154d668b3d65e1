"""Rules for interactions written as loops over pairs of features: one product of all features with themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from grc.graph.match import argument, aten, is_op, only_user, same_shape, same_size, shape, value
from grc.graph.rewrite import Rewriter

FEWEST = 3  # pairs; below, the products of a loop cost no more than one bmm


def pairs_of_loop(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """stack or cat of `sum(e_i * e_j)` for many pairs: picks from `T @ T^T`."""
    if is_op(node, aten.stack, aten.cat):
        parts = list(node.args[0])  # type: ignore[arg-type]
        rank = 2 if is_op(node, aten.stack) else value(parts[0]).dim()
        if rank != 2 or value(node).dim() != 2 or argument(node, "dim") not in (1, -1):
            return None
        products = [pair_product(part) for part in parts]
        return picked(edit, products) if all(products) else None  # type: ignore[arg-type]
    return None


def pairs_of_cats(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """`sum(P * Q)` over the width, where P and Q join the first and the second rows of many pairs: picks from `T @ T^T`.

    The inner products of a product network (Qu et al. 2016) are written like this.
    """
    if not is_op(node, aten.sum) or len(node.args) < 2 or not is_op(node.args[0], aten.mul):
        return None
    sides = [rows_of_cat(side) for side in node.args[0].args]  # type: ignore[union-attr]
    if not all(sides) or list(node.args[1]) not in ([2], [-1]) or value(node.args[0]).dtype != value(node).dtype:  # type: ignore[arg-type]
        return None
    first, second = sides
    if len(first) != len(second):  # type: ignore[arg-type]
        return None
    chosen = picked(edit, list(zip(first, second, strict=True)))  # type: ignore[arg-type]
    return chosen if chosen is None or value(node).dim() == 2 else edit.reshape(chosen, -1, len(first), 1)  # type: ignore[arg-type]


def rows_of_cat(node: Any) -> list[fx.Node] | None:
    """The rows `[B, D]` that `[B, M, D]` joins, or None."""
    if not is_op(node, aten.reshape) or not is_op(node.args[0], aten.cat) or value(node).dim() != 3:
        return None
    rows, width = list(node.args[0].args[0]), shape(node)[2]
    joined = value(node.args[0]).dim() == 2 and argument(node.args[0], "dim") in (1, -1)
    return rows if joined and all(same_size(shape(row)[1], width) for row in rows) else None


def sum_of_loop(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """`sum(e_1 * e_2) + sum(e_1 * e_3) + ...`, the second-order term as its definition has it: a sum of picks."""
    if not is_op(node, aten.add) or any(is_op(user, aten.add) and adds(user) for user in node.users):
        return None
    leaves: list[Any] = []
    waiting: list[Any] = [node]
    while waiting:
        part = waiting.pop()
        if is_op(part, aten.add) and adds(part) and (part is node or only_user(part) is not None):
            waiting += part.args[:2]
        elif part not in (0, 0.0):
            leaves.append(part)
    products = [pair_product(leaf) for leaf in leaves]
    if not all(products):
        return None
    chosen = picked(edit, products, ordered=False)  # type: ignore[arg-type]
    if chosen is None:
        return None
    return edit.call(aten.sum.dim_IntList, chosen, [1], value(node).dim() == 2)


def adds(node: fx.Node) -> bool:
    return len(node.args) == 2 and argument(node, "alpha") == 1


def pair_product(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """(a, b) of `sum(a * b, 1)` over rows `[B, D]`."""
    while is_op(node, aten.reshape) and value(node).dim() <= 2 and is_op(node.args[0], aten.reshape, aten.sum):
        node = node.args[0]
    if not is_op(node, aten.sum) or not is_op(node.args[0], aten.mul) or value(node.args[0]).dim() != 2:
        return None
    dims = argument(node, "dim") if len(node.args) > 1 else [0, 1]
    a, b = node.args[0].args[:2]
    if [d % 2 for d in (dims if isinstance(dims, (list, tuple)) else [dims])] != [1]:
        return None
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or not same_shape(a, b):
        return None
    return (a, b) if value(a).dtype == value(b).dtype == value(node).dtype else None


def picked(edit: Rewriter, products: Sequence[tuple[fx.Node, fx.Node]], ordered: bool = True) -> fx.Node | None:
    """`(T @ T^T)[:, i, j]` with T the factors in the order of the graph, where at least half of a triangle is wanted.

    Without `ordered` the picks go row by row, whatever the order of the products.
    """
    factors = {factor for pair in products for factor in pair}
    count = len(factors)
    if len(products) < max(FEWEST, count * (count - 1) // 4) or len({str(shape(f)) for f in factors}) != 1:
        return None
    rows = [node for node in edit.graph.nodes if node in factors]
    index = {factor: i for i, factor in enumerate(rows)}
    width = shape(rows[0])[1]
    if not isinstance(width, int):
        return None
    tile = edit.reshape(edit.call(aten.cat.default, rows, 1), -1, count, width)
    gram = edit.call(aten.bmm.default, tile, edit.call(aten.transpose.int, tile, 1, 2))
    picks = [(index[a], index[b]) for a, b in products]
    if not ordered:
        picks = sorted((max(pick), min(pick)) for pick in picks)
    places = [edit.parameter("pairs", torch.tensor([pick[side] for pick in picks])) for side in (0, 1)]
    return edit.call(aten.index.Tensor, gram, [None, *places])
