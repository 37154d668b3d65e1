"""q, k and v as views of their projections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from grc.graph.match import argument, aten, is_op, value
from grc.graph.rewrite import Rewriter
from grc.kernels.attention.layout import PARTS, Affine, Sizes, affine, folded, is_view, origin


@dataclass
class Heads:
    """Brings operands to [batch, length, heads, width]; `heads` is None where heads are a dimension already."""

    edit: Rewriter
    heads: int | None
    sizes: Sizes = field(default_factory=Sizes)
    turned: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def operand(self, node: fx.Node, layout: str) -> tuple[fx.Node, float]:
        """The operand, and what it is still to be multiplied with.

        `layout` names the dimensions of `node`: b, h, l (length), d; g where batch and heads are one.
        """
        start, scale = origin(node)
        found = self.where(node, start, layout)
        view = None if found is None else self.view(start, found, self.canonical(self.sizes.shape(node), layout))
        if view is not None:
            return view, scale
        if "g" in layout:
            node = self.edit.call(aten.unflatten.int, node, 0, [-1, self.heads])
            layout = layout.replace("g", "bh")
        order = [layout.index(c) for c in "blhd"]
        return (node if order == [0, 1, 2, 3] else self.edit.call(aten.permute.default, node, order)), 1.0

    def canonical(self, shape: list[int], layout: str) -> list[int]:
        """Sizes in the order b, l, h, d."""
        named = dict(zip(layout, shape, strict=True))
        if "g" in named:
            assert self.heads is not None
            named["b"], named["h"] = named["g"] // self.heads, self.heads
        return [named[c] for c in "blhd"]

    def where(self, node: fx.Node, start: fx.Node, layout: str) -> Affine | None:
        if start is node:
            return None
        positions = self.sizes.positions(node, start)
        if "g" in layout:
            positions = positions.unflatten(0, (-1, self.heads))
            layout = layout.replace("g", "bh")
        return affine(positions.permute([layout.index(c) for c in "blhd"]))

    def view(self, start: fx.Node, at: Affine, shape: list[int]) -> fx.Node | None:
        """The operand cut out of a projection's [B, L, W], [L, B, W] or [B * L, W]."""
        batch, length, heads, width = shape
        sizes = self.sizes.shape(start)
        wide = sizes[-1] if sizes else 0
        per_head = width if at.strides[2] is None else at.strides[2]
        column = at.offset
        inside = column >= 0 and column + (heads - 1) * per_head + width <= wide and per_head >= width
        if not inside or at.strides[3] not in (1, None):
            return None
        steps = (at.strides[0], at.strides[1])
        if sizes == [batch, length, wide] and fits(steps, (length * wide, wide)):
            base = start
        elif sizes == [length, batch, wide] and fits(steps, (wide, batch * wide)):
            base = self.batch_first(start)
        elif sizes == [batch * length, wide] and fits(steps, (length * wide, wide)) and static(start, length):
            base = self.edit.call(aten.unflatten.int, start, 0, [-1, length])
        else:
            return None
        if per_head == width:
            part = self.cut(base, 2, column, heads * width, wide)
            return self.edit.call(aten.unflatten.int, part, 2, [heads, width])
        if wide % per_head or column % per_head + width > per_head:
            return None
        base = self.edit.call(aten.unflatten.int, base, 2, [wide // per_head, per_head])
        base = self.cut(base, 2, column // per_head, heads, wide // per_head)
        return self.cut(base, 3, column % per_head, width, per_head)

    def cut(self, node: fx.Node, dim: int, begin: int, size: int, whole: int) -> fx.Node:
        return node if size == whole else self.edit.call(aten.slice.Tensor, node, dim, begin, begin + size)

    def batch_first(self, start: fx.Node) -> fx.Node:
        """A linear layer of [L, B, W] with the transposition that it reads taken away; else the value transposed."""
        if start in self.turned:
            return self.turned[start]
        x = start.args[0] if is_op(start, aten.linear) else None
        only_views = all(is_view(user) or is_op(user, *PARTS) for user in start.users)
        if x is not None and swaps_first_two(x) and only_views:
            bias = argument(start, "bias")
            weight = folded(self.edit, start.args[1])  # type: ignore[arg-type]
            bias = folded(self.edit, bias) if isinstance(bias, fx.Node) else None
            new = self.edit.call(aten.linear.default, x.args[0], weight, bias)  # type: ignore[union-attr]
        else:
            new = self.edit.call(aten.transpose.int, start, 0, 1)
        self.turned[start] = new
        return new


def fits(steps: tuple[int | None, int | None], wanted: tuple[int, int]) -> bool:
    return all(step is None or step == want for step, want in zip(steps, wanted, strict=True))


def static(node: fx.Node, length: int) -> bool:
    """True where only the batch of a [B * L, W] varies, so that L is a number."""
    rows = value(node).shape[0]
    return isinstance(rows, int) or len(rows.node.expr.free_symbols) == 1


def swaps_first_two(node: Any) -> bool:
    if is_op(node, aten.transpose) and value(node).dim() == 3:
        return sorted(argument(node, name) % 3 for name in ("dim0", "dim1")) == [0, 1]
    return is_op(node, aten.permute) and [d % value(node).dim() for d in node.args[1]] == [1, 0, 2]


def head_count(node: fx.Node) -> int:
    """How many heads are folded into the first dimension of a [B * H, L, D], seen from the projection; else 1."""
    (start, _), sizes = origin(node), Sizes()
    if start is node:
        return 1
    positions, wide = sizes.positions(node, start), sizes.shape(start)[-1]
    rows = len(positions)
    for heads in (h for h in range(1, rows + 1) if rows % h == 0):
        found = affine(positions.unflatten(0, (-1, heads)))
        if found is None:
            continue
        batch, head = (step or 0 for step in found.strides[:2])
        if batch % wide == 0 and (heads - 1) * head < wide:  # heads lie within a row of the projection, users do not
            return heads
    return 1
