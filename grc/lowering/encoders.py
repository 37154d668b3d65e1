"""Transformer layers over users of a few steps, one after the other, given to the GPU kernel that makes all of them."""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import torch
from torch import fx

from grc.errors import LoweringError
from grc.graph.match import attribute, only_user, shape, static, value
from grc.graph.rewrite import Rewriter, copy_graph
from grc.kernels import encoder
from grc.kernels.attention.layout import is_view
from grc.kernels.encoder import Form, Layer
from grc.kernels.packed_linear.activations import NONE
from grc.lowering.epilogue import with_small_linears
from grc.lowering.in_place import layout_in
from grc.lowering.twins import with_twins

SMALL, ATTENTION, BOTH = "small_linear", "attention", "attention_linear"


class Small(NamedTuple):
    """The arguments of `small_linear`."""

    x: Any
    weight: Any
    bias: Any
    mul: Any
    add: Any
    activation: int
    scale: Any = None
    shift: Any = None
    eps: float | None = None


class Found(NamedTuple):
    """A layer in a graph: the rows that it begins with, the nodes that read them, and the node that it ends with."""

    x: fx.Node
    readers: set[fx.Node]
    last: fx.Node
    form: Form
    layer: Layer


def takes_encoders(graph: fx.GraphModule) -> bool:
    """Whether a graph, before its fused ops are given to their twins, has layers for the kernel."""
    if importlib.util.find_spec("triton") is None:
        return False  # no package with kernels can be built here, and its engine says why
    small = with_small_linears(with_twins(graph, torch.device("cpu"), False, ("cross",))[0])
    return any(layer_at(small, node) is not None for node in small.graph.nodes)


def with_encoders(graph: fx.GraphModule) -> tuple[fx.GraphModule, Form]:
    """A copy of a graph with small linear layers in which layers of one form, as many as there are in a row, are one call of
    `grc_cuda::encoder`; and that form, which the first of them has. Raises LoweringError where there are none."""
    copy = copy_graph(graph)
    found = [layer for layer in (layer_at(copy, node) for node in copy.graph.nodes) if layer is not None]
    if not found:
        raise LoweringError("the graph has no encoder layers that the kernel takes")
    form = found[0].form
    ends = {layer.last: layer for layer in found if layer.form == form}
    edit = Rewriter(copy)
    for last in reversed(list(ends)):
        if last not in ends:
            continue
        stack = [ends.pop(last)]
        while stack[0].x in ends and set(stack[0].x.users) == stack[0].readers:
            stack.insert(0, ends.pop(stack[0].x))
        constants = [edit.parameter(f"{last.name}_{kind}", tensor) for kind, tensor in packed(stack, form)]
        with edit.at(last):
            new = edit.call(encoder.register(), stack[0].x, *constants, len(stack))
        edit.replace(last, new)
    edit.finish()
    return copy, form


def packed(stack: list[Found], form: Form) -> list[tuple[str, torch.Tensor]]:
    weights, vectors = encoder.pack([found.layer for found in stack], form)
    return [("weights", weights.contiguous()), ("vectors", vectors.contiguous())]


def small(node: Any) -> Small | None:
    """The arguments of a call of `small_linear`."""
    return Small(*node.args) if called(node, SMALL) else None


def called(node: Any, name: str) -> bool:
    target = node.target if isinstance(node, fx.Node) else None
    return getattr(target, "namespace", "") == "grc_cuda" and target._opname == name  # type: ignore[union-attr]


def layer_at(graph: fx.GraphModule, node: fx.Node) -> Found | None:
    """The layer that a node ends, where the kernel takes it: norm, attention and its projection, norm and two layers, each
    half with a residual."""
    down = small(node)
    up = None if down is None else small(down.x)
    if down is None or up is None or only_user(down.x) is not node or down.eps is not None or up.eps is None:
        return None
    middle = up.x
    plain = down.mul is None and up.mul is None and up.add is None and down.activation == NONE
    if not plain or down.add is not middle or set(middle.users) != {node, down.x}:
        return None
    attended = attention_of(middle)
    if attended is None:
        return None
    (q, k, v), (scale, gain, kind, causal), out = attended
    bases = [base_of(operand) for operand in (q, k, v)]
    heads = [small(base) for base in bases]
    x = out.add
    for projected in heads:
        if projected is None or projected.x is not x or projected.activation != NONE or projected.eps is None:
            return None
        if (*projected[3:5], projected.eps) != (None, None, up.eps) or projected[6:8] != heads[0][6:8]:  # type: ignore[index]
            return None
    sizes = shape(middle)
    if len(sizes) != 3 or not all(map(static, sizes[1:])):
        return None
    steps, width = (int(size) for size in sizes[1:])
    count = int(shape(q)[2])
    starts = [columns_of(operand, base, steps, width, count) for operand, base in zip((q, k, v), bases, strict=True)]  # type: ignore[arg-type]
    if any(start is None for start in starts):
        return None
    hidden = int(shape(down.x)[-1])
    form = Form(
        value(middle).dtype, steps, width, count, hidden, scale, gain, kind, causal, up.activation, up.eps
    )  # fmt: skip
    layer = layer_of(graph, heads, starts, out, up, down, width) if form.able() else None  # type: ignore[arg-type]
    readers = {*bases, middle}
    return None if layer is None else Found(x, readers, node, form, layer)  # type: ignore[arg-type]


