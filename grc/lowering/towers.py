"""Dense layers one after the other, given to the GPU kernel that takes some rows through all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import fx

from grc.errors import LoweringError
from grc.graph.match import argument, aten, attribute, is_op, only_user, same_shape, shape, static, value
from grc.graph.rewrite import Rewriter, copy_graph
from grc.kernels import CROSS, tower
from grc.kernels.packed_linear.activations import NONE, PRELU
from grc.kernels.tower import Dense, Form, Layer
from grc.lowering.epilogue import activation_of, all_settled, residual_of
from grc.lowering.twins import with_twins

LEAST = 2  # layers: one alone saves no launch


class Step(NamedTuple):
    """A layer in a graph: the nodes that begin and end it, and what it is. `x0` is what a cross layer multiplies by."""

    first: fx.Node
    last: fx.Node
    x: fx.Node
    x0: fx.Node | None
    dense: Dense
    layer: Layer


class Tower(NamedTuple):
    """Layers one after the other, what is added to their answer or None, and the node that ends it all."""

    steps: list[Step]
    form: Form
    add: fx.Node | None
    last: fx.Node


def takes_towers(graph: fx.GraphModule) -> bool:
    """Whether a graph, before its fused ops are given to their twins, has layers for the kernel."""
    return bool(towers(with_twins(graph, torch.device("cpu"), False, ("cross",))[0]))


def with_towers(graph: fx.GraphModule) -> tuple[fx.GraphModule, list[Form]]:
    """A copy of a graph for the GPU in which layers that follow one another are calls of `grc_cuda::tower`, and the forms of
    those towers, by their numbers. Raises LoweringError where there are none."""
    copy = copy_graph(graph)
    edit = Rewriter(copy)
    forms: list[Form] = []
    for found in towers(copy):
        if found.form not in forms:
            forms.append(found.form)
        packed = tower.pack([step.layer for step in found.steps], found.form)
        named = zip(("weights", "vectors"), packed, strict=True)
        constants = [edit.parameter(f"{found.last.name}_{kind}", tensor.contiguous()) for kind, tensor in named]
        columns, kernel = found.form.layers[-1].columns, forms.index(found.form)
        with edit.at(found.last):
            new = edit.call(tower.register(), found.steps[0].x, found.add, *constants, columns, kernel)
        edit.replace(found.last, new)
    if not forms:
        raise LoweringError("the graph has no dense layers that the kernel takes")
    edit.finish()
    return copy, forms


def towers(graph: fx.GraphModule) -> list[Tower]:
    """The towers of a graph, from its top: each with as many layers as the kernel takes."""
    steps = {node: step for node in graph.graph.nodes if (step := step_of(graph, node)) is not None}
    found: list[Tower] = []
    taken: set[fx.Node] = set()
    for first in steps.values():
        if first.first in taken or first.x0 not in (None, first.x):
            continue
        stack = [first]
        while (step := steps.get(only_reader(stack[-1].last))) is not None and follows(stack, step):  # type: ignore[arg-type]
            stack.append(step)
        whole = ended(graph, stack) if len(stack) >= LEAST else None
        if whole is not None:
            found.append(whole)
            taken |= {step.first for step in stack}
    return found


def only_reader(node: fx.Node) -> fx.Node | None:
    """The one node that reads this one, any number of times."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def follows(stack: Sequence[Step], step: Step) -> bool:
    """Whether the kernel takes one more layer."""
    cross = step.x0 in (None, stack[0].x)
    return step.x is stack[-1].last and cross and form_of([*stack, step]) is not None


def form_of(stack: Sequence[Step], final: int = NONE) -> Form | None:
    return Form.of(stack[0].layer.weight.dtype, [step.dense for step in stack], final)


def ended(graph: fx.GraphModule, stack: list[Step]) -> Tower | None:
    """A tower with what follows its last layer: a sum, and the activation of that. None where the kernel does not take it."""
    end = stack[-1]
    last, add, final = end.last, None, NONE
    if end.dense.activation == NONE and not end.dense.cross:
        last, add = residual_of(last)
        final, last = activation_of(last)
        add, constant = without_constant(graph, add)
        if constant is not None:
            bias = constant if end.layer.bias is None else end.layer.bias.float() + constant
            stack = [*stack[:-1], end._replace(layer=end.layer._replace(bias=bias))]
    form = form_of(stack, final)
    return None if form is None else Tower(stack, form, add, last)


def without_constant(graph: fx.GraphModule, node: fx.Node | None) -> tuple[fx.Node | None, torch.Tensor | None]:
    """A sum of a value and a constant for each column as both of them, and any other value as it is."""
    if node is None or not is_op(node, aten.add) or len(node.args) != 2 or argument(node, "alpha") != 1:
        return node, None
    for one, other in (node.args, node.args[::-1]):
        constant, width = attribute(graph, one), int(shape(node)[-1])
        if constant is None or constant.numel() not in (1, width) or constant.numel() != constant.shape[-1:].numel():
            continue
        if isinstance(other, fx.Node) and same_shape(other, node) and value(other).dtype is value(node).dtype:
            return other, constant.float().flatten().expand(width)
    return node, None


def step_of(graph: fx.GraphModule, node: fx.Node) -> Step | None:
    """The layer that a node begins, with constant parameters and one dtype throughout, or None where the kernel takes none."""
    if node.target is CROSS.overload:
        x0, x, weight, bias, term = node.args
        if term is not x:  # of low rank
            return None
        activation, slope, last = NONE, None, node
    elif is_op(node, aten.linear):
        x0, x, weight, bias = None, node.args[0], node.args[1], argument(node, "bias")
        activation, last = activation_of(node)
        slope, last = slope_of(graph, last) if activation == NONE else (None, last)
    else:
        return None
    given = [attribute(graph, parameter) for parameter in (weight, bias) if parameter is not None]
    tensor = given[0]
    plain = value(x).dim() == 2 and static(shape(x)[1]) and value(x).stride(1) == 1  # type: ignore[arg-type]
    if tensor is None or tensor.dim() != 2 or not plain or not all_settled(graph, weight, bias):
        return None
    dtypes = {value(operand).dtype for operand in (x, last)} | {p.dtype for p in given if p is not None}  # type: ignore[arg-type]
    if dtypes != {tensor.dtype} or tensor.dtype not in (torch.float16, torch.bfloat16):
        return None
    dense = Dense(tensor.shape[1], tensor.shape[0], PRELU if slope is not None else activation, x0 is not None)
    return Step(node, last, x, x0, dense, Layer(tensor, given[1] if len(given) > 1 else None, slope))  # type: ignore[arg-type]


def slope_of(graph: fx.GraphModule, node: fx.Node) -> tuple[torch.Tensor | None, fx.Node]:
    """The slopes of a PReLU that alone reads a layer, and the node that ends the pair."""
    user = only_user(node)
    if user is None or not is_op(user, aten.prelu):
        return None, node
    slope = attribute(graph, user.args[1])
    width = int(shape(node)[-1])
    return (slope.flatten().expand(width), user) if slope is not None and slope.numel() in (1, width) else (None, node)
