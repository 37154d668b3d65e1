"""Answers, and whether any of them holds NaN."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch


class Answers(list[torch.Tensor]):
    """The answers of a part that has looked for NaN itself, where they lay."""

    def __init__(self, tensors: Iterable[torch.Tensor], nan: bool):
        super().__init__(tensors)
        self.nan = nan


COMPARED = 512  # numbers of an answer up to which comparing it with itself is cheaper than the two calls of a sum


def hold_nan(answers: Sequence[torch.Tensor]) -> bool:
    """Only NaN is not what it is; a sum is NaN where any number is."""
    if isinstance(answers, Answers):
        return answers.nan
    for answer in answers:
        if answer.is_floating_point():
            count = answer.numel()
            if count == 1:
                if (number := answer.item()) != number:
                    return True
            elif count <= COMPARED and not answer.is_cuda:
                if not torch.equal(answer, answer):
                    return True
            elif (total := answer.sum().item()) != total:
                return True
    return False
