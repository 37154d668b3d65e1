"""What follows a linear layer, given to the kernel that takes its product: activation, cross product and residual."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from grc.graph.match import argument, aten, attribute, is_op, only_user, same_shape, same_size, shape, static, value
from grc.graph.rewrite import copy_graph
from grc.kernels import CROSS
from grc.kernels.packed_linear.activations import NONE, activation_code
from grc.kernels.packed_linear.panels import NARROW

SUMMED = (torch.float32, torch.float16, torch.bfloat16)  # in float32


class Norm(NamedTuple):
    """Layer norm of the last dimension of x, with the nodes of its parameters or None."""

    x: Any
    scale: Any
    shift: Any
    eps: float


class Linear(NamedTuple):
    """act(norm(x) @ weight.T + bias) * mul + add, in the order of `small_linear`'s operands. Without eps there is no norm."""

    x: Any
    weight: Any
    bias: Any
    mul: Any
    add: Any
    activation: int
    scale: Any = None
    shift: Any = None
    eps: float | None = None


def layer_of(node: fx.Node) -> tuple[Linear, fx.Node] | None:
    """The layer that a node begins, a linear layer with what follows it or a cross layer, and the node that ends it."""
    if node.target is CROSS.overload:
        x0, y, weight, bias, x = node.args
        return Linear(y, weight, bias, x0, x, NONE), node
    if not is_op(node, aten.linear):
        return None
    activation, last = activation_of(node)
    last, residual = residual_of(last) if activation == NONE else (last, None)
    return Linear(node.args[0], node.args[1], argument(node, "bias"), None, residual, activation), last


def activation_of(node: fx.Node) -> tuple[int, fx.Node]:
    """The activation that alone reads a linear layer, and the node that ends the pair."""
    user = only_user(node)
    code = activation_code(user)
    return (NONE, node) if user is None or code == NONE else (code, user)


