"""Queries, keys and values that are parts of one activation, read where they lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from grc.compiler import as_model, optimise, traced
from grc.graph.match import aten, is_op
from grc.kernels import ATTENTION, FUSIONS
from grc.lowering.engine import Lowerable
from grc.lowering.export import export_graph
from grc.options import Options
from grc.passes.pipeline import pipeline
from grc.progress import Silent

pytest.importorskip("triton", reason="Triton is not installed")

from grc.kernels.attention.triton import register
from grc.lowering.in_place import with_parts_in_place
from grc.lowering.twins import with_twins

STEPS, HEADS, WIDTH = 6, 2, 4


class Steps(nn.Module):
    """Attention whose operands are slices of one layer (HSTU), or three layers of their own."""

    def __init__(self, together: bool, activation: nn.Module):
        super().__init__()
        self.together, self.activation = together, activation
        self.layers = nn.ModuleList(nn.Linear(8, 32 if together else 8) for _ in range(1 if together else 3))

    def forward(self, x: Tensor) -> Tensor:
        made = [self.activation(layer(x)) for layer in self.layers]
        q, k, v = made[0].split(8, -1)[1:] if self.together else made
        q, k, v = (part.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for part in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def in_place(model: nn.Module) -> tuple[fx.GraphModule, fx.GraphModule, list[Tensor]]:
    """The graph with twins, the same with parts in place, both answered by the op's reference, and an input."""
    source = traced(as_model(model.half().eval(), lambda batch: (torch.randn(batch, STEPS, 8).half(),)), Silent())
    options = Options()
    graph = optimise(source, options, Silent(), pipeline(options, FUSIONS)).graph
    twins = with_twins(graph, torch.device("cpu"), count=False)[0]
    found = with_parts_in_place(twins)
    for each in (twins, found):
        for node in each.graph.nodes:
            if node.target is register():
                node.target = ATTENTION.reference
        each.recompile()
    export_graph(Lowerable(found, source.inputs(3), source.shapes()))
    return twins, found, source.inputs(5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("together", "activation", "views"), [(True, nn.SiLU(), 3), (True, nn.Identity(), 0), (False, nn.SiLU(), 0)]
)
def test_parts_of_one_activation_are_views_of_it(together: bool, activation: nn.Module, views: int) -> None:
    twins, found, inputs = in_place(Steps(together, activation))
    assert sum(is_op(node, aten.as_strided) for node in found.graph.nodes) == views
    for got, wanted in zip(found(*inputs), twins(*inputs), strict=True):
        assert torch.equal(got, wanted)
