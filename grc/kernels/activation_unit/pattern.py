"""Where the activation unit applies: layers over each step of a history, the first of them split by what it reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from grc.graph.batch_norm import batch_norm
from grc.graph.match import Miss, argument, aten, attribute, is_op, only_user, same_shape, same_size, shape, value
from grc.graph.rewrite import Rewriter
from grc.kernels.activation_unit import ACTIVATION_UNIT
from grc.kernels.fusion import Fused, Fusion
from grc.kernels.packed_linear.activations import DICE, NONE, PRELU, activation_code

COARSE = 0.01  # of what a sigmoid is taken of: steps of the dtype that Dice's scale and shift are rounded to
LARGEST = 1 << 16  # weights of the first layer over the keys: joined with the query they stay in the cache of a core


class Activated(NamedTuple):
    """An activation of `source`, and its numbers for each column."""

    source: fx.Node
    activation: int
    gate: Tensor | None


class ActivationUnit(Fusion):
    """MLP([k, k * q, ...]) for every step k of a history: one or two hidden layers and a score (DIN; Zhou et al. 2018).

    It stands as split-concat-linear leaves it: linear(cat([k, k * q])) + linear(q) is the first layer.
    """

    name = "activation-unit"
    op = ACTIVATION_UNIT
    anchors = (aten.linear,)

    def fuse(self, edit: Rewriter, node: fx.Node) -> Fused | None:
        head, head_bias = weights(edit, node)
        outer = activation_of(edit, node.args[0])
        if head is None or len(head) != 1 or outer is None:
            return None
        second, second_bias, inner = None, None, outer
        if is_op(outer.source, aten.linear):
            second, second_bias = weights(edit, outer.source)
            deeper = activation_of(edit, outer.source.args[0])
            if second is None or deeper is None:
                return None
            inner = deeper
        found = first_layer(edit, inner.source)
        if found is None:
            return None
        query, keys, row, first = found
        dtype = value(keys).dtype
        if dtype is torch.float64 or any(value(operand).dtype is not dtype for operand in (query, row, node)):
            raise Miss(f"values are {str(value(node).dtype)[6:]}")
        for layer in (inner, outer):
            steps = 0.0 if layer.gate is None else float(layer.gate.abs().max()) * torch.finfo(dtype).eps
            if dtype is not torch.float32 and not steps < COARSE:
                raise Miss(f"the activation's numbers are too large for {str(dtype)[6:]}")
        if first.numel() > 2 * LARGEST:
            raise Miss(f"the first layer's weight of {first.shape[1]} x {first.shape[0]} leaves no room in the cache")
        width, n1 = int(shape(keys)[2]), len(first)
        if second is not None and second_bias is None:
            second_bias = torch.zeros(len(second))

        def constant(name: str, tensor: Tensor | None) -> fx.Node | None:
            return None if tensor is None else edit.parameter(name, tensor.detach().to(dtype).contiguous().clone())

        new = edit.call(
            ACTIVATION_UNIT.overload,
            edit.reshape(query, -1, width),
            keys,
            edit.reshape(row, -1, n1),
            constant("unit_first", first.t()),
            constant("unit_first_gate", inner.gate),
            constant("unit_second", None if second is None else second.t()),
            constant("unit_second_bias", second_bias),
            constant("unit_second_gate", None if second is None else outer.gate),
            constant("unit_head", head[0]),
            constant("unit_head_bias", torch.zeros(1) if head_bias is None else head_bias),
            inner.activation,
            outer.activation if second is not None else NONE,
        )
        new = edit.call(aten.unsqueeze.default, new, -1) if value(node).dim() == 3 else edit.reshape(new, -1, 1)
        widths = [n1, 1] if second is None else [n1, len(second), 1]
        return Fused(node, new, f"{'-'.join(map(str, widths))} over each step in one kernel")


def weights(edit: Rewriter, linear: Any) -> tuple[Tensor | None, Tensor | None]:
    """The constant weight and bias of a linear layer; no weight where either varies."""
    weight, bias = attribute(edit.module, linear.args[1]), argument(linear, "bias")
    if weight is None or weight.dim() != 2 or (bias is not None and attribute(edit.module, bias) is None):
        return None, None
    return weight, None if bias is None else attribute(edit.module, bias)


def first_layer(edit: Rewriter, node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, Tensor] | None:
    """query [B, 1, D], keys [B, S, D], row [B, 1, N1] and the weight [N1, 2 D] of keys and products."""
    if not is_op(node, aten.add) or len(node.args) != 2 or argument(node, "alpha") != 1:
        return None
    for every, row in (node.args, node.args[::-1]):
        if not is_op(every, aten.linear) or not is_op(every.args[0], aten.cat) or only_user(every) is not node:  # type: ignore[union-attr, arg-type]
            continue
        weight, bias = weights(edit, every)
        cat: Any = every.args[0]  # type: ignore[union-attr]
        parts = cat.args[0]
        if weight is None or bias is not None or len(parts) < 2 or value(node).dim() != 3:
            continue
        if argument(cat, "dim") not in (-1, 2) or not is_row(row, node):
            continue
        for product, rest, halves in (
            (parts[-1], parts[:-1], weight.chunk(2, 1)),
            (parts[0], parts[1:], weight.chunk(2, 1)[::-1]),
        ):
            for keys, query in two_factors(product):
                if rest == [keys] or (is_op(keys, aten.cat) and rest == list(keys.args[0])):  # type: ignore[arg-type]
                    return query, keys, row, torch.cat(list(halves), 1)
    return None


def two_factors(product: Any) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Keys and the query [B, 1, D] of `keys * query`, however that is spread over the steps."""
    if not is_op(product, aten.mul) or len(product.args) != 2:
        return
    for keys, query in (product.args, product.args[::-1]):
        while is_op(query, aten.expand):
            query = query.args[0]
        if isinstance(keys, fx.Node) and same_shape(product, keys) and is_row(query, keys):
            yield keys, query


