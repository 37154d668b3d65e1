"""The pairwise dot products against their contract."""

from __future__ import annotations

import pytest
import torch

from grc.kernels import cpp
from grc.kernels.bag_dot import BAG_DOT
from tests.kernels.contract import Contract, arguments


class TestBagDot(Contract):
    op = BAG_DOT
    refused = "dlrm"


def test_triangles_come_in_row_major_order() -> None:
    arena = torch.tensor([[1.0], [2.0], [3.0], [5.0]])
    ids = torch.arange(4)[None]
    fixed = ([0] * 4, [4] * 4, 1, [1] * 4, 0, [-(2**63)] * 4)
    lower = cpp.call(BAG_DOT, arena, ids, None, None, None, *fixed, False, False, False)
    upper = cpp.call(BAG_DOT, arena, ids, None, None, None, *fixed, True, False, False)
    whole = cpp.call(BAG_DOT, arena, ids, None, None, None, *fixed, False, True, False)
    assert lower.tolist() == [[2, 3, 6, 5, 10, 15]]
    assert upper.tolist() == [[2, 3, 5, 6, 10, 15]]
    assert whole.tolist() == [[1, 2, 4, 3, 6, 9, 5, 10, 15, 25]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense": torch.zeros(37, 32)}, "dense is [B, dim]"),
        ({"dense": torch.zeros(36, 64)}, "dense is [B, dim]"),
        ({"dense": torch.zeros(37, 64, dtype=torch.float16)}, "dense has the arena's dtype"),
        ({"dense": torch.zeros(64, 37).t()}, "dense's rows are contiguous"),
        ({"dense": None}, "keep_dense needs dense"),
    ],
)
def test_refuses_a_dense_part_that_does_not_fit(change: dict, message: str) -> None:
    values = arguments(BAG_DOT, BAG_DOT.cases[0])
    with pytest.raises(RuntimeError) as refused:
        cpp.call(BAG_DOT, *{**values, **change}.values())
    assert str(refused.value) == message
