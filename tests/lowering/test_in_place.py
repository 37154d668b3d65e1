"""Queries, keys and values that are parts of one activation, read where they lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
from grc.precision.gpu import narrowed
from grc.precision.sites import find_sites
from grc.progress import Silent

pytest.importorskip("triton", reason="Triton is not installed")

from grc.kernels.attention.triton import register
from grc.lowering.in_place import with_parts_in_place
from grc.lowering.twins import with_twins

STEPS, HEADS, WIDTH = 6, 2, 4


class Steps(nn.Module):
    """Attention whose operands are three parts of one layer, taken out of it in some way, or three layers."""

    def __init__(self, activation: nn.Module, parts: Callable[[Tensor], Sequence[Tensor]] | None):
        super().__init__()
        self.parts, self.activation = parts, activation
        self.layers = nn.ModuleList(nn.Linear(8, 24 if parts else 8) for _ in range(1 if parts else 3))

    def forward(self, x: Tensor) -> Tensor:
        made = [self.activation(layer(x)) for layer in self.layers]
        q, k, v = self.parts(made[0]) if self.parts else map(heads, made)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def heads(part: Tensor) -> Tensor:
    return part.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)


PARTS: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {
    "split": lambda y: [heads(part) for part in y.split(8, -1)],
    "slices": lambda y: [heads(y[..., at : at + 8]) for at in (16, 0, 8)],
    "parts of a head": lambda y: [
        part.contiguous().transpose(1, 2) for part in y.view(-1, STEPS, HEADS, 3 * WIDTH).chunk(3, -1)
    ],
    "stacked": lambda y: y.view(-1, STEPS, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0),
}


def copies(y: Tensor) -> Sequence[Tensor]:
    return [part.reshape(-1, HEADS, STEPS, WIDTH) for part in y.chunk(3, -1)]


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


def agree(model: nn.Module, views: int) -> None:
    twins, found, inputs = in_place(model)
    assert sum(is_op(node, aten.as_strided) for node in found.graph.nodes) == views
    for got, wanted in zip(found(*inputs), twins(*inputs), strict=True):
        assert torch.equal(got, wanted)


@torch.no_grad()
@pytest.mark.parametrize("parts", PARTS)
def test_parts_of_one_activation_are_views_of_it(parts: str) -> None:
    agree(Steps(nn.SiLU(), PARTS[parts]), 3)


@torch.no_grad()
def test_what_is_computed_apart_or_copied_is_left() -> None:
    agree(Steps(nn.Identity(), PARTS["split"]), 0)
    agree(Steps(nn.SiLU(), None), 0)
    agree(Steps(nn.SiLU(), copies), 0)


@torch.no_grad()
def test_an_activation_that_is_not_row_by_row() -> None:
    class Turned(Steps):
        def forward(self, x: Tensor) -> Tensor:
            y = self.activation(self.layers[0](x).transpose(1, 2).contiguous().transpose(1, 2).contiguous())
            return nn.functional.scaled_dot_product_attention(*PARTS["split"](y)).transpose(1, 2).flatten(2)

    agree(Turned(nn.SiLU(), PARTS["split"]), 3)


@torch.no_grad()
def test_halves_of_its_parts_are_views_of_its_half() -> None:
    source = traced(as_model(Steps(nn.SiLU(), PARTS["split"]).eval(), lambda b: (torch.randn(b, STEPS, 8),)), Silent())
    options = Options()
    graph = optimise(source, options, Silent(), pipeline(options, FUSIONS)).graph
    sites = find_sites(graph)
    narrow = narrowed(graph, sites, {site.name: "fp16" for site in sites})
    found = with_parts_in_place(with_twins(narrow, torch.device("cpu"), count=False)[0])
    views = [node for node in found.graph.nodes if is_op(node, aten.as_strided)]
    assert len(views) == 3 and len({view.args[0] for view in views}) == 1