def is_row(node: Any, like: fx.Node) -> bool:
    """[B, 1, D] beside a [B, S, D]."""
    if not isinstance(node, fx.Node) or value(node).dim() != 3 or value(like).dim() != 3:
        return False
    (batch, one, width), (users, _, columns) = shape(node), shape(like)
    return one == 1 and same_size(batch, users) and width == columns


def activation_of(edit: Rewriter, node: Any) -> Activated | None:
    """The activation that gives this value, of a layer that nothing else reads."""
    code = activation_code(node)
    if code != NONE:
        return Activated(plain(node.args[0]), code, None)
    source = plain(node)
    if is_op(source, aten.prelu):
        alpha = attribute(edit.module, source.args[1])
        x = plain(source.args[0])
        columns = shape(x)[-1]
        if alpha is None or (alpha.numel() > 1 and value(source).dim() != 2):  # its channels are dimension 1
            return None
        return Activated(x, PRELU, alpha.detach().reshape(1, -1).expand(1, columns))
    turned = is_turned(source)
    return dice_of(edit, source.args[0] if turned else source, turned)


def dice_of(edit: Rewriter, node: Any, turned: bool) -> Activated | None:
    """p x + (1 - p) alpha x, p = sigmoid(batch_norm(x)), its factors in any order; `turned` where all of it is computed
    on [B, N, S], as batch norm takes three dimensions."""
    if not is_op(node, aten.add) or len(node.args) != 2 or argument(node, "alpha") != 1:
        return None
    for kept, scaled in (node.args, node.args[::-1]):
        p = next((factor for factor in factors(kept) if is_op(factor, aten.sigmoid)), None)
        x = next((factor for factor in factors(kept) if factor is not p), None)
        rest = [factor for factor in factors(scaled) if factor is not x]
        alpha = next((attribute(edit.module, f) for f in rest if attribute(edit.module, f) is not None), None)
        inverse = any(is_op(f, aten.rsub) and plain(f.args[0]) is p and f.args[1] == 1 for f in rest)
        if p is None or x is None or alpha is None or not inverse or len(rest) != 2 or len(factors(kept)) != 2:
            continue
        columns = shape(x)[1 if turned else -1]
        norm = batch_norm(edit.module, plain(p.args[0]))
        if norm is None or plain(norm.source) is not x or value(norm.source).dim() != (3 if turned else 2):
            continue
        if alpha.numel() not in (1, columns) or is_turned(x) is not turned:
            continue
        if turned and alpha.numel() > 1 and alpha.shape[-1] != 1:  # a number for each step
            continue
        gate = torch.stack([alpha.detach().double().reshape(-1).expand(columns), norm.scale, norm.shift])
        return Activated(x.args[0] if turned else x, DICE, gate)
    return None


def is_turned(node: Any) -> bool:
    """[B, S, N] as [B, N, S], or back."""
    return is_op(node, aten.transpose) and value(node).dim() == 3 and {d % 3 for d in node.args[1:3]} == {1, 2}


def factors(node: Any) -> list[Any]:
    """A product's factors, seen through the reshapes that Dice flattens steps with."""
    node = plain(node)
    if is_op(node, aten.mul) and len(node.args) == 2:
        return [*factors(node.args[0]), *factors(node.args[1])]
    return [node]


def plain(node: Any) -> Any:
    """A value before it was reshaped with its last dimension kept."""
    while is_op(node, aten.reshape, aten.view) and shape(node)[-1] == shape(node.args[0])[-1]:
        node = node.args[0]
    return node
