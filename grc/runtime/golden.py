"""Golden requests: what every copy of an artifact must answer, and how far from it an answer may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from grc.errors import ArtifactError
from grc.runtime.artifact import Artifact
from grc.runtime.weights import read_weights

QUALITY = 1e-4  # largest error of a float32 engine relative to the largest answer; rounding of a deep model is 1e-6
SWAPPED = 0.01  # 1% of ids in other places, as near-ties of a top-100 may be, weighs as an error of 1e-4

Tensors = list[torch.Tensor]
Golden = tuple[Tensors, Tensors]


def golden_requests(artifact: Artifact) -> list[Golden]:
    """Requests and the model's own answers, the smallest batch first."""
    return paired(read_weights(artifact.path / "golden.safetensors"))


def paired(tensors: Mapping[str, torch.Tensor]) -> list[Golden]:
    """From `0.input.0`, `0.output.0`, … to one pair of lists for each request."""
    found: dict[int, tuple[dict[int, Any], dict[int, Any]]] = {}
    for key, tensor in tensors.items():
        request, kind, index = key.split(".")
        found.setdefault(int(request), ({}, {}))[kind == "output"][int(index)] = tensor
    return [([i[k] for k in sorted(i)], [o[k] for k in sorted(o)]) for _, (i, o) in sorted(found.items())]


def budget(artifact: Artifact) -> float:
    """The error that an answer of this artifact may have: twice what its worst part had when it was built, or QUALITY."""
    quality = artifact.manifest["quality"]
    return max(2 * max(quality[part["engine"]] for part in artifact.manifest["parts"]), QUALITY)


def check_golden(artifact: Artifact, answer: Any, requests: Sequence[Golden]) -> None:
    """Replay golden requests through `answer`, a function from a list of tensors to one. Raises ArtifactError when a
    request is answered too far from the model."""
    allowed = budget(artifact)
    for inputs, expected in requests:
        error = largest_error(list(answer(inputs)), expected)
        if not error <= allowed:
            raise ArtifactError(
                f"{artifact.path.name} answers a golden request {error:.1e} away from the model",
                f"rebuild it here: {artifact.manifest['command']}",
            )


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
