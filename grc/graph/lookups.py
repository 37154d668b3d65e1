"""Find embedding look-ups in a graph, however they were written, and describe each as a bag over one table."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from grc.graph.match import argument, aten, attribute, constant_list, is_op, same_size, shape, static, value

SUM, MEAN, MAX = 0, 1, 2
NO_PADDING = -(2**63)
INTEGERS = (torch.int32, torch.int64)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # of which a kernel reads rows


@dataclass(frozen=True)
class Bag:
    """One look-up: `features` ids a row, each read from `table` at its base; pooled over `length` ids each.

    Without offsets, `ids` is `[B, features * length]` or flat, `[B * length]` of one feature; with offsets it is `[V]`, of one.
    Weights are one for each id, in the shape of the ids or as `[B, 1, L]`.
    """

    node: fx.Node
    table: fx.Node
    ids: fx.Node
    features: int
    length: int
    bases: tuple[int, ...]
    pooling: int = SUM
    padding: int = NO_PADDING
    offsets: fx.Node | None = None
    last_offset: bool = False
    weights: fx.Node | None = None

    @property
    def rows(self) -> int:
        return int(shape(self.table)[0])

    @property
    def dim(self) -> int:
        return int(shape(self.table)[1])


def find_bag(module: fx.GraphModule, node: Any) -> Bag | None:
    """The bag behind a value of shape `[B, features * dim]`, or None."""
    if not isinstance(node, fx.Node):
        return None
    inner = node
    if is_op(node, aten.reshape) and value(node).dim() == 2:
        inner = node.args[0]  # type: ignore[assignment]
    if is_op(inner, aten.embedding):
        return embedding(module, node, inner)
    if is_op(inner, aten.sum, aten.mean, aten.amax):
        return pooled_embedding(module, node, inner)
    if is_op(inner, aten.bmm):
        return weighted_embedding(module, node, inner)
    if inner.target is operator.getitem and inner.args[1] == 0 and is_op(inner.args[0], aten.embedding_bag):
        return embedding_bag(module, node, inner.args[0])  # type: ignore[arg-type]
    return None


def embedding(module: fx.GraphModule, node: fx.Node, inner: fx.Node) -> Bag | None:
    """`[B, D]` of one id a row, or `[B, L, D]` of L ids a row: then the bag is the embedding, not a reshape of it."""
    table, ids = inner.args[:2]
    if not is_table(module, table) or not isinstance(ids, fx.Node) or value(ids).dtype not in INTEGERS:
        return None
    dims = shape(ids)
    if len(dims) == 0 or len(dims) > 2 or (len(dims) == 2 and not static(dims[1])) or static(dims[0]):
        return None
    count = int(dims[1]) if len(dims) == 2 else 1
    if count == 0 or (node is not inner and shape(node)[1] != count * shape(table)[1]):  # type: ignore[arg-type]
        return None
    ids, bases = constant_bases(module, ids, count)
    return Bag(inner, table, ids, count, 1, bases)  # type: ignore[arg-type]


def pooled_embedding(module: fx.GraphModule, node: fx.Node, inner: fx.Node) -> Bag | None:
    """sum, mean or max over the ids of `embedding(W, ids[B, L])`."""
    source = inner.args[0]
    if (
        not is_op(source, aten.embedding)
        or value(source).dim() != 3
        or value(inner).dim() - (len(shape(inner)) == 3) != 2
    ):
        return None
    dims = argument(inner, "dim")
    if [d % 3 for d in (dims if isinstance(dims, (list, tuple)) else [dims])] != [1]:
        return None
    if len(source.users) > 1:  # the rows are needed themselves: pooling apart would read them twice
        return None
    table, ids = source.args[:2]  # type: ignore[union-attr]
    if not is_table(module, table) or value(ids).dtype not in INTEGERS or not static(shape(ids)[1]):  # type: ignore[arg-type]
        return None
    if value(node).dim() != 2 or static(shape(ids)[0]):  # type: ignore[arg-type]
        return None
    if len(set(constant_bases(module, ids, int(shape(ids)[1]))[1])) > 1:  # type: ignore[arg-type]
        return None  # a feature a column: a look-up of many features, and a sum over them
    pooling = SUM if is_op(inner, aten.sum) else MEAN if is_op(inner, aten.mean) else MAX
    return Bag(node, table, ids, 1, int(shape(ids)[1]), (0,), pooling)  # type: ignore[arg-type]


def weighted_embedding(module: fx.GraphModule, node: fx.Node, inner: fx.Node) -> Bag | None:
    """A weighted sum of rows that nothing else reads: `[B, 1, L] @ embedding(W, ids[B, L])`, as masked means are written."""
    weights, source = inner.args
    if not is_op(source, aten.embedding) or value(node).dim() != 2 or shape(weights)[1] != 1 or len(source.users) > 1:  # type: ignore[union-attr, arg-type]
        return None
    table, ids = source.args[:2]  # type: ignore[union-attr]
    if not is_table(module, table) or value(ids).dtype not in INTEGERS or value(ids).dim() != 2:
        return None
    count, batch = shape(ids)[1], shape(ids)[0]  # type: ignore[arg-type]
    if not static(count) or static(batch) or len(set(constant_bases(module, ids, int(count))[1])) > 1:  # type: ignore[arg-type]
        return None
    return Bag(node, table, ids, 1, int(count), (0,), weights=weights)  # type: ignore[arg-type]


def embedding_bag(module: fx.GraphModule, node: fx.Node, bag: fx.Node) -> Bag | None:
    table, ids, offsets = bag.args[:3]
    if not is_table(module, table) or value(ids).dtype not in INTEGERS:
        return None
    pooling, padding = int(argument(bag, "mode")), argument(bag, "padding_idx")
    weights = argument(bag, "per_sample_weights")
    padding = NO_PADDING if padding is None or padding < 0 else int(padding)
    length = regular_length(offsets)
    if length is not None and not argument(bag, "include_last_offset"):
        count = length * shape(offsets)[0]  # type: ignore[arg-type]
        if same_size(shape(ids)[0], count):  # type: ignore[arg-type]
            read = None if weights is None else rows_of(weights, length)
            return Bag(node, table, rows_of(ids, length), 1, length, (0,), pooling, padding, weights=read)  # type: ignore[arg-type]
    last = bool(argument(bag, "include_last_offset"))
    return Bag(node, table, ids, 1, 0, (0,), pooling, padding, offsets, last, weights)  # type: ignore[arg-type]


def regular_length(offsets: Any) -> int | None:
    """L where the offsets are 0, L, 2L, ...: nn.EmbeddingBag on a `[B, L]` input."""
    if not is_op(offsets, aten.arange):
        return None
    names = [a.name for a in offsets.target._schema.arguments]
    step = argument(offsets, "step") if "step" in names else 1
    start = argument(offsets, "start") if "start" in names else 0
    return step if start == 0 and isinstance(step, int) else None


def rows_of(flat: fx.Node, length: int) -> fx.Node:
    """The `[B, L]` matrix that was flattened to `[B * L]`, or that one itself."""
    inner = flat.args[0] if is_op(flat, aten.reshape) else flat
    if value(inner).dim() == 2 and shape(inner)[1] == length:  # type: ignore[arg-type]
        return inner  # type: ignore[return-value]
    return flat


def is_table(module: fx.GraphModule, node: Any) -> bool:
    tensor = attribute(module, node)
    return tensor is not None and tensor.dim() == 2 and tensor.is_contiguous() and tensor.dtype in FLOATS


def constant_bases(module: fx.GraphModule, ids: fx.Node, count: int) -> tuple[fx.Node, tuple[int, ...]]:
    """`ids + offsets` with constant offsets: one table that holds all features, one after the other."""
    if is_op(ids, aten.add) and argument(ids, "alpha") == 1:
        for matrix, constant in ((ids.args[0], ids.args[1]), (ids.args[1], ids.args[0])):
            offsets = constant_list(module, constant)
            if isinstance(constant, int):
                offsets = [constant]
            if offsets is None or not isinstance(matrix, fx.Node) or value(matrix).shape != value(ids).shape:
                continue
            if len(offsets) in (1, count) and min(offsets) >= 0 and value(matrix).dtype in INTEGERS:
                return matrix, tuple(offsets * count if len(offsets) == 1 else offsets)
    return ids, (0,) * count


@dataclass(frozen=True)
class Columns:
    """`width` columns of a matrix `[B, T]`, from `start` on; cast to `dtype` where the matrix has another."""

    matrix: fx.Node
    start: int
    width: int
    dtype: torch.dtype | None = None


def columns_of(ids: fx.Node) -> Columns:
    """Follow ids through select, slice and casts to the matrix they are columns of."""
    if is_op(ids, aten.to, aten._to_copy) and value(ids).dtype in INTEGERS and isinstance(ids.args[0], fx.Node):
        piece = columns_of(ids.args[0])
        if piece.dtype is None and piece.matrix is not ids.args[0]:
            return Columns(piece.matrix, piece.start, piece.width, value(ids).dtype)
    if is_op(ids, aten.reshape) and value(ids).dim() <= 2:
        inner = ids.args[0]
        flat_equal = value(ids).dim() == 1 or shape(ids)[1] == 1
        if isinstance(inner, fx.Node) and value(inner).dim() <= 2 and flat_equal and width_of(inner) == 1:
            return columns_of(inner)
    if is_op(ids, aten.select) and argument(ids, "dim") == 1:
        matrix = ids.args[0]
        index = argument(ids, "index")
        if value(matrix).dim() == 2 and isinstance(index, int) and static(shape(matrix)[1]):  # type: ignore[arg-type]
            return Columns(matrix, index % int(shape(matrix)[1]), 1)  # type: ignore[arg-type]
    if is_op(ids, aten.slice) and argument(ids, "dim") == 1 and argument(ids, "step") == 1 and value(ids).dim() == 2:
        matrix, start = ids.args[0], argument(ids, "start") or 0
        if isinstance(start, int) and static(shape(ids)[1]) and static(shape(matrix)[1]):  # type: ignore[arg-type]
            start = start + int(shape(matrix)[1]) if start < 0 else start  # type: ignore[arg-type]
            return Columns(matrix, start, int(shape(ids)[1]))  # type: ignore[arg-type]
    return Columns(ids, 0, width_of(ids))


def width_of(ids: fx.Node) -> int:
    """Columns of `[B, T]`; 1 for `[B]`; 0 where the width is symbolic."""
    dims = shape(ids)
    return 1 if len(dims) == 1 else int(dims[1]) if static(dims[1]) else 0
