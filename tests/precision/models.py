"""Models for the tests of precision: a small ranking model, and one that fewer bits ruin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grc.compiler import as_model, optimise, traced
from grc.graph.capture import Source
from grc.options import Options
from grc.precision.calibration import Calibration, calibration_of
from grc.precision.quality import budget
from grc.precision.search import Lowered, Search
from grc.precision.sites import find_sites
from grc.progress import Silent


class Ranker(nn.Module):
    """Two tables and a dense vector through two layers, to one score."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(300, 16), nn.Embedding(500, 16)
        self.deep, self.head = nn.Linear(40, 64), nn.Linear(64, 1)

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        x = torch.cat([self.users(ids[:, 0]), self.items(ids[:, 1]), dense], 1)
        return torch.sigmoid(self.head(torch.relu(self.deep(x)))).squeeze(1)


class Fragile(nn.Module):
    """A head that takes the difference of two large numbers: rounding either of them leaves nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 32), nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[1.0, -1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.relu(self.body(x)).sum(1, keepdim=True)
        return self.head(torch.cat([1000.0 + total, 1000.0 + x[:, :1]], 1)).squeeze(1)


class Retriever(nn.Module):
    """The best five of all items for a history of items: one table is looked up and scored."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.user = nn.Embedding(200, 24), nn.Linear(24, 24)

    def forward(self, history: Tensor) -> tuple[Tensor, Tensor]:
        user = self.user(self.items(history).mean(1))
        values, found = torch.topk(user @ self.items.weight.t(), 5)
        return values, found


def retriever_inputs(batch: int) -> tuple[Tensor]:
    return (torch.randint(200, (batch, 4), generator=torch.Generator().manual_seed(batch)),)


def ranker_inputs(batch: int) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 8, generator=make), torch.randint(300, (batch, 2), generator=make)


def fragile_inputs(batch: int) -> tuple[Tensor]:
    return (torch.randn(batch, 8, generator=torch.Generator().manual_seed(batch)),)


def captured(model: nn.Module, inputs: Any) -> tuple[Source, Any]:
    """The capture of a model, and its graph after all passes."""
    torch.manual_seed(0)
    source = traced(as_model(model.eval(), inputs), Silent())
    return source, optimise(source, Options(), Silent()).graph


def searched(
    model: nn.Module, inputs: Any, precision: str, *limits: str, calibration: Calibration | None = None
) -> Lowered:
    source, graph = captured(model, inputs)
    data = calibration or calibration_of(source, None)
    return Search(graph, find_sites(graph), data, budget(limits), precision, lambda text: None).run()
