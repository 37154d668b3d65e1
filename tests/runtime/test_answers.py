"""NaN in answers of every size and dtype, and nothing else."""

from __future__ import annotations

import pytest
import torch

from grc.runtime.answers import COMPARED, Answers, hold_nan


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3, COMPARED, COMPARED + 1, 5000])
def test_one_nan_is_found_wherever_it_stands(count: int, dtype: torch.dtype) -> None:
    answer = torch.ones(count, dtype=dtype)
    assert not hold_nan([answer])
    for place in {0, count // 2, count - 1}:
        held = answer.clone()
        held[place] = torch.nan
        assert hold_nan([torch.ones(2), held])


def test_infinite_numbers_ids_and_no_rows_are_none() -> None:
    assert not hold_nan([torch.tensor([torch.inf, -torch.inf, 0.0]), torch.tensor([2**62]), torch.empty(0, 3)])
    assert not hold_nan([torch.tensor([[1.0, torch.nan]])[:, :1]])


def test_a_part_that_has_looked_is_believed() -> None:
    assert hold_nan(Answers([torch.ones(1)], True)) and not hold_nan(Answers([torch.full((1,), torch.nan)], False))
