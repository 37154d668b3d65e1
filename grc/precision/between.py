"""What lies between layers of 16 bits on a GPU, kept in 16 bits too: residuals, normalisations, activations and views.

Values are widened after a layer and narrowed before the next one; the widening moves down as far as operators allow that keep
numbers of about the same size. What comes from an input is left alone: a count or a time may be beyond float16.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from grc.graph.match import aten, attribute, is_op, value
from grc.graph.rewrite import copy_graph
from grc.kernels.quantised_linear.panels import HALVES
from grc.precision.gpu import Narrower

VIEWS = (
    aten.reshape, aten.view, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze, aten.permute, aten.transpose,
    aten.expand, aten.slice, aten.select, aten.split, aten.clone, aten.contiguous,
)  # fmt: skip
PASSING = (
    *VIEWS, aten.add, aten.sub, aten.mul, aten.neg, aten.relu, aten.gelu, aten.silu, aten.tanh, aten.leaky_relu,
    aten.prelu, aten.layer_norm, aten.rms_norm, aten.mean, aten.cat, aten.stack,
)  # fmt: skip


def with_halves_between(graph: fx.GraphModule) -> fx.GraphModule | None:
    """A copy of the graph with fewer values in float32, or None where it would be the same."""
    copy = copy_graph(graph)
    edit, changed = Narrower(copy), False
    for node in list(copy.graph.nodes):
        if is_op(node, aten.to) and (half := half_of(node.args[0])) is not None and value(half).dtype is node.args[1]:
            edit.replace(node, half)
        elif is_op(node, *PASSING) and (dtype := common_half(copy, node)) is not None:
            narrow(edit, node, dtype)
            changed = True
    edit.finish()
    return copy if changed else None


def narrow(edit: Narrower, node: fx.Node, dtype: torch.dtype) -> None:
    """The same on operands of half precision, widened for its readers."""

    def half(arg: fx.Node) -> fx.Node:
        return edit.half(arg, dtype) if dtypes(arg) == {torch.float32} else arg

    with edit.at(node):
        args, kwargs = fx.map_arg((node.args, node.kwargs), half)
        new = edit.call(node.target, *args, **kwargs)
        if not is_op(node, aten.split):
            edit.replace(node, edit.call(aten.to.dtype, new, torch.float32))
            return
        for user in list(node.users):
            item = edit.item(new, user.args[1])  # type: ignore[arg-type]
            edit.replace(user, edit.call(aten.to.dtype, item, torch.float32))


def half_of(node: object) -> fx.Node | None:
    """The value of 16 bits that a node widens, or None."""
    if not isinstance(node, fx.Node) or not is_op(node, aten.to) or node.args[1] is not torch.float32:
        return None
    source = node.args[0]
    return source if isinstance(source, fx.Node) and value(source).dtype in HALVES.values() else None


def common_half(graph: fx.GraphModule, node: fx.Node) -> torch.dtype | None:
    """The one dtype that the float32 operands of a node were widened from, but for constants and flags; else None, as where
    other numbers go in or come out, which beside a half would be rounded to halves, or a constant is beyond it."""
    if not dtypes(node, *node.all_input_nodes) <= {torch.float32, torch.bool}:
        return None
    wide = [arg for arg in node.all_input_nodes if torch.float32 in dtypes(arg)]
    constants = [tensor for arg in wide if (tensor := attribute(graph, arg)) is not None and tensor.numel()]
    halves = [half_of(arg) for arg in wide if attribute(graph, arg) is None and not is_flag(arg)]
    found = {value(half).dtype for half in halves if half is not None}
    if len(found) != 1 or None in halves:
        return None
    dtype = found.pop()
    return dtype if all(tensor.abs().max() <= torch.finfo(dtype).max for tensor in constants) else None


def dtypes(*nodes: fx.Node) -> set[torch.dtype]:
    """Of all tensors among these values; a size has none."""
    return {leaf.dtype for leaf in tree_leaves([value(node) for node in nodes]) if isinstance(leaf, Tensor)}


def is_flag(node: fx.Node) -> bool:
    """Whether all its numbers are 0 or 1."""
    if is_op(node, *VIEWS):
        return is_flag(node.args[0])  # type: ignore[arg-type]
    return is_op(node, aten.to) and value(node.args[0]).dtype is torch.bool
