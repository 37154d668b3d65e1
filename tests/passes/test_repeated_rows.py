"""Layers of a user's row, which stands in front of every candidate, computed once for the user."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from grc.graph.flat import flat_graph
from grc.graph.match import aten, is_op
from grc.passes.manager import Change
from grc.passes.normalise import Normalise
from grc.passes.repeated_rows import RepeatedRows
from grc.passes.split_concat_linear import SplitConcatLinear
from tests.passes.small import Small, graph_of, rows, run

WIDTH, ITEMS = 8, 5
PASSES = (Normalise(), RepeatedRows(), Normalise())
REPEATS: dict[str, Callable[[Tensor], Tensor]] = {
    "expand": lambda u: u.unsqueeze(1).expand(-1, ITEMS, -1),
    "flat": lambda u: u.unsqueeze(1).expand(-1, ITEMS, -1).reshape(-1, WIDTH),
    "repeat": lambda u: u[:, None].repeat(1, ITEMS, 1),
    "tile": lambda u: u.repeat(1, ITEMS).view(-1, ITEMS, WIDTH),
    "interleave": lambda u: u.repeat_interleave(ITEMS, dim=0),
    "interleave one": lambda u: u.unsqueeze(1).repeat_interleave(ITEMS, 1),
}


def tower(slopes: int = 1) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 12), nn.PReLU(slopes), nn.LayerNorm(12), nn.Linear(12, WIDTH), nn.Softmax(-1))


def layers(graph) -> list[tuple]:
    return [tuple(map(str, n.meta["val"].shape)) for n in graph.graph.nodes if is_op(n, aten.linear)]


def told(changes: list[Change]) -> list[str]:
    return [change.saves for change in changes if change.what == "repeated rows"]


@pytest.mark.parametrize("repeated", REPEATS.values(), ids=REPEATS.keys())
def test_a_tower_is_computed_once_for_all_candidates(repeated: Callable[[Tensor], Tensor]) -> None:
    def score(self: Small, user: Tensor, items: Tensor) -> Tensor:
        u = functional.normalize(self.user(repeated(user)), dim=-1).reshape(-1, ITEMS, WIDTH)
        return (u * self.items(items)).sum(-1)

    inputs = rows(4, WIDTH), rows(4, ITEMS, WIDTH)
    graph = graph_of(score, *inputs, user=tower(), items=nn.Linear(WIDTH, WIDTH))
    changes = run(graph, PASSES, inputs, (rows(1, WIDTH), rows(1, ITEMS, WIDTH)))
    assert [len(size) for size in layers(graph)] == [2, 2, 3]
    assert told(changes) == ["2 layers on 1 of 5 rows"]
    norm = next(n for n in graph.graph.nodes if is_op(n, aten.linalg_vector_norm))
    assert norm.meta["val"].dim() == 2
    assert not RepeatedRows().run(graph)


def test_candidates_that_vary_in_number() -> None:
    def score(self: Small, user: Tensor, items: Tensor) -> Tensor:
        u = user.unsqueeze(1).expand(-1, items.size(1), -1).reshape(-1, WIDTH)
        return (self.user(u) * items.reshape(-1, WIDTH)).sum(-1).view(items.shape[:2])

    inputs = rows(4, WIDTH), rows(4, ITEMS, WIDTH)
    shapes = {"inputs": ({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC})}
    module = Small(score, user=tower()).eval()
    graph = flat_graph(torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False))
    changes = run(graph, PASSES, inputs, (rows(3, WIDTH), rows(3, 9, WIDTH)))
    assert told(changes) == ["2 layers on 1 of several rows"]
    batch = str(next(n for n in graph.graph.nodes if n.op == "placeholder").meta["val"].shape[0])
    assert [size[0] for size in layers(graph)] == [batch, batch]


@pytest.mark.parametrize(
    "score",
    [
        lambda self, u: torch.relu(u.unsqueeze(1).expand(-1, ITEMS, -1)),  # no layer
        lambda self, u: self.user(u.unsqueeze(1).expand(-1, ITEMS, -1).cumsum(1)),
        lambda self, u: self.user(u.unsqueeze(1).expand(-1, ITEMS, -1) + self.position),
        lambda self, u: self.user(u.unsqueeze(1).expand(-1, ITEMS, -1).softmax(1)),
        lambda self, u: self.user(u.unsqueeze(1).expand(-1, ITEMS, -1).mean(1)),
    ],
    ids=["without a layer", "over the steps", "positions", "softmax of steps", "mean of steps"],
)
def test_what_stays(score: Callable[..., Tensor]) -> None:
    inputs = (rows(4, WIDTH),)
    graph = graph_of(score, *inputs, user=nn.Linear(WIDTH, 3), position=torch.randn(ITEMS, WIDTH))
    assert not told(run(graph, PASSES, inputs))


def test_slopes_of_the_second_dimension_are_those_of_candidates() -> None:
    inputs = (rows(4, WIDTH),)

    def score(self: Small, user: Tensor) -> Tensor:
        return self.user(user.unsqueeze(1).expand(-1, ITEMS, -1))

    graph = graph_of(score, *inputs, user=tower(ITEMS))
    assert told(run(graph, PASSES, inputs)) == ["1 layer on 1 of 5 rows"]


@pytest.mark.parametrize("repeated", REPEATS.values(), ids=REPEATS.keys())
def test_a_layer_over_user_and_candidate(repeated: Callable[[Tensor], Tensor]) -> None:
    """The user's columns of a ranker's first layer are multiplied once for the user."""

    def score(self: Small, user: Tensor, items: Tensor) -> Tensor:
        u = repeated(user)
        return self.first(torch.cat([u, items.view(*u.shape[:-1], WIDTH)], -1)).relu()

    inputs = rows(4, WIDTH), rows(4, ITEMS, WIDTH)
    graph = graph_of(score, *inputs, first=nn.Linear(2 * WIDTH, 6))
    changes = run(graph, [*PASSES, SplitConcatLinear()], inputs, (rows(2, WIDTH), rows(2, ITEMS, WIDTH)))
    assert [change.saves for change in changes if change.what == "split-concat-linear"] == ["8 of 16 columns"]
