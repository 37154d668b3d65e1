"""Check ids inside of the graph where what reads by them is not one of ours, so that no one else has to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from grc.graph.ids import origins
from grc.graph.intervals import Known, interval, intervals
from grc.graph.match import aten, attribute, is_op, shape, value
from grc.graph.rewrite import Rewriter, copy_graph
from grc.kernels import CHECKED_IDS

TYPES = (torch.int32, torch.int64)
BY_DIM = (  # (self, dim, index, ...)
    aten.gather, aten.index_select, aten.scatter, aten.scatter_add, aten.scatter_reduce, aten.index_add, aten.index_copy,
    aten.index_fill,
)  # fmt: skip
BY_LIST = (aten.index, aten.index_put)  # (self, indices, ...), where -1 is the last place


def with_checked_ids(graph: fx.GraphModule, computed: bool = False) -> fx.GraphModule:
    """A copy of the graph in which `embedding` on a constant table reads ids that were checked, if a request gives them.

    Inductor's own code would read a row from the end for an id below zero, and whatever lies behind a table on a GPU. With
    `computed` every index is checked that is not known to lie within a size which does not vary: one that does not lie there
    would be an assertion on the GPU, after which the process can use it no more.
    """
    copy = copy_graph(graph)
    edit = Rewriter(copy)
    known = intervals(copy) if computed else {}
    made: dict[tuple[fx.Node, int, bool], fx.Node] = {}

    def checked(node: fx.Node, ids: fx.Node, size: int, wraps: bool = False) -> fx.Node:
        key = ids, size, wraps
        if key not in made:
            with edit.at(node):
                given = ids
                if wraps:
                    behind = edit.call(aten.add.Tensor, ids, size)
                    given = edit.call(aten.where.self, edit.call(aten.lt.Scalar, ids, 0), behind, ids)
                flat = edit.call(CHECKED_IDS.overload, edit.reshape(given, -1), size)
                made[key] = edit.call(aten.reshape.default, flat, sizes_of(edit, ids))
        return made[key]

    for node in list(copy.graph.nodes):
        if is_op(node, aten.embedding):
            ids: fx.Node = node.args[1]  # type: ignore[assignment]
            table = attribute(copy, node.args[0])
            asked = table is not None and any(matrix.op == "placeholder" for matrix, _, _ in origins(ids))
            rows = shape(node.args[0])[0]  # type: ignore[arg-type]
            if (asked and value(ids).dtype in TYPES) or (computed and loose(known, ids, rows)):
                node.update_arg(1, checked(node, ids, rows))
        elif computed:
            for place, ids, size, wraps in indices(node):
                if loose(known, ids, size, wraps):
                    safe = checked(node, ids, size, wraps)
                    if wraps:
                        found = list(node.args[1])  # type: ignore[arg-type]
                        found[place] = safe
                        node.update_arg(1, found)
                    else:
                        node.update_arg(place, safe)
    edit.finish()
    return copy


def checks_any(graph: fx.GraphModule) -> bool:
    return any(node.target is CHECKED_IDS.overload for node in graph.graph.nodes)


def indices(node: fx.Node) -> Iterator[tuple[int, fx.Node, Any, bool]]:
    """(where it stands, the index, the size that it points into, whether it may count from the end) of what a node reads or
    writes by."""
    if is_op(node, *BY_DIM) and shape(node.args[0]):  # type: ignore[arg-type]
        yield 2, node.args[2], shape(node.args[0])[node.args[1]], False  # type: ignore[misc, index, arg-type]
    elif is_op(node, *BY_LIST) and all(value(index).dtype in TYPES for index in node.args[1] if index is not None):  # type: ignore[union-attr]
        for place, index in enumerate(node.args[1]):  # type: ignore[arg-type]
            if index is not None:
                yield place, index, shape(node.args[0])[place], True  # type: ignore[misc, arg-type]


def loose(known: Known, ids: fx.Node, size: Any, wraps: bool = False) -> bool:
    """Whether an index may point outside of 0..size-1, for all that is known. One into a size that varies is left as it is."""
    if not isinstance(size, int) or value(ids).dtype not in TYPES:
        return False
    low, high = interval(known, ids)
    return low < (-size if wraps else 0) or high >= size


def sizes_of(edit: Rewriter, node: fx.Node) -> list[int | fx.Node]:
    """The sizes of a node, for a reshape: -1 for the only one that varies, values of the graph for several."""
    sizes = value(node).shape
    varying = [dim for dim, size in enumerate(sizes) if not isinstance(size, int)]
    if len(varying) == 1:
        return [-1 if dim in varying else size for dim, size in enumerate(sizes)]
    return [edit.call(aten.sym_size.int, node, dim) if dim in varying else size for dim, size in enumerate(sizes)]
