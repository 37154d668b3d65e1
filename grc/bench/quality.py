"""Quality: how far an answer is from the fp64 oracle, and whether a time may stand beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from grc.graph.oracle import largest_error, within
from grc.lowering.choose import QUALITY

BEST = 100
# A swap at the end of the list between two nearly equal scores costs one id in a hundred, in fp32 as in any precision.
FEWEST_SHARED = 0.98
# In fewer bits every engine is wrong by some percent, and the rows say by how much: only what is useless has no time.
LOWERED = 0.05
FEWEST_SHARED_LOWERED = 0.9


@dataclass(frozen=True)
class Quality:
    """`max_error` over the float outputs, relative to the largest answer (or to 1); `overlap100` of the best ids, or
    None for a model that gives neither ids nor a score vector; `others` the share of other integers that differ.
    """

    max_error: float
    overlap100: float | None
    others: float = 0.0


def judge(answer: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> Quality:
    """Compare a flat answer with the oracle's. An answer of other shapes has an infinite error."""
    if len(answer) != len(truth) or any(a.shape != t.shape for a, t in zip(answer, truth, strict=True)):
        return Quality(float("inf"), 0.0 if overlap(truth, truth) is not None else None)
    pairs = list(zip(answer, truth, strict=True))
    floats = [(a, t) for a, t in pairs if t.is_floating_point()]
    rest = [(a, t) for a, t in pairs if not t.is_floating_point() and not is_list(t)]
    return Quality(
        largest_error([a for a, _ in floats], [t for _, t in floats]),
        overlap(answer, truth),
        largest_error([a for a, _ in rest], [t for _, t in rest]),
    )


def overlap(answer: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float | None:
    """The share of the oracle's 100 best ids that the answer has too, mean over rows.

    Taken from the ids that the model returns (`[B, N]` integers), else from the 100 largest entries of its widest float
    output of more than 100 columns.
    """
    ids = next((i for i, t in enumerate(truth) if is_list(t)), None)
    if ids is not None:
        return shared(answer[ids][:, :BEST], truth[ids][:, :BEST])
    wide = [i for i, t in enumerate(truth) if t.dim() >= 2 and t.shape[-1] > BEST and t.is_floating_point()]
    if not wide:
        return None
    widest = max(wide, key=lambda i: truth[i].shape[-1])
    best = [torch.topk(t[widest].flatten(0, -2).double(), BEST).indices for t in (answer, truth)]
    return shared(*best)


def is_list(tensor: torch.Tensor) -> bool:
    integral = not tensor.is_floating_point() and tensor.dtype is not torch.bool
    return integral and tensor.dim() == 2 and tensor.shape[1] > 1


def shared(ids: torch.Tensor, wanted: torch.Tensor) -> float:
    """Share of `wanted` `[B, N]` that is in the same row of `ids`."""
    found = torch.searchsorted(ids.sort(dim=1).values.contiguous(), wanted.contiguous()).clamp(max=ids.shape[1] - 1)
    return (ids.sort(dim=1).values.gather(1, found) == wanted).double().mean().item() if wanted.numel() else 1.0


def fault(quality: Quality, eager: Quality, precision: str = "fp32") -> str | None:
    """Why an answer is wrong, or None: at most twice as far from the oracle as the eager model, above a floor."""
    floor = QUALITY if precision == "fp32" else LOWERED
    if not within(quality.max_error, eager.max_error, floor):
        return f"error {quality.max_error:.1e}, the budget is {max(2 * eager.max_error, floor):.1e}"
    fewest = fewest_shared(eager) if precision == "fp32" else FEWEST_SHARED_LOWERED
    if quality.overlap100 is not None and quality.overlap100 < fewest:
        return f"shares {quality.overlap100:.0%} of the best ids"
    if not within(quality.others, eager.others, QUALITY):
        return f"{quality.others:.2%} of its integers differ"
    return None


def fewest_shared(eager: Quality) -> float:
    """In half precision the eager model itself loses ids to ties."""
    return FEWEST_SHARED if eager.overlap100 is None else min(FEWEST_SHARED, eager.overlap100 - (1 - FEWEST_SHARED))
