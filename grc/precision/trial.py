"""A trial: run a graph as if some of its tables and layers were kept in fewer bits, without building anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from grc.graph.match import argument, aten, attribute, is_op
from grc.kernels import CROSS
from grc.kernels.quantised_linear import rounded, simulated
from grc.precision.sites import LAYER, Site, layer_weight

Tensors = list[torch.Tensor]


class Rounded:
    """Weights as each format holds them, made once for all trials."""

    def __init__(self, graph: fx.GraphModule):
        self.graph = graph
        self.made: dict[tuple[str, str], torch.Tensor] = {}

    def weight(self, path: str, node: fx.Node, form: str) -> torch.Tensor:
        if (path, form) not in self.made:
            tensor = attribute(self.graph, layer_weight(node))
            assert tensor is not None
            self.made[path, form] = rounded(tensor.detach(), form == "int8")
        return self.made[path, form]


class Trial(fx.Interpreter):
    """The graph's answers with `formats` by site. Rounding is the kernels' own; only the order of sums may differ."""

    def __init__(self, graph: fx.GraphModule, sites: Sequence[Site], formats: Mapping[str, str], weights: Rounded):
        super().__init__(graph, garbage_collect_values=True)
        self.weights = weights
        self.layers = {
            node: (site.name, formats[site.name])
            for site in sites
            if site.kind == LAYER and site.name in formats
            for node in site.nodes
        }

    @torch.no_grad()
    def answers(self, inputs: Sequence[torch.Tensor]) -> Tensors:
        return list(self.run(*inputs))

    def run_node(self, n: fx.Node) -> Any:
        if n in self.layers:
            path, form = self.layers[n]
            return self.layer(n, self.weights.weight(path, n, form), form)
        return super().run_node(n)

    def layer(self, node: fx.Node, weight: torch.Tensor, form: str) -> torch.Tensor:
        args, _ = self.fetch_args_kwargs_from_env(node)
        int8 = form == "int8"
        if node.target is CROSS.overload:
            x0, y, _, bias, x = args
            return x0 * simulated(y, weight, bias, int8) + x
        assert is_op(node, aten.linear)
        bias = argument(node, "bias")
        given = self.env[bias] if isinstance(bias, fx.Node) else None
        return simulated(args[0], weight, given, int8)
