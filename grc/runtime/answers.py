"""Answers, and whether any of them holds NaN."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch


class Answers(list[torch.Tensor]):
    """The answers of a part that has looked for NaN itself, where they lay."""

    def __init__(self, tensors: Iterable[torch.Tensor], nan: bool):
        super().__init__(tensors)
        self.nan = nan


def hold_nan(answers: Sequence[torch.Tensor]) -> bool:
    """One reduction each: a sum is NaN where any number is."""
    if isinstance(answers, Answers):
        return answers.nan
    for answer in answers:
        if answer.is_floating_point():
            total = (answer if answer.numel() == 1 else answer.sum()).item()
            if total != total:
                return True
    return False
