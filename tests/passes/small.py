"""Small graphs for pass tests: a function and example inputs as a flat graph, and a pass run on it with its proof."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from grc.graph.flat import flat_graph, quiet_export
from grc.graph.oracle import largest_error
from grc.graph.spec import verify
from grc.kernels import FUSIONS
from grc.passes.fuse import Fuse
from grc.passes.manager import Change, Pass
from grc.passes.merge_tables import MergeTables
from grc.passes.normalise import Normalise


class Small(nn.Module):
    """A module whose forward is a function of itself and its inputs."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def rows(batch: int, *sizes: int) -> Tensor:
    return torch.randn(batch, *sizes, generator=torch.Generator().manual_seed(batch))


def ids(batch: int, columns: int, limit: int = 10) -> Tensor:
    return torch.randint(0, limit, (batch, columns), generator=torch.Generator().manual_seed(batch))


def graph_of(
    function: Callable[..., Any], *inputs: Tensor, fixed: Sequence[int] = (), **modules: nn.Module | Tensor
) -> fx.GraphModule:
    """The graph of a function, the first size of every input dynamic but of those in `fixed`."""
    shapes = tuple({} if i in fixed else {0: Dim.DYNAMIC} for i in range(len(inputs)))
    with torch.no_grad(), quiet_export():
        program = torch.export.export(
            Small(function, **modules).eval(), inputs, dynamic_shapes={"inputs": shapes}, strict=False
        )
    return flat_graph(program)


@torch.no_grad()
def run(graph: fx.GraphModule, passes: Sequence[Pass], *requests: Sequence[Tensor]) -> list[Change]:
    """Run passes on a graph in place; the graph must stay legal and answer every request as it did before."""
    before = [[a.clone() for a in graph(*inputs)] for inputs in requests]
    changes = [change for step in passes for change in step.run(graph)]
    verify(graph)
    for inputs, answers in zip(requests, before, strict=True):
        assert largest_error(list(graph(*inputs)), answers) < 1e-5
    return changes


MERGED = (Normalise(), MergeTables(), Normalise())
FUSED = (*MERGED, Fuse(FUSIONS))


def made(changes: Sequence[Change], what: str) -> int:
    return sum(change.what == what and change.missed is None for change in changes)


def misses(changes: Sequence[Change], what: str) -> list[str]:
    return [change.missed for change in changes if change.what == what and change.missed is not None]
