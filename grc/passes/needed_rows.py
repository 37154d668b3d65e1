"""Compute only the steps of a history that are read: a model that scores from the last step needs no other in its last
layer, so the selection moves up through everything that treats steps one by one, to the queries of the attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from grc.graph.match import argument, aten, is_op, shape, source_text, static, value, where
from grc.graph.rewrite import Rewriter
from grc.passes.manager import Change, Pass

STEPS = 1  # the dimension of [B, S, ...] that holds the steps
POINTWISE = (
    aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.neg, aten.relu, aten.gelu, aten.silu, aten.sigmoid, aten.tanh,
    aten.exp, aten.where, aten.masked_fill, aten.maximum, aten.minimum, aten.clamp, aten.to, aten._to_copy, aten.eq, aten.ne,
)  # fmt: skip


@dataclass(frozen=True)
class NeededRows(Pass):
    """`f(x)[:, i]` becomes `f(x[:, i:i+1])`, as far up as nothing else reads the other steps."""

    name = "needed-rows"

    def run(self, graph: fx.GraphModule) -> list[Change]:
        sink = Sink(Rewriter(graph))
        for node in list(graph.graph.nodes):
            if is_op(node, aten.select, aten.slice) and argument(node, "dim") == STEPS and selects_step(node):
                sink.begin(node)
        sink.settle()
        changes = [
            Change("needed-rows", where(n), source_text(n), f"{count} operations on {steps - 1} of {steps} steps")
            for n, count, steps in sink.report
            if count
        ]
        if changes:
            sink.edit.finish()
        return changes


def selects_step(node: fx.Node) -> bool:
    dims = shape(node.args[0])  # type: ignore[arg-type]
    one = is_op(node, aten.select) or shape(node)[STEPS] == 1
    return len(dims) >= 3 and static(dims[STEPS]) and dims[STEPS] > 1 and one and isinstance(step_of(node), int)


def step_of(node: fx.Node) -> Any:
    """The step that a select or a slice of one reads; a slice may begin before the first."""
    if is_op(node, aten.select):
        return argument(node, "index")
    start = argument(node, "start") or 0
    return max(start, -shape(node.args[0])[STEPS]) if isinstance(start, int) else start  # type: ignore[arg-type]


@dataclass
class Sink:
    """Slices of one step on their way up. `pending` are those that may move further."""

    edit: Rewriter
    pending: list[fx.Node] = field(default_factory=list)
    taken: dict[tuple[fx.Node, int, int], fx.Node] = field(default_factory=dict)
    report: list[tuple[fx.Node, int, int]] = field(default_factory=list)
    moved: int = 0

    def begin(self, node: fx.Node) -> None:
        """Write `select(x, 1, i)` as a slice of one step and a reshape; the slice of one is told by its place alone."""
        source: Any = node.args[0]
        steps = int(shape(source)[STEPS])
        index = step_of(node) % steps
        with self.edit.at(node):
            flat = self.take(source, STEPS, index)
            if is_op(node, aten.select):
                flat = self.edit.call(aten.squeeze.dim, flat, STEPS)
        self.edit.replace(node, flat)
        self.edit.graph.erase_node(node)
        self.moved = 0
        self.settle()
        self.report.append((flat, self.moved, steps))

    def settle(self) -> None:
        """Move slices up until none moves: one may wait for another to free the value that both read."""
        progress = True
        while progress:
            progress = False
            for row in list(self.pending):
                if row in self.pending and self.push(row):
                    progress = True

    def take(self, source: fx.Node, dim: int, index: int) -> fx.Node:
        """Step `index` of a value, made once however many ask for it."""
        key = (source, dim, index)
        if key not in self.taken:
            place = source.next if source.op == "call_function" else self.edit.origin
            origin = self.edit.origin
            with self.edit.at(place):
                self.edit.origin = source if source.op == "call_function" else origin
                self.taken[key] = self.edit.call(aten.slice.Tensor, source, dim, index, index + 1)
            self.edit.origin = origin
            self.pending.append(self.taken[key])
        return self.taken[key]

    def push(self, row: fx.Node) -> bool:
        source: Any = row.args[0]
        dim, index = int(row.args[1]), int(row.args[2])  # type: ignore[arg-type]
        if dim != STEPS or source.op != "call_function" or set(source.users) != {row}:
            return False
        with self.edit.at(row):
            new = self.above(source, index)
        if new is None:
            return False
        self.edit.replace(row, new)
        self.pending.remove(row)
        del self.taken[(source, dim, index)]
        self.edit.graph.erase_node(row)
        self.edit.graph.erase_node(source)
        self.moved += 1
        return True

    def above(self, node: fx.Node, index: int) -> fx.Node | None:
        """The operator of `node` on one step of its operands, or None where it mixes steps."""
        steps = shape(node)[STEPS]
        if is_op(node, *POINTWISE):
            args = [self.operand(a, value(node).dim(), steps, index) for a in node.args]
            return self.edit.call(node.target, *args, **node.kwargs)
        if is_op(node, aten.linear):
            return self.edit.call(node.target, self.take(node.args[0], STEPS, index), *node.args[1:])  # type: ignore[arg-type]
        if is_op(node, aten.layer_norm, aten.rms_norm) and len(node.args[1]) < value(node).dim() - STEPS:  # type: ignore[arg-type]
            source = self.take(node.args[0], STEPS, index)  # type: ignore[arg-type]
            return self.edit.call(node.target, source, *node.args[1:], **node.kwargs)
        if is_op(node, aten.unflatten) and argument(node, "dim") % value(node.args[0]).dim() > STEPS:
            return self.edit.call(node.target, self.take(node.args[0], STEPS, index), *node.args[1:])  # type: ignore[arg-type]
        if is_op(node, aten.slice) and argument(node, "dim") % value(node).dim() > STEPS:
            return self.edit.call(node.target, self.take(node.args[0], STEPS, index), *node.args[1:])  # type: ignore[arg-type]
        if getattr(node.target, "namespace", "") == "grc" and node.target._opname == "attention":  # type: ignore[union-attr]
            return self.attention(node, index)
        return None

    def operand(self, arg: Any, rank: int, steps: int, index: int) -> Any:
        """An operand of a pointwise operator: its step, or all of it where it is broadcast over steps."""
        if not isinstance(arg, fx.Node) or not isinstance(value(arg), torch.Tensor):
            return arg
        dim = STEPS - (rank - value(arg).dim())
        if dim < 0 or shape(arg)[dim] == 1:
            return arg
        return self.take(arg, dim, index)

    def attention(self, node: fx.Node, index: int) -> fx.Node | None:
        """One query against all keys. Under a causal mask only the last step sees them all."""
        q, k, v, bias, factor, scale, gain, kind, causal = node.args
        queries, keys = shape(q)[STEPS], shape(k)[STEPS]  # type: ignore[arg-type]
        if causal and not (static(keys) and queries == keys and index == queries - 1):
            return None
        masks = []
        for mask in (bias, factor):
            if isinstance(mask, fx.Node) and value(mask).dim() >= 2 and shape(mask)[-2] != 1:
                mask = self.take(mask, value(mask).dim() - 2, index)
            masks.append(mask)
        query = self.take(q, STEPS, index)  # type: ignore[arg-type]
        return self.edit.call(node.target, query, k, v, *masks, scale, gain, kind, False)
