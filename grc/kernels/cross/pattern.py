"""Where the cross layer applies: x0 * linear(y) + x, written with its operands in any order."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from grc.graph.match import Miss, argument, aten, attribute, is_op, same_shape, same_size, value
from grc.graph.rewrite import Rewriter
from grc.kernels.cross import CROSS
from grc.kernels.fusion import Fused, Fusion


class Cross(Fusion):
    """x0 * (W y + b) + x: one product with its epilogue (DCN V2; Wang et al. 2021)."""

    name = "cross"
    op = CROSS
    anchors = (aten.add,)

    def fuse(self, edit: Rewriter, node: fx.Node) -> Fused | None:
        found = operands(node)
        if found is None:
            if by_vector(node):
                raise Miss("the cross layer weighs by one vector (DCN, 2017); only the matrix form has a kernel")
            return None
        x0, linear, x = found
        y, weight = linear.args[:2]
        bias = argument(linear, "bias")
        if attribute(edit.module, weight) is None:
            return None
        if not is_residual(y, x):  # some other product with a residual
            return None
        if len(linear.users) > 1:
            raise Miss("the product is read outside of the cross layer too")
        if value(x0).dim() != 2 or not same_shape(x0, x) or not same_shape(x0, linear):
            raise Miss(f"operands of shapes {[tuple(value(v).shape) for v in (x0, linear, x)]}, not all [B, D]")
        if value(node).dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise Miss(f"values are {value(node).dtype}")
        new = edit.call(CROSS.overload, x0, y, weight, bias, x)
        width = int(value(node).shape[1])
        return Fused(node, new, f"2 launches, {4 * 4 * width / 1024:.1f} KB a row")


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(x0, linear, x) of `mul(x0, linear) + x`."""
    if len(node.args) != 2 or argument(node, "alpha") != 1:
        return None
    for product, x in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        if not is_op(product, aten.mul) or not isinstance(x, fx.Node) or len(product.users) > 1:  # type: ignore[union-attr]
            continue
        for x0, linear in (product.args[:2], reversed(product.args[:2])):  # type: ignore[union-attr]
            if is_op(linear, aten.linear) and isinstance(x0, fx.Node) and x0.op != "get_attr":
                return x0, linear, x  # type: ignore[return-value]
    return None


def by_vector(node: fx.Node) -> bool:
    """True for `x0 (x . w) + b + x`: x0 `[B, D, 1]` times one number a row."""
    for product, x in (node.args, node.args[::-1]) if len(node.args) == 2 else ():
        if not isinstance(x, fx.Node) or x.op == "get_attr":
            continue
        while is_op(product, aten.reshape, aten.add):
            product = product.args[0]  # type: ignore[union-attr]
        if is_op(product, aten.bmm) and same_size(value(product.args[1]).numel(), value(product).shape[0]):  # type: ignore[union-attr]
            return is_op(product.args[1], aten.tensordot, aten.bmm, aten.reshape)  # type: ignore[union-attr]
    return False


def is_residual(y: Any, x: fx.Node) -> bool:
    """y is x itself (full rank), or a chain of linear layers and activations over x (low rank)."""
    for _ in range(4):
        if y is x:
            return True
        if not isinstance(y, fx.Node) or not is_op(y, aten.linear, aten.relu, aten.tanh):
            return False
        y = y.args[0]
    return False
