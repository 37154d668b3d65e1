"""Indices that a graph computes, checked inside of it: the same answers, none where an index points outside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grc
from grc.errors import EngineError
from grc.graph.capture import capture
from grc.graph.model_file import from_module
from grc.kernels import CHECKED_IDS
from grc.lowering.check_ids import with_checked_ids

STEPS, WIDTH = 5, 8


class Last(nn.Module):
    """Reads the last step of each history, by gather, and the step before it, counted from the end where there is one step."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        at = (lengths - 1).view(-1, 1, 1).expand(-1, 1, WIDTH)
        last = x.gather(1, at).squeeze(1)
        before = x[torch.arange(x.shape[0], device=x.device), lengths - 2]
        return self.score(last), self.score(before)


class Ages(nn.Module):
    """Positions that are computed and looked up, positions that can only lie in the table, and a count by scatter."""

    def __init__(self) -> None:
        super().__init__()
        self.ages, self.ranks = nn.Embedding(9, WIDTH), nn.Embedding(STEPS, WIDTH)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        ages = self.ages(lengths * 2 - 2)
        ranks = self.ranks(x.sum(2).argsort(1)).sum(1)
        seen = x.new_zeros(x.shape[0], STEPS).scatter_add(1, lengths.view(-1, 1) - 1, x[:, 0, :1])
        return F.silu(ages + ranks), seen


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, STEPS, WIDTH), torch.arange(batch) % STEPS + 1


@pytest.mark.parametrize(("model", "checks"), [(Last, 2), (Ages, 2)])
def test_indices_that_may_point_outside_are_checked(model: type[nn.Module], checks: int) -> None:
    source = capture(from_module(model().eval(), inputs))
    graph = with_checked_ids(source.graph, computed=True)
    found = [node for node in graph.graph.nodes if node.target is CHECKED_IDS.overload]
    assert len(found) == checks
    given = inputs(11)
    assert all(map(torch.equal, graph(*given), source.graph(*given)))
    for wrong in (-9, 2**40, STEPS + 4):
        lengths = given[1].clone()
        lengths[3] = wrong
        with pytest.raises(IndexError, match=f"id {wrong - 1}|id {2 * wrong - 2}|id {wrong - 2}"):
            graph(given[0], lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("model", [Last, Ages])
def test_a_gpu_answers_on_after_an_index_without_a_place(model: type[nn.Module], artifact_path: Path) -> None:
    torch.manual_seed(0)
    built = model().eval()
    grc.compile(built, inputs, grc.Options(artifact_path, "cuda", "inductor", buckets=(1, 8), max_batch=8))
    program = grc.load(artifact_path)
    given = inputs(6)
    with torch.no_grad():
        want = built(*given)
    for wrong in (-9, STEPS + 4, 2**40):
        lengths = given[1].clone()
        lengths[3] = wrong
        with pytest.raises(EngineError, match="outside of"):
            program(given[0], lengths)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(program(*given), want, strict=True))