def residual_of(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """`linear + x` with x of the same shape and dtype: the sum, and x."""
    user = only_user(node)
    if user is None or not is_op(user, aten.add) or len(user.args) != 2 or argument(user, "alpha") != 1:
        return node, None
    other = user.args[1] if user.args[0] is node else user.args[0]
    fits = isinstance(other, fx.Node) and other is not node and other.op != "get_attr"
    if (
        fits
        and isinstance(value(other), torch.Tensor)
        and same_shape(other, node)
        and value(other).dtype is value(node).dtype
    ):  # type: ignore[arg-type]
        return user, other  # type: ignore[return-value]
    return node, None


def takes_small_linears(graph: fx.GraphModule) -> bool:
    return any(small_layer_of(graph, node) is not None for node in graph.graph.nodes)


def small_layer_of(graph: fx.GraphModule, node: fx.Node) -> tuple[Linear, fx.Node] | None:
    """The layer that a node begins, where `small_linear` can take it, constant parameters and one dtype throughout, and the
    node that ends it."""
    found = layer_of(node)
    if found is None:
        return None
    layer, last = found
    weight = attribute(graph, layer.weight)
    if weight is None or weight.dim() != 2 or value(layer.x).dim() < 2 or weight.shape[0] <= NARROW:
        return None
    if not all_settled(graph, layer.weight, layer.bias):
        return None
    operands = (layer.x, layer.bias, layer.mul, layer.add, last)
    same = all(value(operand).dtype is weight.dtype for operand in operands if operand is not None)
    return found if same and weight.dtype in SUMMED else None


def all_settled(graph: fx.GraphModule, *parameters: Any) -> bool:
    """Whether these, where they are given, lie in memory as they are read: the kernel reads them before it waits for what
    other kernels make."""
    tensors = [attribute(graph, parameter) for parameter in parameters if parameter is not None]
    return all(tensor is not None and tensor.is_contiguous() for tensor in tensors)


def with_small_linears(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph for the GPU in which linear and cross layers go to the kernel for few rows, `small_linear`.

    A norm or an attention over a few steps that only layers read goes with them.
    """
    from grc.kernels.small_linear.attention_linear import register as register_attention
    from grc.kernels.small_linear.triton import register

    copy = copy_graph(graph)
    for node in list(copy.graph.nodes):
        found = small_layer_of(copy, node)
        if found is None:
            continue
        layer, last = found
        attention = attention_of(layer)
        with copy.graph.inserting_before(last):
            if attention is not None:
                given = (*attention, layer.weight, layer.bias, layer.add, layer.activation)
                new = copy.graph.call_function(register_attention(), given)
            else:
                x, *norm = norm_of(copy, layer.x)
                new = copy.graph.call_function(register(), (x, *layer[1:6], *norm))
        put(last, new)
    return cleaned(copy)


def attention_of(layer: Linear) -> tuple[Any, ...] | None:
    """Queries, keys, values, scale, gain, kind and direction of an attention that only a layer reads, or None."""
    from grc.kernels.attention.triton import register
    from grc.kernels.small_linear.attention_linear import able

    node = layer.x
    if node.target is not register() or only_user(node) is None or layer.mul is not None:
        return None
    operands = [value(arg) if isinstance(arg, fx.Node) else arg for arg in node.args]
    return (*node.args[:3], *node.args[5:]) if able(*operands) else None


def norm_at(node: Any) -> Norm | None:
    """The layer norm of its last dimension that a node is."""
    if not is_op(node, aten.layer_norm) or list(node.args[1]) != [shape(node)[-1]]:
        return None
    return Norm(node.args[0], *(argument(node, name) for name in ("weight", "bias", "eps")))


def norm_of(graph: fx.GraphModule, node: fx.Node) -> tuple[Any, ...]:
    """The rows, scale, shift and epsilon of a layer norm that only layers read, which can make it themselves; else `node`."""
    from grc.kernels.small_linear.triton import DEPTH

    norm = norm_at(node)
    if norm is None or int(shape(node)[-1]) > DEPTH:
        return (node,)
    constant = all_settled(graph, norm.scale, norm.shift)
    alone = all(small_layer_of(graph, user) is not None for user in node.users)
    return norm if constant and alone else (node,)


def with_relu_in_products(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph for the GPU in which relu(linear(x, weight, bias)) is one call, which cuBLAS takes whole.

    Inductor makes two of it: the product goes to cuBLAS, and its own kernel reads and writes the layer once more.
    """
    copy = copy_graph(graph)
    for node in list(copy.graph.nodes):
        relu = only_user(node) if is_op(node, aten.linear) else None
        if relu is None or not is_op(relu, aten.relu):
            continue
        x, weight, bias = node.args[0], node.args[1], argument(node, "bias")
        tensor = attribute(copy, weight)
        if bias is None or tensor is None or tensor.dim() != 2 or value(x).dim() < 2:
            continue
        with copy.graph.inserting_before(relu):
            rows = x
            if value(x).dim() > 2:
                rows = copy.graph.call_function(aten.reshape.default, (x, [-1, int(tensor.shape[1])]))
            turned = copy.graph.call_function(aten.t.default, (weight,))
            new = copy.graph.call_function(aten._addmm_activation.default, (bias, rows, turned))
            if value(x).dim() > 2:
                like = [copy.graph.call_function(aten.sym_size.int, (x, d)) for d in range(value(x).dim() - 1)]
                new = copy.graph.call_function(aten.reshape.default, (new, [*like, int(tensor.shape[0])]))
        put(relu, new)
    return cleaned(copy)


def with_heads_as_sums(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph for the GPU in which a head of up to NARROW outputs is a product and a sum in float32.

    Inductor takes them in one launch with all that follows: sigmoid, other terms, casts. cuBLAS needs three, and one more
    for a copy of the bias.
    """
    copy = copy_graph(graph)
    for node in list(copy.graph.nodes):
        weight = attribute(copy, node.args[1]) if is_op(node, aten.linear) else None
        if weight is None or weight.dim() != 2 or weight.shape[0] > NARROW or weight.dtype not in SUMMED:
            continue
        bias = argument(node, "bias")
        call = copy.graph.call_function
        with copy.graph.inserting_before(node):
            x, w = (call(aten.to.dtype, (operand, torch.float32)) for operand in node.args[:2])
            new = call(aten.sum.dim_IntList, (call(aten.mul.Tensor, (call(aten.unsqueeze.default, (x, -2)), w)), [-1]))
            if bias is not None:
                new = call(aten.add.Tensor, (new, bias))
            new = call(aten.to.dtype, (new, weight.dtype))
        put(node, new)
    return cleaned(copy)


def with_rows_as_sums(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph for the GPU in which [B, 1, S] @ [B, S, D], a weighted sum of steps, is a product and a sum.

    Inductor takes them in one launch with what makes the weights; cuBLAS needs one of its own, and a copy.
    """
    copy = copy_graph(graph)
    for node in list(copy.graph.nodes):
        if not is_op(node, aten.bmm, aten.matmul) or any(value(operand).dim() != 3 for operand in node.args):
            continue
        weights, steps = node.args
        if not same_size(shape(weights)[1], 1) or not static(shape(steps)[1]) or value(node).dtype not in SUMMED:
            continue
        call = copy.graph.call_function
        with copy.graph.inserting_before(node):
            turned = call(aten.transpose.int, (weights, 1, 2))
            wide = [call(aten.to.dtype, (operand, torch.float32)) for operand in (turned, steps)]
            new = call(aten.sum.dim_IntList, (call(aten.mul.Tensor, tuple(wide)), [1], True))
            new = call(aten.to.dtype, (new, value(node).dtype))
        put(node, new)
    return cleaned(copy)


def put(old: fx.Node, new: fx.Node) -> None:
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)


def cleaned(graph: fx.GraphModule) -> fx.GraphModule:
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph
