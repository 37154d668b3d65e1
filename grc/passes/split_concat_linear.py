"""A linear layer over a concatenation that says things twice: each value is multiplied once, by the sum of its weights.

Target attention (DIN; Zhou et al. 2018, figure 2) reads [t, h, t - h, t * h] with t the same for every step of the
history: W [t; h; t - h; t * h] = (W1 + W3) t + (W2 - W3) h + W4 (t * h), where the first term is one row a user and not
one a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from grc.graph.match import Miss, argument, aten, attribute, is_op, shape, value
from grc.graph.rewrite import Rewriter
from grc.passes.manager import Change, Pass, rewritten


@dataclass
class Sum:
    """Values and the weights [N, D] that they are multiplied with, in order of appearance."""

    values: list[fx.Node] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def add(self, node: fx.Node, weight: Tensor) -> None:
        if node in self.values:
            self.weights[self.values.index(node)] += weight
        else:
            self.values.append(node)
            self.weights.append(weight.clone())

    def flatten(self) -> None:
        """Give the weights of a concatenation to its parts where those are multiplied too."""
        for node in list(self.values):
            parts: Any = node.args[0] if is_op(node, aten.cat) else None
            if parts is None or not all(part in self.values for part in parts):
                continue
            if argument(node, "dim") % value(node).dim() != value(node).dim() - 1:
                continue
            at = self.values.index(node)
            weight = self.weights.pop(at)
            del self.values[at]
            for part, block in zip(parts, weight.split([shape(part)[-1] for part in parts], 1), strict=True):
                self.add(part, block)

    @property
    def width(self) -> int:
        return sum(weight.shape[1] for weight in self.weights)


@dataclass(frozen=True)
class SplitConcatLinear(Pass):
    """Multiply each part of a concatenation once, and what is the same in all rows once for all of them."""

    name = "split-concat-linear"

    def run(self, graph: fx.GraphModule) -> list[Change]:
        edit = Rewriter(graph)
        joined = [n for n in graph.graph.nodes if is_op(n, aten.linear) and is_op(steps(n.args[0]), aten.cat)]
        return rewritten(
            edit, [(self.name, node) for node in joined], lambda node: split(edit, node, steps(node.args[0]))
        )


def steps(node: Any) -> Any:
    """[B, S, D] behind [B * S, D]: the steps of a history as rows."""
    flat = is_op(node, aten.reshape) and value(node).dim() == 2 and shape(node)[-1] == shape(node.args[0])[-1]
    return node.args[0] if flat else node


def split(edit: Rewriter, node: fx.Node, cat: Any) -> str | None:
    """Rewrite one linear layer over a concatenation; what that saves, or None where every part is there once."""
    parts = list(cat.args[0])
    if not any(is_op(part, aten.add, aten.sub, aten.neg, aten.expand) or flat_repeat(part) for part in parts):
        return None
    if argument(cat, "dim") % value(cat).dim() != value(cat).dim() - 1:
        return None
    weight = attribute(edit.module, node.args[1])
    if weight is None:
        raise Miss("the weight is not a constant")
    if not weight.is_floating_point():
        raise Miss(f"the weight is {str(weight.dtype).removeprefix('torch.')}")
    every, shared = Sum(), Sum()
    column, counts = 0, []
    for part in parts:
        width = shape(part)[-1]
        if not isinstance(width, int):
            raise Miss("a part's width varies")
        block = weight.detach()[:, column : column + width].double()
        column += width
        for term, sign in terms(part):
            rows = one_row(term, cat)
            if rows is None and shape(term)[:-1] != shape(part)[:-1]:
                raise Miss(f"a part of shape {list(map(str, shape(term)))} is broadcast")
            if rows is not None and (repeat := flat_repeat(term)) is not None:
                counts.append(repeat.args[1][1])  # type: ignore[index]
            (every if rows is None else shared).add(term if rows is None else rows, sign * block)
    if any(count != counts[0] for count in counts):
        raise Miss("rows are repeated a different number of times")
    every.flatten()
    if not every.values or every.width >= column:
        return None
    bias = argument(node, "bias")
    new = product(edit, every, weight.dtype, None if shared.values else bias)
    if shared.values:
        new = edit.reshape(new, -1, counts[0], len(weight)) if counts else new
        new = edit.call(aten.add.Tensor, new, product(edit, shared, weight.dtype, bias))
        new = edit.reshape(new, -1, len(weight)) if counts else new
    edit.replace(node, new if cat is node.args[0] else edit.reshape(new, -1, len(weight)))
    return f"{column - every.width} of {column} columns"


def product(edit: Rewriter, total: Sum, dtype: torch.dtype, bias: fx.Node | None) -> fx.Node:
    joined = total.values[0]
    if len(total.values) > 1:
        joined = edit.call(aten.cat.default, total.values, value(joined).dim() - 1)
    weight = edit.parameter("split_weight", torch.cat(total.weights, 1).to(dtype).contiguous())
    return edit.call(aten.linear.default, joined, weight, bias)


def terms(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """A value as a signed sum of others."""
    if is_op(node, aten.neg):
        return [(term, -sign) for term, sign in terms(node.args[0])]  # type: ignore[arg-type]
    tensors = len(node.args) == 2 and all(isinstance(value(a), Tensor) for a in node.args)
    if is_op(node, aten.add, aten.sub) and tensors and argument(node, "alpha") == 1:
        a, b = node.args
        if all(shape(x)[-1] == shape(node)[-1] and value(x).dim() == value(node).dim() for x in (a, b)):  # type: ignore[arg-type]
            other = -1 if is_op(node, aten.sub) else 1
            return [*terms(a), *((term, other * sign) for term, sign in terms(b))]  # type: ignore[arg-type]
    return [(node, 1)]


def one_row(node: fx.Node, like: fx.Node) -> fx.Node | None:
    """The [..., 1, D] that is repeated over the rows of `like`, or None."""
    if value(like).dim() == 2:
        repeat = flat_repeat(node)
        return None if repeat is None else repeat.args[0]  # type: ignore[return-value]
    source: Any = node
    while is_op(source, aten.expand) and shape(source)[-1] == shape(source.args[0])[-1]:
        source = source.args[0]
    if value(like).dim() < 3 or value(source).dim() != value(like).dim() or shape(like)[-2] == 1:
        return None
    rest = [i for i in range(value(like).dim() - 1) if i != value(like).dim() - 2]
    same = all(str(shape(source)[i]) == str(shape(like)[i]) for i in rest)
    return source if same and shape(source)[-2] == 1 else None


def flat_repeat(node: fx.Node) -> fx.Node | None:
    """The expand of [B, 1, D] to [B, S, D] behind [B * S, D], as a user's row is repeated for each candidate."""
    source: Any = steps(node)
    if source is node or not is_op(source, aten.expand) or value(source).dim() != 3:
        return None
    return source if one_row(source, source) is not None else None
