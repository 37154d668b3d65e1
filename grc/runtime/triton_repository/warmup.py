"""Warm-ups: a golden request that each model answers before the server is ready, carried through the stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from grc.runtime.program import Program
from grc.runtime.triton_repository.config import Warmup
from grc.runtime.triton_repository.tensors import Interface
from grc.runtime.weights import raw_chunks

Tensors = list[torch.Tensor]
MOST_WARMED = 256  # rows: what a larger batch needs is warmed by one of these as well


def warmups(folder: Path, manifest: Mapping[str, Any], interface: Interface, request: Tensors) -> list[Warmup]:
    """Write the first row of a request into `folder`, and name a warm-up for each part that answers a batch of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, tuple[str, list[int]]] = {}
    for index, (entry, tensor) in enumerate(zip(interface.inputs, request, strict=True)):
        rows = entry.to_rows(tensor)
        row = rows[:1] if interface.merges else rows
        file = f"input_{index}"
        (folder / file).write_bytes(b"".join(raw_chunks(row)))
        files[entry.name] = file, list(row.shape[1:] if interface.merges else row.shape)
    return [Warmup(f"batch_{batch}", batch, files) for batch in first_batches(manifest, interface)]


def first_batches(manifest: Mapping[str, Any], interface: Interface) -> list[int]:
    """The smallest batch of each part that has batches of its own."""
    if not interface.merges:
        return [1]
    limits = [0, *(choice["up_to"] for choice in manifest["choice"][:-1])]
    return [limit + 1 for limit in limits if limit < min(interface.max_batch, MOST_WARMED)]


def through(stages: list[Program], names: list[str], inputs: Tensors) -> list[Tensors]:
    """What each stage takes when the first gets `inputs`, which are called `names`; the last answers are the model's."""
    values = dict(zip(names, inputs, strict=True))
    taken = []
    for stage in stages:
        taken.append([values[entry["name"]] for entry in stage.artifact.manifest["inputs"]])
        made = [entry["name"] for entry in stage.artifact.manifest["outputs"]]
        values |= zip(made, stage.run_flat(list(taken[-1])), strict=True)
    return taken
