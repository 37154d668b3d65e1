"""Export a rewritten graph again: torch checks every shape once more, and fused ops can be written out in plain aten."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from grc.graph.flat import flat_graph, quiet_export
from grc.graph.rewrite import copy_graph, find_attribute
from grc.kernels import OPS
from grc.kernels.fusion import FusedOp
from grc.lowering.engine import Lowerable


def export_graph(lowerable: Lowerable, plain: Collection[FusedOp] = ()) -> torch.export.ExportedProgram:
    """Export again; the ops in `plain` are traced through their references.

    The inputs are copies: of a view, torch would guard the tensor behind it, and fail on requests that are no views.
    """
    graph = written_out(lowerable.graph, plain) if plain else lowerable.graph
    inputs = tuple(tensor.clone() for tensor in lowerable.inputs)
    with torch.no_grad(), quiet_export():
        return torch.export.export(graph, inputs, dynamic_shapes=lowerable.shapes or None, strict=False)


def written_out(graph: fx.GraphModule, ops: Collection[FusedOp] = OPS) -> fx.GraphModule:
    """A copy that calls the reference of each of these ops."""
    copy = copy_graph(graph)
    references = {op.overload: op.reference for op in ops}
    for node in copy.graph.nodes:
        if node.target in references:
            node.target = references[node.target]
    copy.recompile()
    return copy


def plain_program(lowerable: Lowerable) -> torch.export.ExportedProgram:
    """The program with every fused op replaced by its reference."""
    return export_graph(lowerable, OPS)


def plain_graph(lowerable: Lowerable) -> fx.GraphModule:
    return flat_graph(plain_program(lowerable))


def constants_of(graph: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Every constant that a graph reads, by the path it reads it under."""
    paths = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    return {path: find_attribute(graph, path).detach() for path in sorted(paths)}
