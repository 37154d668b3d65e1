"""Batched products of four-dimensional attention and of its three-dimensional form, with their dimensions named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from grc.graph.match import aten, is_op, value


@dataclass(frozen=True)
class Product:
    """`out = left right`, each with its dimensions named: b, h, n (queries), m (keys), d; g for b and h as one."""

    node: fx.Node
    left: fx.Node
    left_layout: str
    right: fx.Node
    right_layout: str
    out_layout: str


def scores(node: Any) -> Product | None:
    """q k^T of [B, H, N, M] or [G, N, M]; q on the left."""
    found = product(node)
    if found is None:
        return None
    left, right, a, b, out = found
    if len(out) == 4:
        names = dict(zip(out, "bhnm", strict=True))
    else:
        names = dict(zip(out, "gnm", strict=True))
    shared = [c for c in a if c in b and c not in out]
    if len(shared) != 1:
        return None
    names[shared[0]] = "d"
    if out[-2] in b:
        left, right, a, b = right, left, b, a
    return named(node, left, a, right, b, out, names, "n", "m")


def weighted_sum(node: Any) -> Product | None:
    """weights v, of weights [B, H, N, M] or [G, N, M]; the weights on the left."""
    found = product(node)
    if found is None:
        return None
    left, right, a, b, out = found
    shared = [c for c in a if c in b and c not in out]
    if len(shared) != 1:
        return None
    if a[-1] != shared[0] or not set(a[:-2]) <= set(b):
        left, right, a, b = right, left, b, a
    if a[-1] != shared[0]:
        return None
    names = dict(zip(a, "bhnm" if len(a) == 4 else "gnm", strict=True))
    own = [c for c in b if c not in names]
    if len(own) != 1:
        return None
    names[own[0]] = "d"
    return named(node, left, a, right, b, out, names, "m", "d")


def named(
    node: fx.Node, left: fx.Node, a: str, right: fx.Node, b: str, out: str, names: dict[str, str], *only_right: str
) -> Product | None:
    batch = {"b", "h"} if len(out) == 4 else {"g"}
    x, y, z = ("".join(names.get(c, "?") for c in letters) for letters in (a, b, out))
    if "?" in x + y + z or not batch <= set(x) & set(y) & set(z):
        return None
    if len(set(x)) != len(x) or len(set(y)) != len(y) or "n" not in x or "m" not in y or "n" in y:
        return None
    return Product(node, left, x, right, y, z)


def product(node: Any) -> tuple[fx.Node, fx.Node, str, str, str] | None:
    """(left, right) and one letter for each of their dimensions and of the result's, as an einsum would have them."""
    if is_op(node, aten.einsum):
        equation = str(node.args[0]).replace(" ", "")
        operands = list(node.args[1])
        if len(operands) != 2 or "->" not in equation or "." in equation:
            return None
        inputs, _, out = equation.partition("->")
        a, b = inputs.split(",")
        if not len(a) == len(b) == len(out) or len(out) not in (3, 4):
            return None
        return operands[0], operands[1], a, b, out
    if is_op(node, aten.matmul, aten.bmm):
        left, right = node.args[:2]
    elif is_op(node, aten.baddbmm):
        left, right = node.args[1:3]
    else:
        return None
    rank = value(node).dim()
    if rank not in (3, 4) or value(left).dim() != rank or value(right).dim() != rank:
        return None
    batch = "xy"[: rank - 2]
    return left, right, f"{batch}ij", f"{batch}jk", f"{batch}ik"
