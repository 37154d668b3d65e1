"""Transformer layers over users of a few steps, one after the other, given to the GPU kernel that makes all of them."""

from __future__ import annotations

from dataclasses import replace
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
from grc.lowering.epilogue import Linear, Norm, norm_at, with_small_linears
from grc.lowering.in_place import layout_in
from grc.lowering.twins import with_twins

SMALL, ATTENTION, BOTH = "small_linear", "attention", "attention_linear"


class Found(NamedTuple):
    """A layer in a graph: the rows that it begins with, the nodes that read them, and the node that it ends with."""

    x: fx.Node
    readers: set[fx.Node]
    last: fx.Node
    form: Form
    layer: Layer

    def before(self, graph: fx.GraphModule, ends: dict[fx.Node, Found]) -> tuple[Found, Found] | None:
        """The layer before, where nothing else reads its result, and this one as it follows that."""
        if set(self.x.users) != self.readers:
            return None
        if not self.form.post:
            return (ends[self.x], self) if self.x in ends else None
        norm = norm_at(self.x)
        if norm is None or norm.x not in ends or only_user(norm.x) is not self.x or norm.eps != self.form.eps:
            return None
        found = parameters(graph, norm, self.layer.out)
        if found is None:
            return None
        scale, shift = found
        return ends[norm.x], self._replace(layer=replace(self.layer, scale1=scale, shift1=shift))


def takes_encoders(graph: fx.GraphModule) -> bool:
    """Whether a graph, before its fused ops are given to their twins, has layers for the kernel."""
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
        while (both := stack[0].before(copy, ends)) is not None:
            stack[:1] = both
            del ends[both[0].last]
        constants = [edit.parameter(f"{last.name}_{kind}", tensor) for kind, tensor in packed(stack, form)]
        with edit.at(last):
            new = edit.call(encoder.register(), stack[0].x, *constants, len(stack))
        edit.replace(last, new)
    edit.finish()
    return copy, form


def packed(stack: list[Found], form: Form) -> list[tuple[str, torch.Tensor]]:
    weights, vectors = encoder.pack([found.layer for found in stack], form)
    return [("weights", weights.contiguous()), ("vectors", vectors.contiguous())]


def small(node: Any) -> Linear | None:
    """The arguments of a call of `small_linear`."""
    return Linear(*node.args) if called(node, SMALL) else None


def called(node: Any, name: str) -> bool:
    target = node.target if isinstance(node, fx.Node) else None
    return getattr(target, "namespace", "") == "grc_cuda" and target._opname == name  # type: ignore[union-attr]


def layer_at(graph: fx.GraphModule, node: fx.Node) -> Found | None:
    """The layer that a node ends, where the kernel takes it: attention and its projection, and two layers, each half with a
    residual, and with a norm before it (pre-norm) or after it (post-norm; the last norm is no part of it)."""
    down = small(node)
    up = None if down is None else small(down.x)
    if down is None or up is None or only_user(down.x) is not node or down.eps is not None:
        return None
    rows, post = up.x, up.eps is None
    norm = norm_at(rows) if post else Norm(rows, up.scale, up.shift, up.eps)  # type: ignore[arg-type]
    plain = down.mul is None and up.mul is None and up.add is None and down.activation == NONE
    if norm is None or not plain or down.add is not rows or set(rows.users) != {node, down.x}:
        return None
    middle = norm.x
    attended = attention_of(middle)
    if attended is None or (post and only_user(middle) is not rows):
        return None
    (q, k, v), (scale, gain, kind, causal), out = attended
    x, bases = out.add, [base_of(operand) for operand in (q, k, v)]
    heads = [small(base) for base in bases]
    if any(head is None or head[0] is not x or head[3:6] != (None, None, NONE) for head in heads):
        return None
    if any(head[6:] != heads[0][6:] or head.eps != (None if post else norm.eps) for head in heads):  # type: ignore
        return None
    sizes = shape(middle)
    if len(sizes) != 3 or not all(map(static, sizes[1:])):
        return None
    steps, width = (int(size) for size in sizes[1:])
    count = int(shape(q)[2])
    starts = [columns_of(operand, base, steps, width, count) for operand, base in zip((q, k, v), bases, strict=True)]
    if any(start is None for start in starts):
        return None
    hidden = int(shape(down.x)[-1])
    form = Form(
        value(middle).dtype, steps, width, count, hidden, scale, gain, kind, causal, up.activation, norm.eps, post
    )  # fmt: skip
    layer = layer_of(graph, heads, starts, out, norm, up, down) if form.able() else None  # type: ignore[arg-type]
    return None if layer is None else Found(x, {*bases, middle}, node, form, layer)


def attention_of(node: fx.Node) -> tuple[Any, Any, Linear] | None:
    """Queries, keys and values, scale, gain, kind and direction of an attention without masks, and the layer that alone
    reads it and ends with this node."""
    if called(node, BOTH):
        q, k, v, scale, gain, kind, causal, weight, bias, add, activation = node.args
        out = Linear(None, weight, bias, None, add, activation)  # type: ignore[arg-type]
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


def parameters(graph: fx.GraphModule, norm: Norm, like: torch.Tensor) -> list[torch.Tensor] | None:
    """Scale and shift of a norm, or None where one is no constant of the dtype of `like`."""
    found = [vector(graph, node, like, fill) for node, fill in ((norm.scale, 1.0), (norm.shift, 0.0))]
    return None if any(v is None or v.dtype != like.dtype for v in found) else found  # type: ignore[return-value]


def vector(graph: fx.GraphModule, node: Any, like: torch.Tensor, fill: float) -> torch.Tensor | None:
    """A constant for every row of `like`, filled where there is none, or None where it is no constant."""
    return torch.full_like(like[:, 0], fill) if node is None else attribute(graph, node)


def layer_of(
    graph: fx.GraphModule, heads: list[Linear], starts: list[int], out: Linear, norm: Norm, up: Linear, down: Linear
) -> Layer | None:
    """The parameters of a layer, or None where one of them is no constant of one dtype."""
    parts = [*heads, out, up, down]
    weights = [attribute(graph, part.weight) for part in parts]
    if any(weight is None or weight.dtype != value(out.add).dtype for weight in weights):
        return None
    biases = [vector(graph, part.bias, weight, 0.0) for part, weight in zip(parts, weights, strict=True)]  # type: ignore
    if any(bias is None or bias.dtype != value(out.add).dtype for bias in biases):
        return None
    *wide, out_weight, up_weight, down_weight = weights
    *wide_bias, out_bias, up_bias, down_bias = biases
    first = Norm(None, heads[0].scale, heads[0].shift, norm.eps)
    norms = [parameters(graph, one, out_weight) for one in (first, norm)]  # type: ignore[arg-type]
    width = out_weight.shape[0]  # type: ignore[union-attr]
    cut = [slice(start, start + width) for start in starts]
    taken, shifts = (tuple(t[part] for t, part in zip(all, cut, strict=True)) for all in (wide, wide_bias))  # type: ignore
    if None in norms or any(tuple(t.shape) != (width, width) for t in (*taken, out_weight)):
        return None
    return Layer(
        *norms[0], taken, shifts, out_weight, out_bias, *norms[1], up_weight, up_bias, down_weight, down_bias  # type: ignore
    )  # fmt: skip
