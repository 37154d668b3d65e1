"""Rules for batch norms in eval mode: the linear layer before or after takes their numbers into its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from grc.graph.batch_norm import batch_norm
from grc.graph.match import argument, aten, attribute, is_op, only_user, shape, value
from grc.graph.rewrite import Rewriter


def norm_after_linear(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """scale * (W x + b) + shift: a linear layer of weights scale * W, where nothing else reads the layer."""
    norm = batch_norm(edit.module, node)
    if norm is None or value(norm.source).dim() != 2 or only_user(norm.source) is None:
        return None
    linear: Any = norm.source
    while is_op(linear, aten.reshape) and shape(linear)[-1] == shape(linear.args[0])[-1]:
        linear = linear.args[0]
        if only_user(linear) is None:
            return None
    found = layer(edit, linear)
    if found is None:
        return None
    weight, bias = found
    new = folded(edit, linear, norm.scale[:, None] * weight, norm.scale * bias + norm.shift)
    return edit.reshape(new, -1, len(weight)) if new is not None and linear is not norm.source else new


def norm_before_linear(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """W (scale * x + shift) + b: a linear layer of weights W * scale, where only such layers read the norm."""
    norm = batch_norm(edit.module, node.args[0]) if is_op(node, aten.linear) else None
    if norm is None or value(norm.source).dim() != 2:
        return None
    if any(layer(edit, user) is None or user.args[0] is not node.args[0] for user in node.args[0].users):  # type: ignore[union-attr]
        return None
    weight, bias = layer(edit, node)  # type: ignore[misc]
    return folded(edit, node, weight * norm.scale, weight @ norm.shift + bias, norm.source)


def layer(edit: Rewriter, linear: Any) -> tuple[Tensor, Tensor] | None:
    """Weight [N, K] and bias [N] of a linear layer in float64, where both are constants and no other layer has the weight."""
    if not is_op(linear, aten.linear) or only_user(linear.args[1]) is None:
        return None
    weight, bias = attribute(edit.module, linear.args[1]), argument(linear, "bias")
    numbers = torch.zeros(()) if bias is None else attribute(edit.module, bias)
    if weight is None or weight.dim() != 2 or not weight.is_floating_point() or numbers is None:
        return None
    return weight.detach().double(), numbers.detach().double().expand(len(weight))


def folded(edit: Rewriter, linear: Any, weight: Tensor, bias: Tensor, x: fx.Node | None = None) -> fx.Node | None:
    """The layer with other numbers, over `x` if that is given; None where its dtype can't hold them."""
    dtype = value(linear.args[1]).dtype
    weight, bias = weight.to(dtype), bias.to(dtype)
    if not (weight.isfinite().all() and bias.isfinite().all()):
        return None
    name = linear.args[1].name.removesuffix("_weight").removesuffix("_normed")
    parameters = (edit.parameter(f"{name}_normed_{part}", t) for part, t in (("weight", weight), ("bias", bias)))
    return edit.call(aten.linear.default, linear.args[0] if x is None else x, *parameters)
