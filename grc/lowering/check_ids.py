"""Check the ids of a request inside of the graph where a look-up is not one of ours, so that no one else has to."""

from __future__ import annotations

import torch
from torch import fx

from grc.graph.ids import origins
from grc.graph.match import aten, attribute, is_op, value
from grc.graph.rewrite import Rewriter, copy_graph
from grc.kernels import CHECKED_IDS

TYPES = (torch.int32, torch.int64)


def with_checked_ids(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph in which `embedding` on a constant table reads ids that were checked, if a request gives them.

    Inductor's own code would read a row from the end for an id below zero, and whatever lies behind a table on a GPU.
    """
    copy = copy_graph(graph)
    edit = Rewriter(copy)
    made: dict[tuple[fx.Node, int], fx.Node] = {}
    for node in list(copy.graph.nodes):
        table = attribute(copy, node.args[0]) if is_op(node, aten.embedding) else None
        if table is None:
            continue
        ids: fx.Node = node.args[1]  # type: ignore[assignment]
        asked = [matrix for matrix, _, _ in origins(ids) if matrix.op == "placeholder"]
        if not asked or value(ids).dtype not in TYPES:
            continue
        key = ids, len(table)
        if key not in made:
            with edit.at(node):
                flat = edit.call(CHECKED_IDS.overload, edit.reshape(ids, -1), len(table))
                made[key] = edit.call(aten.reshape.default, flat, sizes_of(edit, ids))
        node.update_arg(1, made[key])
    edit.finish()
    return copy


def sizes_of(edit: Rewriter, node: fx.Node) -> list[int | fx.Node]:
    """The sizes of a node, for a reshape: -1 for the only one that varies, values of the graph for several."""
    sizes = value(node).shape
    varying = [dim for dim, size in enumerate(sizes) if not isinstance(size, int)]
    if len(varying) == 1:
        return [-1 if dim in varying else size for dim, size in enumerate(sizes)]
    return [edit.call(aten.sym_size.int, node, dim) if dim in varying else size for dim, size in enumerate(sizes)]
