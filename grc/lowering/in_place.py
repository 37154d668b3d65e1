"""Operands of our kernels that are parts of one value: read where they lie, so that Inductor makes that value once."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import fx

from grc.graph.match import aten, is_op, same_size, shape, value
from grc.graph.rewrite import copy_graph

VIEWS = (
    aten.slice, aten.unflatten, aten.reshape, aten.view, aten.permute, aten.transpose, aten.select, aten.split,
    aten.split_with_sizes, aten.chunk, aten.unsqueeze, aten.squeeze,
)  # fmt: skip
MADE = (aten.silu, aten.gelu, aten.relu, aten.sigmoid, aten.tanh)


def with_parts_in_place(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph with Triton twins in which queries, keys and values that are parts of one activation are views.

    As slices of it, Inductor would compute each of them in a launch of its own (HSTU: silu(linear(x)) split in four).
    """
    copy = copy_graph(graph)
    for node in list(copy.graph.nodes):
        if getattr(node.target, "namespace", "") != "grc_cuda" or node.target._opname != "attention":
            continue
        bases = [base_of(operand) for operand in node.args[:3]]
        for place, (base, many) in enumerate(zip(bases, [Counter(bases)[b] for b in bases], strict=True)):
            operand = node.args[place]
            if base is None or many < 2 or not is_part(operand, base):
                continue
            with copy.graph.inserting_before(node):
                sizes = [
                    s if isinstance(s, int) else copy.graph.call_function(aten.sym_size.int, (base, 0))
                    for s in shape(operand)
                ]
                layout = value(operand).stride(), value(operand).storage_offset()
                view = copy.graph.call_function(aten.as_strided.default, (base, sizes, list(layout[0]), layout[1]))
            view.meta = dict(operand.meta)
            node.update_arg(place, view)
    copy.graph.eliminate_dead_code()
    copy.recompile()
    return copy


def base_of(node: Any) -> fx.Node | None:
    """The activation that a node is a view of, or None."""
    while isinstance(node, fx.Node) and (is_op(node, *VIEWS) or node.target is operator.getitem):
        node = node.args[0]
    return node if isinstance(node, fx.Node) and is_op(node, *MADE) else None


def is_part(node: fx.Node, base: fx.Node) -> bool:
    """Whether a view's place in its base does not depend on a size that varies, but for the batch."""
    part, whole = value(node), value(base)
    fixed = all(isinstance(number, int) for number in (*part.stride(), part.storage_offset()))
    batches = [size for size in part.shape if not isinstance(size, int)]
    same = all(same_size(size, whole.shape[0]) for size in batches)
    return isinstance(whole, torch.Tensor) and whole.is_contiguous() and fixed and same
