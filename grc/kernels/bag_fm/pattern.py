"""Where bag_fm applies: a factorisation machine over looked-up features, with its linear term where it reads the same ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from grc.graph.match import Miss, argument, aten, is_op, only_user, shape, value
from grc.graph.rewrite import Rewriter
from grc.kernels.bag_dot.pattern import chosen_pairs, triangle
from grc.kernels.bag_fm import BAG_FM
from grc.kernels.fusion import Fused, Fusion


class BagFm(Fusion):
    """Look up and take the second-order term 0.5 * sum((sum e)^2 - sum e^2) (Rendle 2010; DeepFM, Guo et al. 2017)."""

    name = "bag-fm"
    op = BAG_FM
    anchors = (aten.sub, aten.sum)

    def fuse(self, edit: Rewriter, node: fx.Node) -> Fused | None:
        found = sum_square(node) if is_op(node, aten.sub) else pair_sum(edit.module, node)
        if found is None:
            return None
        features, old = found
        lookup = features.args[0]
        if not (isinstance(lookup, fx.Node) and lookup.target is torch.ops.grc.lookup.default):
            raise Miss("the features do not come from look-ups that end in one cat")
        bases, rows, dims, lengths, _, padding = lookup.args[4:10]
        count, dim = int(shape(features)[1]), int(shape(features)[2])
        if lookup.args[2] is not None or lookup.args[3] is not None or set(lengths) != {1}:  # type: ignore[arg-type]
            raise Miss("a feature has more than one id")
        if set(dims) != {dim} or len(dims) != count:  # type: ignore[arg-type]
            raise Miss(f"features have widths {sorted(set(dims))}")  # type: ignore[type-var, arg-type]
        term = linear_term(old, lookup)
        linear = term.lookup.args[0] if term else None
        root = term.root if term else old
        readers = len(lookup.users)
        with edit.at(
            lookup
        ):  # every operand of the fused op is an operand of the look-up, so it can stand in its place
            both = edit.call(BAG_FM.overload, lookup.args[0], linear, lookup.args[1], bases, rows, dim, padding)
            both.meta["tables"] = lookup.meta.get("tables")
            rows_out, fm = edit.item(both, 0), edit.item(both, 1)
        edit.replace(lookup, rows_out)
        with edit.at(root):
            new = edit.reshape(fm, -1, *[int(s) for s in shape(root)[1:]])
        return Fused(root, new, f"{6 + 2 * bool(term)} launches, {4 * count * dim * readers / 1024:.1f} KB a row")


def sum_square(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """`(sum e)^2 - sum e^2` over features, then half of its sum over the width."""
    if len(node.args) != 2 or argument(node, "alpha") != 1:
        return None
    squared, summed = node.args
    if not is_op(squared, aten.mul) or squared.args[0] is not squared.args[1] or not over_features(squared.args[0]):  # type: ignore[union-attr]
        return None
    if not over_features(summed) or not is_op(summed.args[0], aten.mul):  # type: ignore[union-attr]
        return None
    features = squared.args[0].args[0]  # type: ignore[union-attr]
    product = summed.args[0]  # type: ignore[union-attr]
    if product.args[0] is not features or product.args[1] is not features:  # type: ignore[union-attr]
        return None
    if not is_op(features, aten.reshape) or value(features).dim() != 3:
        raise Miss("the features do not come from look-ups that end in one cat")
    end = halved_sum(node)
    return (features, end) if end is not None else None  # type: ignore[return-value]


def over_features(node: Any) -> bool:
    """A sum over dimension 1 of a `[B, F, D]` value."""
    return is_op(node, aten.sum) and value(node.args[0]).dim() == 3 and axes(node, 3) == [1]


def axes(node: fx.Node, rank: int) -> list[int]:
    dims = argument(node, "dim") if len(node.args) > 1 or "dim" in node.kwargs else list(range(rank))
    return [d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])]


def halved_sum(node: fx.Node) -> fx.Node | None:
    """Follow a value through `* 0.5` and a sum over its last dimension, in either order, and reshapes between them."""
    halved = summed = False
    while not (halved and summed):
        user = only_user(node)
        if user is None:
            return None
        if is_op(user, aten.mul) and 0.5 in user.args and not halved:
            halved = True
        elif is_op(user, aten.sum) and not summed and set(axes(user, value(node).dim())) >= {value(node).dim() - 1}:
            if 0 in axes(user, value(node).dim()):
                return None
            summed = True
        elif not is_op(user, aten.reshape):
            return None
        node = user
    return node


def pair_sum(module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The sum of all pairwise dot products, taken from one strict triangle of `E @ E^T`."""
    picked = node.args[0]
    if not is_op(picked, aten.index, aten.index_select) or value(picked).dim() != 2 or axes(node, 2) != [1]:
        return None
    products, pairs = chosen_pairs(module, picked)  # type: ignore[arg-type]
    if products is None or pairs is None:
        return None
    features = products.args[0]
    _, diagonal = triangle(pairs, int(shape(features)[1]))  # type: ignore[arg-type]
    if diagonal or not is_op(features, aten.reshape):
        return None
    return features, node  # type: ignore[return-value]


class Linear:
    """A linear term found beside the second-order one: its look-up, and the sum that holds both."""

    def __init__(self, lookup: fx.Node, root: fx.Node):
        self.lookup, self.root = lookup, root


def linear_term(second_order: fx.Node, lookup: fx.Node) -> Linear | None:
    """`second_order + sum_f w[id_f]`, where w is read with the ids and row numbers of the features."""
    user = only_user(second_order)
    if user is None or not is_op(user, aten.add) or argument(user, "alpha") != 1:
        return None
    other = user.args[1] if user.args[0] is second_order else user.args[0]
    if not isinstance(other, fx.Node) or str(shape(other)) != str(shape(second_order)):
        return None
    inner = other
    while is_op(inner, aten.reshape):
        inner = inner.args[0]  # type: ignore[assignment]
    if not is_op(inner, aten.sum):
        return None
    rank = value(inner.args[0]).dim()  # type: ignore[arg-type]
    if 0 in axes(inner, rank) or (rank == 3 and 1 not in axes(inner, rank)):
        return None
    weights = inner.args[0]
    while is_op(weights, aten.reshape):
        weights = weights.args[0]  # type: ignore[assignment]
    if not (isinstance(weights, fx.Node) and weights.target is torch.ops.grc.lookup.default):
        return None
    same = weights.args[1] is lookup.args[1] and weights.args[4] == lookup.args[4] and weights.args[5] == lookup.args[5]
    if not same or set(weights.args[6]) != {1} or weights.args[9] != lookup.args[9]:  # type: ignore[arg-type]
        return None
    if value(weights.args[0]).numel() != value(lookup.args[0]).shape[0] or value(weights.args[0]).dim() != 2:  # type: ignore[arg-type]
        return None
    return Linear(weights, user)
