"""Where bag_dot applies: all pairwise dot products of looked-up features, and a choice of one triangle of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from grc.graph.match import Miss, argument, aten, attribute, constant_list, is_op, only_user, shape, value
from grc.graph.rewrite import Rewriter
from grc.kernels.bag_dot import BAG_DOT
from grc.kernels.fusion import Fused, Fusion


class BagDot(Fusion):
    """Look up, pool, and take all pairwise dot products (DLRM; Naumov et al. 2019, section 2.1.3)."""

    name = "bag-dot"
    op = BAG_DOT
    anchors = (aten.index, aten.index_select)

    def fuse(self, edit: Rewriter, node: fx.Node) -> Fused | None:
        products, pairs = chosen_pairs(edit.module, node)
        if products is None or pairs is None:
            return None
        features = products.args[0]
        lookup, dense = operands(features)  # type: ignore[arg-type]
        upper, diagonal = triangle(pairs, int(shape(features)[1]))  # type: ignore[arg-type]
        dims = argument(lookup, "dims")
        if len(set(dims)) != 1 or dims[0] != shape(features)[2]:  # type: ignore[arg-type]
            raise Miss(f"features have widths {sorted(set(dims))}")
        old = keeps_dense(node, dense)
        keep = old is not node
        arena, ids, offsets, weights = lookup.args[:4]
        bases, rows, _, lengths, pooling, padding = lookup.args[4:10]
        with edit.at(old):
            new = edit.call(
                BAG_DOT.overload, arena, ids, offsets, weights, dense, bases, rows, dims[0], lengths, pooling, padding,
                upper, diagonal, keep,
            )  # fmt: skip
        new.meta["tables"] = lookup.meta.get("tables")
        n = int(shape(features)[1])  # type: ignore[arg-type]
        written = 4 * n * (int(dims[0]) + n)
        return Fused(old, new, f"{3 + keep} launches, {written / 1024:.1f} KB a row")


def chosen_pairs(module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node | None, list[tuple[int, int]] | None]:
    """The `T @ T^T` that a node picks from, and the (row, column) of each pick."""
    if is_op(node, aten.index):
        source, indices = node.args[0], list(node.args[1])  # type: ignore[arg-type]
        if len(indices) == 3 and indices[0] is None and is_gram(source):
            li, lj = constant_list(module, indices[1]), constant_list(module, indices[2])
            return (source, list(zip(li, lj, strict=True))) if li is not None and lj is not None else (None, None)  # type: ignore[return-value]
        if len(indices) == 2 and indices[0] is None:
            mask = attribute(module, indices[1])
            if is_gram(source) and mask is not None and mask.dtype is torch.bool and mask.dim() == 2:
                return source, [(int(i), int(j)) for i, j in mask.nonzero().tolist()]  # type: ignore[return-value]
            return flattened(module, source, indices[1])
        return None, None
    if argument(node, "dim") % value(node).dim() != 1:
        return None, None
    return flattened(module, node.args[0], node.args[2])


def flattened(module: fx.GraphModule, source: Any, index: Any) -> tuple[fx.Node | None, list[tuple[int, int]] | None]:
    """A choice from `[B, N * N]`."""
    if not is_op(source, aten.reshape) or not is_gram(source.args[0]) or value(source).dim() != 2:
        return None, None
    n = int(shape(source.args[0])[1])
    tensor = attribute(module, index)
    if tensor is None or tensor.dim() != 1:
        return None, None
    places = tensor.nonzero().flatten().tolist() if tensor.dtype is torch.bool else tensor.tolist()
    return source.args[0], [divmod(int(p), n) for p in places]


def is_gram(node: Any) -> bool:
    """True for `bmm(T, T^T)`."""
    if not is_op(node, aten.bmm):
        return False
    left, right = node.args
    return is_op(right, aten.transpose) and right.args[0] is left and list(right.args[1:]) == [1, 2]


def triangle(pairs: list[tuple[int, int]], n: int) -> tuple[bool, bool]:
    """(upper, diagonal) of a row-by-row triangle; the products are symmetric, so (i, j) may be written (j, i)."""
    wanted = [(max(p), min(p)) for p in pairs]
    for diagonal in (False, True):
        lower = [(i, j) for i in range(n) for j in range(i + diagonal)]
        upper = [(j, i) for i in range(n) for j in range(i + (not diagonal), n)]
        if wanted == lower:
            return False, diagonal
        if wanted == upper:
            return True, diagonal
    raise Miss(f"the {len(pairs)} products taken are not one triangle, row by row")


def operands(features: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The look-up and the dense vector that make up `T`."""
    flat = features.args[0] if is_op(features, aten.reshape) else features
    if is_lookup(flat):
        return flat, None  # type: ignore[return-value]
    if not is_op(flat, aten.cat):
        raise Miss("the features do not come from look-ups that end in one cat")
    parts = list(flat.args[0])  # type: ignore[union-attr, arg-type]
    lookups = [p for p in parts if is_lookup(p)]
    if len(lookups) != 1:
        raise Miss(f"the features come from {len(lookups)} look-ups")
    if len(parts) > 2 or parts[-1] is not lookups[0]:
        raise Miss(f"{len(parts) - 1} dense vectors beside the look-up; one, in front, is supported")
    dense = parts[0]
    if shape(dense)[1] != shape(features)[2]:
        raise Miss(f"the dense part is {shape(dense)[1]} wide, the features {shape(features)[2]}")
    return lookups[0], dense


def is_lookup(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is torch.ops.grc.lookup.default


def keeps_dense(node: fx.Node, dense: fx.Node | None) -> fx.Node:
    """The `cat([dense, pairs], 1)` that the products end in, or the products themselves."""
    user = only_user(node)
    if dense is None or user is None or not is_op(user, aten.cat):
        return node
    parts = list(user.args[0])  # type: ignore[arg-type]
    along = argument(user, "dim") in (1, -1)
    return user if len(parts) == 2 and parts[0] is dense and parts[1] is node and along else node
