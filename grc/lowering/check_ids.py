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
        sizes = value(ids).shape
        if not asked or value(ids).dtype not in TYPES or sum(not isinstance(size, int) for size in sizes) > 1:
            continue
        key = ids, len(table)
        if key not in made:
            with edit.at(node):
                flat = edit.call(CHECKED_IDS.overload, edit.reshape(ids, -1), len(table))
                made[key] = edit.reshape(flat, *(size if isinstance(size, int) else -1 for size in sizes))
        node.update_arg(1, made[key])
    edit.finish()
    return copy
