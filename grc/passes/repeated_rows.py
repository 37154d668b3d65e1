"""Rows that are repeated, as a user's for each candidate, are repeated after the layers that read nothing else: two towers of
which one stands in front of a thousand items compute it once for a user, not once for an item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from grc.graph.match import argument, aten, attribute, is_op, same_size, shape, source_text, static, value, where
from grc.graph.rewrite import Rewriter
from grc.passes.manager import Change, Pass

POINTWISE = (
    aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.neg, aten.relu, aten.gelu, aten.silu, aten.sigmoid, aten.tanh,
    aten.exp, aten.sqrt, aten.rsqrt, aten.pow, aten.leaky_relu, aten.elu, aten.prelu, aten.softplus, aten.where, aten.gt,
    aten.ge, aten.lt, aten.le, aten.maximum, aten.minimum, aten.clamp, aten.clamp_min, aten.to, aten._to_copy,
)  # fmt: skip
OF_LAST = (
    aten.softmax, aten._softmax, aten.log_softmax, aten.linalg_vector_norm, aten.sum, aten.mean, aten.amax, aten.slice,
    aten.cat,
)  # fmt: skip
NORMS = (aten.layer_norm, aten.rms_norm)


@dataclass(frozen=True)
class Repeated:
    """A value `[B, count, D]`, or flat `[B * count, D]`, that repeats each of the rows `once`, `[B, D]`.

    `count` is what an expand takes: a number, or the node of one that varies.
    """

    once: fx.Node
    count: Any
    flat: bool
    layers: frozenset[fx.Node] = frozenset()

    def like(self, other: Repeated) -> bool:
        return self.count == other.count and self.flat == other.flat


@dataclass(frozen=True)
class RepeatedRows(Pass):
    """`f(repeat(x))` becomes `repeat(f(x))` where `f` treats rows one by one and holds a linear layer."""

    name = "repeated-rows"

    def run(self, graph: fx.GraphModule) -> list[Change]:
        edit = Rewriter(graph)
        known: dict[fx.Node, Repeated] = {}
        for node in list(graph.graph.nodes):
            if node.op == "call_function" and node.users:
                with edit.at(node):
                    found = begin(edit, node) or reshaped(known, node) or row_by_row(edit, known, node)
                if found is not None:
                    known[node] = found
        saved: dict[fx.Node, Any] = {}
        for node, rows in known.items():
            readers = [user for user in node.users if user not in known]
            if rows.layers and readers:
                saved |= dict.fromkeys(rows.layers - saved.keys(), rows.count)
                with edit.at(node):
                    whole = repeat(edit, rows)
                node.replace_all_uses_with(whole, delete_user_cb=lambda user, readers=readers: user in readers)  # type: ignore[misc]
        edit.finish()
        return [Change("repeated rows", *line, saves=text) for line, text in told(saved)]


def told(saved: dict[fx.Node, Any]) -> list[tuple[tuple[str, str], str]]:
    """One line for the layers of each line of the model."""
    lines: dict[tuple[tuple[str, str], str], int] = {}
    for layer, count in saved.items():
        key = (where(layer), source_text(layer)), str(count) if static(count) else "several"
        lines[key] = lines.get(key, 0) + 1
    return [
        (line, f"{layers} layer{'s' * (layers > 1)} on 1 of {count} rows") for (line, count), layers in lines.items()
    ]


def repeat(edit: Rewriter, rows: Repeated) -> fx.Node:
    width = shape(rows.once)[1]
    whole = edit.call(aten.expand.default, edit.reshape(rows.once, -1, 1, width), [-1, rows.count, -1])
    return edit.reshape(whole, -1, width) if rows.flat else whole


def begin(edit: Rewriter, node: fx.Node) -> Repeated | None:
    """`[B, 1, D]` expanded to `[B, N, D]`."""
    if not is_op(node, aten.expand) or value(node).dim() != 3 or value(node.args[0]).dim() != 3:
        return None
    (batch, steps, width), (one_batch, one, one_width) = shape(node), shape(node.args[0])  # type: ignore[arg-type]
    same = same_size(batch, one_batch) and same_size(width, one_width) and static(width)
    if not same or not same_size(one, 1) or same_size(steps, 1):
        return None
    return Repeated(edit.reshape(node.args[0], -1, width), node.args[1][1], False)  # type: ignore[index, arg-type]


def reshaped(known: dict[fx.Node, Repeated], node: fx.Node) -> Repeated | None:
    """The same rows flat, or of a flat value those of each user again."""
    rows = known.get(node.args[0]) if is_op(node, aten.reshape) else None  # type: ignore[arg-type]
    if rows is None or not same_size(shape(node)[-1], shape(rows.once)[1]):
        return None
    if value(node).dim() == 2 and not rows.flat:
        return Repeated(rows.once, rows.count, True, rows.layers)
    steps = value(rows.count) if isinstance(rows.count, fx.Node) else rows.count
    if value(node).dim() == 3 and rows.flat and same_size(shape(node)[1], steps):
        return Repeated(rows.once, rows.count, False, rows.layers)
    return None


def row_by_row(edit: Rewriter, known: dict[fx.Node, Repeated], node: fx.Node) -> Repeated | None:
    """What an operator gives of one row of each, where it treats rows one by one and reads no others."""
    read = [operand for operand in node.all_input_nodes if isinstance(value(operand), Tensor)]
    rows = [known[operand] for operand in read if operand in known]
    if not rows or not all(r.like(rows[0]) for r in rows) or not isinstance(value(node), Tensor):
        return None
    first, rank = rows[0], 2 if rows[0].flat else 3
    if value(node).dim() != rank or not static(shape(node)[-1]):
        return None
    constants = [attribute(edit.module, operand) for operand in read if operand not in known]
    if any(c is None or (c.dim() > 1 and not is_op(node, aten.linear)) for c in constants):
        return None
    if is_op(node, aten.prelu) and value(node.args[1]).numel() != 1:
        return None  # of three dimensions, it has a slope for each of the second
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n].once if n in known else n)
    layers = frozenset().union(*(r.layers for r in rows))
    if is_op(node, aten.linear):
        if node.args[0] not in known or len(rows) > 1:
            return None
        layers |= {node}
    elif is_op(node, aten.expand):
        # along the width alone, as a row's norm is; the rows are as many
        if not same_size(shape(node)[-2], shape(node.args[0])[-2]):  # type: ignore[arg-type]
            return None
        args, kwargs = (args[0], [-1, shape(node)[-1]]), {}
    elif is_op(node, *OF_LAST):
        dims = argument(node, "dim")
        if dims is None or [d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])] != [rank - 1]:
            return None
        args, kwargs = with_dim(node, args, kwargs, [1] if isinstance(dims, (list, tuple)) else 1)
    elif is_op(node, *NORMS):
        if len(node.args[1]) != 1:  # type: ignore[arg-type]
            return None
    elif not is_op(node, *POINTWISE):
        return None
    return Repeated(edit.call(node.target, *args, **kwargs), first.count, first.flat, layers)


def with_dim(node: fx.Node, args: Any, kwargs: Any, dim: Any) -> tuple[Any, Any]:
    """The arguments of a call with another `dim`."""
    names = [entry.name for entry in node.target._schema.arguments]  # type: ignore[union-attr]
    place = names.index("dim")
    if place < len(args):
        return (*args[:place], dim, *args[place + 1 :]), kwargs
    return args, {**kwargs, "dim": dim}
