"""How far an answer is from the truth, in one number that floats, ids and flags share, and how far it may be."""

from __future__ import annotations

from collections.abc import Sequence

import torch

QUALITY = 1e-4  # largest error of a float32 engine relative to the largest answer; rounding of a deep model is 1e-6
SWAPPED = 0.01  # 1% of ids in other places, as near-ties of a top-100 may be, weighs as an error of 1e-4


def largest_error(answer: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """The largest difference from the oracle over all outputs.

    Floats: max |a - t| / max(1, max |t|) of the output. Integers and booleans: SWAPPED times the share of positions that
    differ, so that a top-k with a swapped tie is a small error and wrong ids are a large one. NaN and inf must be in the
    same places.
    """
    worst = 0.0
    for a, t in zip(answer, truth, strict=True):
        if a.shape != t.shape:
            return float("inf")
        if a.numel() == 0:
            continue
        if not t.is_floating_point() or not a.is_floating_point():
            worst = max(worst, SWAPPED * (a != t).double().mean().item())
            continue
        a, t = a.double(), t.double()
        finite = torch.isfinite(t)
        if not torch.equal(finite, torch.isfinite(a)):
            return float("inf")
        if finite.any():
            scale = max(1.0, t[finite].abs().max().item())
            worst = max(worst, (a - t)[finite].abs().max().item() / scale)
    return worst


def within(error: float, baseline: float, floor: float = 1e-5) -> bool:
    """A rewritten graph may be at most twice as far from the oracle as the model itself, above a floor of rounding."""
    return error <= max(2 * baseline, floor)
