"""Where bag_fm applies: a factorisation machine over looked-up features, with its linear term where it reads the same ids,
and bi-interaction pooling, which is one before its last sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from grc.graph.lookups import find_bag
from grc.graph.match import Miss, argument, aten, is_op, only_user, same_shape, shape, static, value
from grc.graph.rewrite import Rewriter
from grc.kernels.bag_dot.pattern import chosen_pairs, is_gram, triangle
from grc.kernels.bag_fm import BAG_FM
from grc.kernels.fusion import Fused, Fusion


class BagFm(Fusion):
    """Look up and take the second-order term 0.5 * sum((sum e)^2 - sum e^2) (Rendle 2010; DeepFM, Guo et al. 2017), or all
    of its width (He & Chua 2017)."""

    name = "bag-fm"
    op = BAG_FM
    anchors = (aten.sub, aten.sum)

    def fuse(self, edit: Rewriter, node: fx.Node) -> Fused | None:
        found = sum_square(node) if is_op(node, aten.sub) else pair_sum(edit.module, node)
        if found is None:
            return None
        features, old, summed = found
        read = reading(edit.module, features if is_op(features, aten.embedding) else features.args[0])
        if read is None:
            raise Miss("the features do not come from look-ups that end in one cat")
        count, dim = int(shape(features)[1]), int(shape(features)[2])
        if not read.single:
            raise Miss("a feature has more than one id")
        if set(read.dims) != {dim} or len(read.dims) != count:
            raise Miss(f"features have widths {sorted(set(read.dims))}")
        term = linear_term(edit.module, old, read) if summed else None
        linear = term.table if term else None
        if term:
            edit.replace(term.sum, term.rest)
        readers, keep = len(read.node.users), read_beside(read.node, old)
        with edit.at(read.node):  # every operand of the fused op is one of the look-up's, so it can stand in its place
            layout = (read.bases, read.rows, dim, read.padding)
            both = edit.call(BAG_FM.overload, read.arena, linear, read.ids, *layout, [], summed, keep)
            both.meta["tables"] = read.node.meta.get("tables") or [str(read.arena.target)] * count
            fm = edit.item(both, 1)
            if keep:
                rows = edit.item(both, 0)
                edit.replace(read.node, edit.reshape(rows, -1, count, dim) if read.node is features else rows)
        with edit.at(old):
            new = edit.reshape(fm, -1, *[int(s) for s in shape(old)[1:]])
            if is_op(old, aten.sub):  # not halved
                new = edit.call(aten.mul.Tensor, new, 2.0)
        return Fused(
            old, new, f"{5 + summed + 2 * bool(term)} launches, {4 * count * dim * readers / 1024:.1f} KB a row"
        )


def read_beside(rows: fx.Node, old: fx.Node) -> bool:
    """Whether an answer needs rows for anything but what is replaced."""
    waiting, seen = [rows], {old}
    while waiting:
        node = waiting.pop()
        if node.op == "output":
            return True
        seen.add(node)
        waiting += [user for user in node.users if user not in seen]
    return False


class Reading(NamedTuple):
    """A look-up's operands, in the terms of `grc.lookup`, whoever does it; `single` where every feature has one id."""

    node: fx.Node
    arena: fx.Node
    ids: fx.Node
    bases: list[int]
    rows: list[int]
    dims: list[int]
    padding: list[int]
    single: bool

    def like(self, other: Reading) -> bool:
        """Whether two look-ups read the same ids at the same rows."""
        return self[2:5] == other[2:5] and self.padding == other.padding


def reading(module: fx.GraphModule, node: Any) -> Reading | None:
    """What a node reads that is `grc.lookup`, or an embedding of some ids a row."""
    if isinstance(node, fx.Node) and node.target is torch.ops.grc.lookup.default:
        arena, ids, offsets, weights, bases, rows, dims, lengths, _, padding = node.args[:10]
        single = offsets is None and weights is None and set(lengths) == {1}  # type: ignore[arg-type]
        return Reading(node, arena, ids, *map(list, (bases, rows, dims, padding)), single)  # type: ignore[arg-type, call-arg]
    bag = find_bag(module, node) if is_op(node, aten.embedding) else None
    if bag is None:
        return None
    rows, count = [bag.rows - base for base in bag.bases], bag.features
    return Reading(node, bag.table, bag.ids, list(bag.bases), rows, [bag.dim] * count, [bag.padding] * count, True)


