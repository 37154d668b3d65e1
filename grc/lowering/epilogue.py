"""Give ReLU to the matrix product before it on the GPU: cuBLAS applies it to its sums, and the layer is one launch."""

from __future__ import annotations

from torch import fx

from grc.graph.match import argument, aten, attribute, is_op, only_user, value
from grc.graph.rewrite import copy_graph


def with_epilogues(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph in which relu(linear(x, weight, bias)) is one call.

    Inductor makes two of it: the product goes to cuBLAS, and its own kernel reads and writes the layer once more.
    """
    copy = copy_graph(graph)
    for node in list(copy.graph.nodes):
        relu = only_user(node) if is_op(node, aten.linear) else None
        if relu is None or not is_op(relu, aten.relu):
            continue
        x, weight, bias = node.args[0], node.args[1], argument(node, "bias")
        tensor = attribute(copy, weight)
        if bias is None or tensor is None or tensor.dim() != 2 or value(x).dim() < 2:
            continue
        with copy.graph.inserting_before(relu):
            rows = x
            if value(x).dim() > 2:
                rows = copy.graph.call_function(aten.reshape.default, (x, [-1, int(tensor.shape[1])]))
            turned = copy.graph.call_function(aten.t.default, (weight,))
            new = copy.graph.call_function(aten._addmm_activation.default, (bias, rows, turned))
            if value(x).dim() > 2:
                like = [copy.graph.call_function(aten.sym_size.int, (x, d)) for d in range(value(x).dim() - 1)]
                new = copy.graph.call_function(aten.reshape.default, (new, [*like, int(tensor.shape[0])]))
        new.meta = dict(relu.meta)
        relu.replace_all_uses_with(new)
    copy.graph.eliminate_dead_code()
    copy.recompile()
    return copy
