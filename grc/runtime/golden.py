"""Golden requests: what every copy of an artifact must answer as the model did."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grc.runtime.artifact import Artifact
from grc.runtime.weights import read_weights


@dataclass(frozen=True)
class Golden:
    """A request and the model's own answer, as the graph's flat tensors."""

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]


def read_golden(artifact: Artifact) -> list[Golden]:
    """From `0.input.0`, `0.output.0`, … of golden.safetensors."""
    found: dict[int, tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]] = {}
    for key, tensor in read_weights(artifact.path / "golden.safetensors").items():
        request, kind, index = key.split(".")
        found.setdefault(int(request), ({}, {}))[kind == "output"][int(index)] = tensor
    return [Golden([i[k] for k in sorted(i)], [o[k] for k in sorted(o)]) for _, (i, o) in sorted(found.items())]
