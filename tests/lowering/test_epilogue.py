"""ReLU given to the product before it: what becomes one call, what stays, and that no answer changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from grc.graph.capture import capture
from grc.graph.match import aten, is_op
from grc.graph.model_file import from_module
from grc.lowering.engine import Lowerable
from grc.lowering.epilogue import with_epilogues
from grc.lowering.export import export_graph


class Layers(nn.Module):
    """One layer with ReLU, one whose product is read twice, one without bias, one with another activation."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.twice, self.bare, self.other = (nn.Linear(8, 8, bias=i != 2) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.plain(x))
        y = self.twice(x)
        x = torch.relu(y) + y
        return torch.sigmoid(self.other(torch.relu(self.bare(x))))


@torch.no_grad()
@pytest.mark.parametrize("steps", [(), (5,)])
def test_relu_joins_the_product_that_it_alone_reads(steps: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    source = capture(from_module(Layers().eval(), lambda batch: (torch.randn(batch, *steps, 8),)))
    found = with_epilogues(source.graph)
    nodes = list(found.graph.nodes)
    assert [sum(is_op(n, op) for n in nodes) for op in (aten._addmm_activation, aten.linear, aten.relu)] == [1, 3, 2]
    program = export_graph(Lowerable(found, source.inputs(7), source.shapes())).module()
    for batch in (1, 3, 7):
        (x,) = source.inputs(batch)
        torch.testing.assert_close(program(x)[0], source.graph(x)[0])
