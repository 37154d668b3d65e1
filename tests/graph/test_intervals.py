"""Between which numbers an index lies: no number outside of what is claimed, and claims as tight as these."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from grc.graph.capture import capture
from grc.graph.intervals import interval, intervals
from grc.graph.model_file import from_module

INF = math.inf


class Made(nn.Module):
    """An index that is made of ids and scores."""

    def __init__(self, make: Callable[[Made, Tensor, Tensor], Tensor]):
        super().__init__()
        self.make = make
        self.register_buffer("limits", torch.tensor([[3, 9, 20]]))
        self.register_buffer("table", torch.arange(60, dtype=torch.uint8))

    def forward(self, ids: Tensor, scores: Tensor) -> Tensor:
        return self.make(self, ids, scores)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda m, ids, s: ids - 1, (-INF, INF)),
        (lambda m, ids, s: ids.clamp(1, 50) - 1, (0, 49)),
        (lambda m, ids, s: ids.clamp(min=0).clamp(max=49).view(-1, 1), (0, 49)),
        (lambda m, ids, s: ids.clamp(max=49), (-INF, 49)),
        (lambda m, ids, s: torch.minimum(ids.clamp(min=0), m.limits), (0, 20)),
        (lambda m, ids, s: ids % 7 + 3, (3, 9)),
        (lambda m, ids, s: torch.add(ids % 7, ids % 2, alpha=5), (-INF, INF)),
        (lambda m, ids, s: ids % m.limits, (0, 19)),
        (lambda m, ids, s: s.topk(2).indices, (0, 2)),
        (lambda m, ids, s: s.sort(0).indices + 0 * ids, (-INF, INF)),
        (lambda m, ids, s: s.argmax(1), (0, 2)),
        (lambda m, ids, s: s.argmax(), (0, INF)),
        (lambda m, ids, s: torch.where(s > 0, s.argsort(1), -1), (-1, 2)),
        (lambda m, ids, s: (ids % 5).masked_fill(s > 0, 8), (0, 8)),
        (lambda m, ids, s: torch.cat([ids % 5, m.limits.expand(ids.shape[0], 3)], 1), (0, 20)),
        (lambda m, ids, s: (ids % 5).gather(1, s.argsort(1)), (0, 4)),
        (lambda m, ids, s: torch.arange(2, 9, 3).expand(ids.shape[0], 3) + ids % 2, (2, 9)),
        (lambda m, ids, s: m.table[ids % 7], (-INF, INF)),
        (lambda m, ids, s: (ids % 5 - 1).to(torch.uint8), (-INF, INF)),
        (lambda m, ids, s: s.abs().to(torch.int64), (-INF, INF)),
    ],
)
def test_an_index_lies_where_it_is_said_to(make, expected: tuple[float, float]) -> None:
    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        return torch.arange(batch * 3).view(batch, 3) * 7 - 11, torch.randn(batch, 3)

    model = Made(make).eval()
    graph = capture(from_module(model, inputs)).graph
    output = next(node for node in graph.graph.nodes if node.op == "output").args[0][0]
    low, high = interval(intervals(graph), output)
    found = model(*inputs(8))
    assert low <= found.min() and found.max() <= high
    assert (low, high) == expected
