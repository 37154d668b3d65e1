"""The second export, of the rewritten graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from grc.compiler import optimise
from grc.graph.capture import capture
from grc.graph.model_file import from_module
from grc.lowering.engine import Lowerable
from grc.lowering.export import plain_program
from grc.options import Options
from grc.progress import Silent


class Columns(nn.Module):
    """Ids in the columns of a float matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(50, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        rows = [table(x[:, i : i + 1].long()) for i, table in enumerate(self.tables)]
        return torch.cat(rows, -1).flatten(1).sum(1)


def columns(batch: int) -> tuple[Tensor]:
    """The first three of eight columns: a view."""
    return (torch.randint(0, 50, (batch, 8)).float()[:, :3],)


@torch.no_grad()
def test_a_program_exported_on_views_takes_requests_that_are_none() -> None:
    model = Columns().eval()
    source = capture(from_module(model, columns))
    graph = optimise(source, Options(), Silent()).graph
    program = plain_program(Lowerable(graph, source.inputs(2), source.shapes()))
    (x,) = (view.clone() for view in columns(5))
    torch.testing.assert_close(program.module()(x)[0], model(x))
