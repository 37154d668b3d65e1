"""guard-ids: each policy gives bad ids one meaning, on look-ups that were merged and on those that were not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from grc.passes.guard_ids import GuardIds
from tests.passes.small import MERGED, graph_of, ids

GOOD = torch.tensor([[1, 12], [9, 0]])
BAD = torch.tensor([[-1, 13], [10, 10**9]])
MEANING = {
    "zero": None,
    "clamp": torch.tensor([[0, 12], [9, 12]]),
    "hash": torch.tensor([[9, 0], [0, 10**9 % 13]]),
}


def forward(self, x):
    return torch.cat([self.a(x[:, 0]), self.b(x[:, 1])], 1)


@pytest.mark.parametrize("policy", MEANING)
@pytest.mark.parametrize("steps", [MERGED, ()], ids=["merged", "apart"])
@torch.no_grad()
def test_a_bad_id_has_one_meaning(policy, steps):
    a, b = nn.Embedding(10, 4), nn.Embedding(13, 4)
    graph = graph_of(forward, ids(4, 2), a=a, b=b)
    wanted = graph(GOOD)[0].clone()
    for step in (*steps, GuardIds(policy)):
        step.run(graph)
    assert torch.equal(graph(GOOD)[0], wanted)
    if policy == "zero":
        assert torch.equal(graph(BAD)[0], torch.zeros(2, 8))
    else:
        safe = MEANING[policy]
        assert torch.equal(graph(BAD)[0], torch.cat([a(safe[:, 0]), b(safe[:, 1])], 1))


@torch.no_grad()
def test_padding_keeps_its_meaning():
    a, b = (nn.EmbeddingBag(n, 4, mode="sum", padding_idx=2) for n in (10, 13))
    graph = graph_of(lambda self, x: torch.cat([self.a(x[:, :2]), self.b(x[:, 2:])], 1), ids(4, 4), a=a, b=b)
    request = torch.tensor([[2, 3, 2, 2], [1, 2, 3, 4]])
    wanted = graph(request)[0].clone()
    for step in (*MERGED, GuardIds("zero")):
        step.run(graph)
    assert torch.equal(graph(request)[0], wanted)
    assert torch.equal(graph(torch.tensor([[2, 99, 2, 2]]))[0], torch.zeros(1, 8))
