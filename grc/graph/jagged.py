"""Jagged features: where the ids of many features lie one after the other, with one matrix of lengths."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from grc.graph.lookups import Bag
from grc.graph.match import argument, aten, is_op, same_shape, shape, value

ZEROS = (aten.new_zeros, aten.zeros, aten.zeros_like)


@dataclass(frozen=True)
class Keyed:
    """All features of a keyed jagged tensor: values `[V]`, and their lengths `[F, B]`, feature after feature."""

    values: fx.Node
    lengths: fx.Node


def keyed(bags: Sequence[Bag]) -> Keyed | None:
    """The keyed tensor that bags with offsets were split from, if they are all of its features in their order.

    That is how TorchRec's EmbeddingBagCollection exports: values split by the sums of the lengths, and for each feature
    the running sum of its own lengths.
    """
    split: Any = part_of(bags[0].ids, 0, aten.split_with_sizes)
    if split is None or any(not bag.last_offset for bag in bags) or len(value(split)) != len(bags):
        return None
    matrix: fx.Node | None = None
    for index, bag in enumerate(bags):
        lengths = lengths_of(bag.offsets, index)
        size = summed_size(split.args[1][index], index)  # type: ignore[index]
        if part_of(bag.ids, index, aten.split_with_sizes) is not split or lengths is None or size is None:
            return None
        matrix = matrix or lengths
        if not same_matrix(lengths, matrix) or not same_matrix(size, matrix):
            return None
    assert matrix is not None
    return Keyed(split.args[0], matrix) if shape(matrix)[0] == len(bags) else None  # type: ignore[arg-type]


def part_of(node: Any, index: int, *packets: Any) -> fx.Node | None:
    """The call whose result number `index` a value is."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem or node.args[1] != index:
        return None
    return node.args[0] if is_op(node.args[0], *packets) else None  # type: ignore[return-value]


def lengths_of(offsets: Any, index: int) -> fx.Node | None:
    """M where offsets are row `index` of `cat([zeros[F, 1], cumsum(M[F, B], 1)], 1)`."""
    unbound = part_of(offsets, index, aten.unbind)
    joined: Any = unbound.args[0] if unbound is not None else None
    if unbound is None or argument(unbound, "dim") % value(joined).dim() != 0 or not is_op(joined, aten.cat):
        return None
    parts = list(joined.args[0])
    if len(parts) != 2 or argument(joined, "dim") not in (1, -1) or not is_op(parts[0], *ZEROS):
        return None
    total = parts[1]
    if shape(parts[0])[1] != 1 or not is_op(total, aten.cumsum) or value(total).dim() != 2:
        return None
    return total.args[0] if argument(total, "dim") in (1, -1) else None


def summed_size(size: Any, index: int) -> fx.Node | None:
    """M where a size is `item(sum(M[F, B], 1)[index])`."""
    if not is_op(size, aten.item, aten._local_scalar_dense):
        return None
    unbound = part_of(size.args[0], index, aten.unbind)
    total: Any = unbound.args[0] if unbound is not None else None
    if unbound is None or not is_op(total, aten.sum) or value(total.args[0]).dim() != 2:
        return None
    dims = argument(total, "dim")
    return total.args[0] if [d % 2 for d in (dims if isinstance(dims, (list, tuple)) else [dims])] == [1] else None


def same_matrix(a: fx.Node, b: fx.Node) -> bool:
    """One value, or two views of one value with one shape."""
    if a is b:
        return True
    return is_op(a, aten.reshape) and is_op(b, aten.reshape) and a.args[0] is b.args[0] and same_shape(a, b)


def ended(ends: Tensor, position: Tensor) -> Tensor:
    """How many bags end at or before each position: searchsorted, which ONNX has not, for positions that are counted up."""
    ends = ends.clamp(0, position.shape[0])
    return position.new_zeros(position.shape[0] + 1).index_add(0, ends, ends.new_ones(ends.shape)).cumsum(0)[:-1]
