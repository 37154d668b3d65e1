"""The result as what the output projection reads: views that only undo the order of heads and steps go away."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from grc.graph.match import argument, aten, is_op, only_user, value
from grc.graph.rewrite import Rewriter
from grc.kernels.attention.layout import Sizes, constant, folded, is_view


def replacement(
    edit: Rewriter, sizes: Sizes, old: fx.Node, layout: str, new: fx.Node, heads: int
) -> tuple[fx.Node, fx.Node]:
    """The node to replace, and what replaces it: `new` is [B, N, H * V], `old` has the dimensions of `layout`.

    Exported attention is often steps first, so that the output projection stands between two transpositions: then the
    projection reads `new`, and all three go away.
    """
    batch, length, width = sizes.shape(new)
    natural = torch.arange(batch * length * width, dtype=torch.int32).view(batch, length, width)
    by_head = natural.unflatten(2, (heads, -1)).permute(["blhd".index(c) for c in layout.replace("g", "bh")])
    positions = by_head.flatten(0, 1) if "g" in layout else by_head
    apart: fx.Node | None = None
    for node, here in walk(sizes, old, positions):
        if same(here, natural):
            return node, new
        if same(here, natural.flatten(0, 1)):
            return node, edit.call(aten.flatten.using_ints, new, 0, 1)
        if same(here, natural.unflatten(2, (heads, -1))):
            apart = node
    projection = only_user(node)
    if apart is None and projection is not None and is_projection(edit, projection, node, here, width):
        wide = int(value(projection).shape[-1])
        rows = here.reshape(-1, width)[:, :1] // width
        start = (rows * wide + torch.arange(wide, dtype=torch.int32)).view(sizes.shape(projection))
        wanted = torch.arange(batch * length * wide, dtype=torch.int32).view(batch, length, wide)
        for node, here in walk(sizes, projection, start):
            if same(here, wanted):
                return node, project(edit, projection, new)
    split = edit.call(aten.unflatten.int, new, 2, [heads, -1])
    if apart is not None:
        return apart, split
    ordered = edit.call(aten.permute.default, split, ["blhd".index(c) for c in layout.replace("g", "bh")])
    return old, edit.call(aten.flatten.using_ints, ordered, 0, 1) if "g" in layout else ordered


def walk(sizes: Sizes, node: fx.Node, positions: Tensor) -> Iterator[tuple[fx.Node, Tensor]]:
    """A value and the views that alone read it, each with the positions of its elements."""
    yield node, positions
    while (user := only_user(node)) is not None and is_view(user) and user.args[0] is node:
        node, positions = user, sizes.step(user, positions)
        yield node, positions


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def is_projection(edit: Rewriter, node: fx.Node, x: fx.Node, positions: Tensor, width: int) -> bool:
    """A linear layer of constant weights that reads whole rows of the result."""
    if not is_op(node, aten.linear) or node.args[0] is not x or positions.shape[-1] != width:
        return False
    weights = [w for w in (node.args[1], argument(node, "bias")) if w is not None]
    rows = positions.reshape(-1, width)
    starts = rows[:, :1]
    whole = torch.equal(rows, starts + torch.arange(width, dtype=torch.int32)) and not (starts % width).any()
    return whole and all(constant(edit.module, w) is not None for w in weights)


def project(edit: Rewriter, linear: fx.Node, new: fx.Node) -> fx.Node:
    bias = argument(linear, "bias")
    weight = folded(edit, linear.args[1])  # type: ignore[arg-type]
    return edit.call(aten.linear.default, new, weight, folded(edit, bias) if isinstance(bias, fx.Node) else None)
