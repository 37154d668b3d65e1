"""The look-up against its contract, and what only it must refuse."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from grc.kernels import cpp
from grc.kernels.lookup import LOOKUP
from tests.kernels.contract import Contract, arguments


class TestLookup(Contract):
    op = LOOKUP
    refused = "large batch"


def _values(name: str) -> dict:
    return arguments(LOOKUP, next(case for case in LOOKUP.cases if case.name == name))


def test_refuses_ids_of_jagged_bags() -> None:
    values = _values("jagged sum")
    values["ids"][-1] = 11
    with pytest.raises(IndexError, match=r"id 11 of feature 2 is outside 0\.\.10"):
        cpp.call(LOOKUP, *values.values())


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_refuses_offsets_that_leave_the_ids(wrong: int) -> None:
    values = _values("jagged sum")
    values["offsets"][3] = wrong
    with pytest.raises(RuntimeError, match="offsets of feature 0 run from"):
        cpp.call(LOOKUP, *values.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bases": [0, 7, 10**6]}, "a table reaches past the arena"),
        ({"bases": [-1, 7, 60]}, "a base or a table's size is out of range"),
        ({"rows": [7, 50, 2**62]}, "a table reaches past the arena"),
        ({"dims": [16, 16, 8]}, "every dim is the arena's"),
        ({"lengths": [1, 1, 2]}, "the lengths add up to the columns of ids"),
        ({"padding": []}, "bases, rows, dims and padding have one entry per feature"),
        ({"pooling": 3}, "pooling is 0 sum, 1 mean or 2 max"),
        ({"arena": torch.zeros(300, 16, dtype=torch.float64)}, "the arena is float32, float16, bfloat16 or bytes"),
        ({"ids": torch.zeros(5, 3)}, "ids are int32 or int64"),
    ],
)
def test_refuses_arguments_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(RuntimeError) as refused:
        cpp.call(LOOKUP, *{**_values("one id each"), **change}.values())
    assert str(refused.value) == message


def test_infinite_and_nan_rows_survive() -> None:
    values = _values("max")
    values["arena"][0] = float("nan")
    values["arena"][1] = float("inf")
    got, want = cpp.call(LOOKUP, *values.values()), LOOKUP.reference(*values.values())
    assert torch.equal(got.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))
    assert got.isnan().any()


LAST_ROW = """
import torch
from grc.kernels import LOOKUP, cpp

for arena in (torch.zeros(0, 16), torch.ones(1, 16)):
    id = -(arena.data_ptr() // 64) - 1
    ids = torch.full((3, 2), id)
    found = cpp.call(LOOKUP, arena, ids, None, None, [0, 0], [len(arena)] * 2, [16, 16], [1, 1], 0, [id, id], [])
    assert torch.equal(found, torch.zeros(3, 32))
"""


def test_a_padding_id_whose_row_would_lie_at_the_last_address_there_is() -> None:
    """Its lines are asked for ahead: counting up to the last of them would never end, nor heed a signal."""
    subprocess.run([sys.executable, "-c", LAST_ROW], check=True, timeout=60)
