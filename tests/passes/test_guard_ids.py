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


@pytest.mark.parametrize("policy", MEANING)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("jagged", [False, True])
@torch.no_grad()
def test_the_padding_of_one_table_is_a_bad_id_of_another(policy, dtype, jagged):
    a, b = nn.EmbeddingBag(13, 4, mode="sum", padding_idx=12), nn.EmbeddingBag(10, 4, mode="sum")
    good = torch.tensor([[12, 3, 1, 2], [1, 12, 3, 4]], dtype=dtype)
    bad = torch.tensor([[12, 3, 12, 2], [1, 99, 3, 4]], dtype=dtype)
    if jagged:
        offsets = torch.tensor([0, 2], dtype=dtype)
        forward = lambda self, x, y, o: torch.cat([self.a(x, o), self.b(y, o)], 1)  # noqa: E731
        good, bad = ((r[:, :2].flatten(), r[:, 2:].flatten(), offsets) for r in (good, bad))
    else:
        forward = lambda self, x: torch.cat([self.a(x[:, :2]), self.b(x[:, 2:])], 1)  # noqa: E731
        good, bad = (good,), (bad,)
    graph = graph_of(forward, *(t.clone() for t in good), a=a, b=b)
    wanted = graph(*good)[0].clone()
    for step in (*MERGED, GuardIds(policy)):
        step.run(graph)
    assert sum(str(node.target) == "grc.lookup.default" for node in graph.graph.nodes) == 1
    assert torch.equal(graph(*good)[0], wanted)
    found = graph(*bad)[0]
    twelve, ninety_nine = {"zero": (None, None), "clamp": (9, 12), "hash": (2, 8)}[policy]
    first = b.weight[2] if twelve is None else b.weight[twelve] + b.weight[2]
    second = a.weight[1] if ninety_nine in (None, 12) else a.weight[1] + a.weight[ninety_nine]
    assert torch.equal(found[0], torch.cat([a.weight[3], first]))
    assert torch.equal(found[1], torch.cat([second, b.weight[3] + b.weight[4]]))
