"""The last step of a history, however it is cut out, is the only one that the last layer computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from grc.graph.match import aten, is_op
from grc.passes.needed_rows import NeededRows
from grc.passes.normalise import Normalise
from tests.passes.small import graph_of, rows, run

STEPS, WIDTH = 6, 8


def widths(cut: Callable[[Tensor], Tensor]) -> tuple[list[int], list[str]]:
    """The steps that the layers run on, and what was told."""
    inputs = (rows(4, STEPS, WIDTH),)
    layers = nn.Sequential(nn.Linear(WIDTH, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 3))
    graph = graph_of(lambda self, x: cut(self.layers(x)), *inputs, layers=layers)
    changes = run(graph, [Normalise(), NeededRows()], inputs, (rows(1, STEPS, WIDTH),))
    found = [int(n.meta["val"].shape[1]) for n in graph.graph.nodes if is_op(n, aten.linear)]
    return found, [change.saves for change in changes if change.what == "needed-rows"]


@pytest.mark.parametrize(
    "cut",
    [
        lambda y: y[:, -1],
        lambda y: y[:, -1:].squeeze(1),
        lambda y: y[:, [-1], :],
        lambda y: y[:, [2]].exp(),
        lambda y: y.select(1, 3).exp() + y[:, 3:4].flatten(1),
        lambda y: y.narrow(1, 0, 1),
        lambda y: y[:, -STEPS - 5 : 1 - STEPS],
    ],
    ids=["select", "slice", "list", "a list of the third", "both", "first", "from before the first"],
)
def test_one_step_is_computed(cut: Callable[[Tensor], Tensor]) -> None:
    found, told = widths(cut)
    assert found == [1, 1]
    assert f"4 operations on 5 of {STEPS} steps" in told


@pytest.mark.parametrize(
    "cut",
    [
        lambda y: y[:, -2:],
        lambda y: y[:, [-1, 0]],
        lambda y: y[..., [-1]],
        lambda y: y[:, torch.tensor([False] * 5 + [True])],
        lambda y: y[:, -1] + y.sum(1),
    ],
    ids=["two steps", "a list of two", "the width", "a mask", "all of them too"],
)
def test_others_are_left(cut: Callable[[Tensor], Tensor]) -> None:
    found, told = widths(cut)
    assert found == [STEPS, STEPS] and not told