def attention_of(node: fx.Node) -> tuple[Any, Any, Small] | None:
    """Queries, keys and values, scale, gain, kind and direction of an attention without masks, and the layer that alone
    reads it and ends with this node."""
    if called(node, BOTH):
        q, k, v, scale, gain, kind, causal, weight, bias, add, activation = node.args
        out = Small(None, weight, bias, None, add, activation)  # type: ignore[arg-type]
    else:
        layer = small(node)
        if layer is None or not called(layer.x, ATTENTION) or only_user(layer.x) is not node or layer.eps is not None:
            return None
        q, k, v, mask, factor, scale, gain, kind, causal = layer.x.args
        if mask is not None or factor is not None:
            return None
        out = layer
    if out.mul is not None or out.add is None or out.activation != NONE:
        return None
    return (q, k, v), (scale, gain, kind, causal), out


def base_of(node: Any) -> Any:
    while is_view(node):
        node = node.args[0]
    return node


def columns_of(operand: fx.Node, base: fx.Node, steps: int, width: int, heads: int) -> int | None:
    """The first of the columns of a layer's result that are heads side by side, or None where they lie otherwise."""
    whole = int(shape(base)[-1])
    layout = layout_in(operand, base)
    sizes = [int(size) for size in shape(operand)[1:]]
    if layout is None or sizes != [steps, heads, width // heads]:
        return None
    wanted = (steps * whole, whole, width // heads, 1)
    lies = all(have in (None, want) for have, want in zip(layout.strides, wanted, strict=True))
    return layout.offset if lies and layout.offset + width <= whole else None


def layer_of(
    graph: fx.GraphModule, heads: list[Small], starts: list[int], out: Small, up: Small, down: Small, width: int
) -> Layer | None:
    """The parameters of a layer, or None where one of them is no constant of one dtype."""

    def constant(node: Any, like: torch.Tensor, fill: float) -> torch.Tensor | None:
        """A vector of the columns of `like`, filled where there is none."""
        return attribute(graph, node) if node is not None else torch.full_like(like[:, 0], fill)

    weights = [attribute(graph, part.weight) for part in (*heads, out, up, down)]
    if any(weight is None for weight in weights):
        return None
    *wide, out_weight, up_weight, down_weight = weights
    biases = [constant(part.bias, w, 0.0) for part, w in zip((*heads, out, up, down), weights, strict=True)]  # type: ignore[arg-type]
    norms = [constant(n, out_weight, f) for part in (heads[0], up) for n, f in ((part.scale, 1.0), (part.shift, 0.0))]  # type: ignore[arg-type]
    given = [*weights, *biases, *norms]
    if any(tensor is None or tensor.dtype != out_weight.dtype for tensor in given):  # type: ignore[union-attr]
        return None
    cut = [slice(start, start + width) for start in starts]
    shapes = [tuple(w[part].shape) for w, part in zip(wide, cut, strict=True)]  # type: ignore[index]
    if shapes != [(width, width)] * 3 or tuple(out_weight.shape) != (width, width):  # type: ignore[union-attr]
        return None
    *wide_bias, out_bias, up_bias, down_bias = biases
    return Layer(
        norms[0], norms[1], tuple(w[part] for w, part in zip(wide, cut, strict=True)),  # type: ignore
        tuple(b[part] for b, part in zip(wide_bias, cut, strict=True)),  # type: ignore
        out_weight, out_bias, norms[2], norms[3], up_weight, up_bias, down_weight, down_bias,  # type: ignore
    )  # fmt: skip
