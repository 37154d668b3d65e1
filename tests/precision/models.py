"""Models for the tests of precision: a small ranking model, and one that fewer bits ruin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grc.compiler import as_model, optimise, traced
from grc.graph.capture import Source
from grc.options import Options
from grc.precision.calibration import Calibration, calibration_of
from grc.precision.outcome import Lowered
from grc.precision.quality import budget
from grc.precision.search import Search
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


class Doubled(nn.Module):
    """Two layers of numbers up to some size, added and normalised."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 1)
        self.norm = nn.LayerNorm(16)
        with torch.no_grad():
            for layer in (self.first, self.second):
                layer.bias.copy_(torch.linspace(-size, size, 16))
                layer.weight.mul_(size / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x) + self.second(x))).squeeze(1)


def doubled(size: float) -> Doubled:
    torch.manual_seed(0)
    return Doubled(size).eval()


def doubled_inputs(batch: int) -> tuple[Tensor]:
    return (torch.rand(batch, 8, generator=torch.Generator().manual_seed(batch)),)


class Retriever(nn.Module):
    """The best five of all items for a history of items: one table is looked up and scored."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.user = nn.Embedding(200, 24), nn.Linear(24, 24)

    def forward(self, history: Tensor) -> tuple[Tensor, Tensor]:
        user = self.user(self.items(history).mean(1))
        values, found = torch.topk(user @ self.items.weight.t(), 5)
        return values, found


class Target(nn.Module):
    """How much each step of a history says about a candidate, and what the steps then are."""

    def __init__(self) -> None:
        super().__init__()
        self.unit = nn.Sequential(nn.Linear(24, 10), nn.PReLU(), nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 1))

    def forward(self, history: Tensor, target: Tensor) -> Tensor:
        query = target.unsqueeze(1).expand_as(history)
        scores = self.unit(torch.cat([query, history, query * history], -1))
        return (scores.transpose(1, 2) @ history).squeeze(1)


class Bags(nn.Module):
    """Jagged bags over a table with a padding row, a table of offsets under a factorisation machine, a bare embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(40, 8, mode="mean", padding_idx=3)
        self.table, self.linear = nn.Embedding(60, 8), nn.Embedding(60, 1)
        self.deep, self.history = nn.Linear(24, 1), nn.Embedding(20, 4)
        self.register_buffer("offsets", torch.tensor([0, 20, 40]))

    def forward(self, values: Tensor, offsets: Tensor, ids: Tensor) -> Tensor:
        rows = self.table(ids + self.offsets)
        fm = 0.5 * (rows.sum(1).pow(2) - rows.pow(2).sum(1)).sum(1)
        first = self.linear(ids + self.offsets).sum((1, 2))
        deep = self.deep(rows.flatten(1)).squeeze(1) + self.history(ids).amax((1, 2))
        return self.bag(values, offsets).sum(1) + fm + first + deep


def target_inputs(batch: int) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 6, 8, generator=make), torch.randn(batch, 8, generator=make)


def bag_inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(batch)
    lengths = torch.randint(0, 4, (batch,), generator=make)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)[:-1]])
    values = torch.randint(40, (int(lengths.sum()),), generator=make)
    return values, offsets, torch.randint(20, (batch, 3), generator=make)


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
    model: nn.Module,
    inputs: Any,
    precision: str,
    *limits: str,
    calibration: Calibration | None = None,
    device: str = "cpu",
) -> Lowered:
    source, graph = captured(model, inputs)
    data = calibration or calibration_of(source, None)
    return Search(graph, find_sites(graph), data, budget(limits), precision, lambda text: None, device).run()