def sum_square(node: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
    """`(sum e)^2 - sum e^2` over features, what may be replaced, and whether that is half of its sum over the width."""
    if len(node.args) != 2 or argument(node, "alpha") != 1:
        return None
    squared, summed = node.args
    if not is_op(squared, aten.mul) or squared.args[0] is not squared.args[1]:  # type: ignore[union-attr]
        return None
    if flat_sums(squared.args[0], summed):  # type: ignore[union-attr]
        raise Miss("the sums run over features and width at once, so every number is a feature of its own")
    if not over_features(summed) or not is_op(summed.args[0], aten.mul):  # type: ignore[union-attr]
        return None
    if not over_features(squared.args[0]):  # type: ignore[union-attr]
        return None
    features = squared.args[0].args[0]  # type: ignore[union-attr]
    product = summed.args[0]  # type: ignore[union-attr]
    if product.args[0] is not features or product.args[1] is not features:  # type: ignore[union-attr]
        return None
    if not is_op(features, aten.reshape, aten.embedding) or value(features).dim() != 3:
        raise Miss("the features do not come from look-ups that end in one cat")
    end = halved_sum(node)
    return (features, halved(node), False) if end is None else (features, end, True)  # type: ignore[return-value]


def flat_sums(total: Any, squares: Any) -> bool:
    """True for `sum(x)` and `sum(x * x)` over all of `[B, F * D]` with look-ups in it."""
    if not is_op(total, aten.sum) or not is_op(squares, aten.sum) or not is_op(squares.args[0], aten.mul):
        return False
    x = total.args[0]
    if value(x).dim() != 2 or list(squares.args[0].args) != [x, x] or 1 not in axes(total, 2):
        return False
    parts = x.args[0] if is_op(x, aten.cat) else [x]
    return any(isinstance(p, fx.Node) and p.target is torch.ops.grc.lookup.default for p in parts)


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


def halved(node: fx.Node) -> fx.Node:
    """Half of a value where that is all that is read of it, else the value itself."""
    user = only_user(node)
    return user if is_op(user, aten.mul) and 0.5 in user.args else node  # type: ignore[union-attr, return-value]


def pair_sum(module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
    """The sum of all pairwise dot products: of what is taken from one strict triangle of `E @ E^T`, or of that with zeros."""
    picked = node.args[0]
    if is_op(picked, aten.triu, aten.tril) and value(picked).dim() == 3 and axes(node, 3) == [1, 2]:
        products: Any = picked.args[0] if is_gram(picked.args[0]) else None  # type: ignore[union-attr]
        strict = argument(picked, "diagonal") == (1 if is_op(picked, aten.triu) else -1)  # type: ignore[arg-type]
    elif is_op(picked, aten.index, aten.index_select) and value(picked).dim() == 2 and axes(node, 2) == [1]:
        products, pairs = chosen_pairs(module, picked)  # type: ignore[arg-type]
        strict = pairs is not None and not triangle(pairs, int(shape(products)[1]))[1]  # type: ignore[arg-type]
    else:
        return None
    features = products.args[0] if products is not None else None
    if not strict or not is_op(features, aten.reshape, aten.embedding):
        return None
    last = node
    while is_op(user := only_user(last), aten.reshape) and all(map(static, shape(user)[1:])):  # type: ignore[arg-type]
        last = user  # type: ignore[assignment]
    return features, last, True  # type: ignore[return-value]


@dataclass(frozen=True)
class Linear:
    """A linear term found beside the second-order one: its table, the sum that it enters, and that sum without it."""

    table: fx.Node
    sum: fx.Node
    rest: fx.Node


def linear_term(module: fx.GraphModule, second_order: fx.Node, features: Reading) -> Linear | None:
    """`sum_f w[id_f]` among the terms that the second-order one is added to, read with its ids and row numbers."""
    term, user = second_order, only_user(second_order)
    while user is not None and plain_sum(user, second_order):
        other = user.args[1] if user.args[0] is term else user.args[0]
        if same_shape(other, second_order):  # type: ignore[arg-type]
            found = linear_table(module, other, features)
            if found is not None:
                return Linear(found, user, term)
        waiting = [other]
        while waiting:
            inner = waiting.pop()
            if not isinstance(inner, fx.Node) or only_user(inner) is None or not plain_sum(inner, second_order):
                continue
            for leaf, rest in (inner.args, inner.args[::-1]):
                # A bias alone has fewer dimensions than the sum, and may stand only where it meets a term of all of them.
                if not same_shape(leaf, second_order) or not (inner is other or same_shape(rest, second_order)):  # type: ignore[arg-type]
                    continue
                found = linear_table(module, leaf, features)
                if found is not None:
                    return Linear(found, inner, rest)  # type: ignore[arg-type]
            waiting += inner.args
        term, user = user, only_user(user)
    return None


def plain_sum(node: fx.Node, like: fx.Node) -> bool:
    """True for `a + b` with the shape of the second-order term."""
    if not is_op(node, aten.add) or len(node.args) != 2 or argument(node, "alpha") != 1:
        return False
    return same_shape(node, like) and all(isinstance(term, fx.Node) for term in node.args)


def linear_table(module: fx.GraphModule, node: Any, features: Reading) -> fx.Node | None:
    """The table of one weight for each id of the features, where a value is its sum over them."""
    while is_op(node, aten.reshape):
        node = node.args[0]
    if not is_op(node, aten.sum) or any(size != 1 for size in shape(node)[1:]):
        return None
    weights = node.args[0]
    if 0 in axes(node, value(weights).dim()):
        return None
    while is_op(weights, aten.reshape):
        weights = weights.args[0]
    read = reading(module, weights)
    if read is None or not read.single or set(read.dims) != {1}:
        return None
    table = value(read.arena)
    fits = table.dim() == 2 and table.numel() == value(features.arena).shape[0]
    return read.arena if fits and read.like(features) else None
