"""Operands of our kernels that are parts of one value: read where they lie, so that Inductor makes that value once."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from grc.graph.match import aten, is_op, same_size, shape, static, value
from grc.graph.rewrite import copy_graph
from grc.kernels.attention.layout import PARTS, Affine, Sizes, affine, is_view

MADE = (aten.silu, aten.gelu, aten.relu, aten.sigmoid, aten.tanh)


def with_parts_in_place(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph with Triton twins in which queries, keys and values that are parts of one activation are views.

    As slices of it, Inductor would compute each of them in a launch of its own (HSTU: silu(linear(x)) split in four).
    """
    copy = copy_graph(graph)
    wholes: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    for node in copy.graph.nodes:
        if getattr(node.target, "namespace", "") != "grc_cuda" or node.target._opname != "attention":
            continue
        operands = node.args[:3]
        bases = [base_of(operand) for operand in operands]
        for place, (operand, base) in enumerate(zip(operands, bases, strict=True)):
            layout = None if base is None or bases.count(base) < 2 else layout_in(operand, base)
            if layout is None:
                continue
            key = base, value(operand).dtype
            if key not in wholes:
                with copy.graph.inserting_before(node):
                    whole = copy.graph.call_function(aten.to.dtype, key)
                    wholes[key] = copy.graph.call_function(aten.contiguous.default, (whole,))
            with copy.graph.inserting_before(node):
                node.update_arg(place, laid(copy.graph, wholes[key], operand, layout))
    copy.graph.eliminate_dead_code()
    copy.recompile()
    return copy


def laid(graph: fx.Graph, whole: fx.Node, like: fx.Node, layout: Affine) -> fx.Node:
    """A view of contiguous memory in the shape of another value, whose only unknown size is the batch of `whole`."""
    batch = graph.call_function(aten.sym_size.int, (whole, 0))
    sizes = [size if static(size) else batch for size in shape(like)]
    strides = [0 if stride is None else stride for stride in layout.strides]
    view = graph.call_function(aten.as_strided.default, (whole, sizes, strides, layout.offset))
    view.meta = {**like.meta, "val": value(like).to(value(whole).dtype)} if "val" in whole.meta else dict(like.meta)
    return view


def base_of(node: Any) -> fx.Node | None:
    """The activation that a node is a view of, or that view in another dtype; None where it is neither."""
    node = uncast(node)
    while is_view(node) or is_op(node, *PARTS):
        node = node.args[0]
    return node if is_op(node, *MADE) else None


def uncast(node: Any) -> Any:
    return node.args[0] if is_op(node, aten.to) else node


def layout_in(node: fx.Node, base: fx.Node) -> Affine | None:
    """Where a view's elements lie in its base, row by row; None where that is uneven, or sizes vary but for the batch."""
    batch, *rest = shape(base)
    if not all(map(static, rest)) or not all(static(size) or same_size(size, batch) for size in shape(node)):
        return None
    return affine(Sizes().positions(uncast(node), base))
