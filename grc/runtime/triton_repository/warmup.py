"""Warm-ups: a request that each model answers before the server is ready. For programs a golden one, carried through the
stages; for preprocess and postprocess the example among the assets.

Triton does not load a model whose warm-up is refused, so that only what the artifact itself has answered is one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from grc.errors import GrcError
from grc.runtime.program import Program
from grc.runtime.triton_repository.config import Warmup
from grc.runtime.triton_repository.requests import tensor_of
from grc.runtime.triton_repository.tensors import Interface
from grc.runtime.weights import raw_chunks

Tensors = list[torch.Tensor]
MOST_WARMED = 256  # rows: what a larger batch needs is warmed by one of these as well


def warmups(folder: Path, manifest: Mapping[str, Any], interface: Interface, request: Tensors) -> list[Warmup]:
    """Write the first row of a request into `folder`, and name a warm-up for each part that answers a batch of its own."""
    rows = {entry.name: entry.to_rows(tensor) for entry, tensor in zip(interface.inputs, request, strict=True)}
    files = written(folder, {name: tensor[0] if interface.merges else tensor for name, tensor in rows.items()})
    return [Warmup(f"batch_{batch}", batch, files) for batch in first_batches(manifest, interface)]


def whole(folder: Path, request: Mapping[str, torch.Tensor]) -> Warmup:
    """One request of a model that is not merged."""
    return Warmup("example", 1, written(folder, request))


def written(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, list[int]]]:
    """A file for each tensor's bytes, and its dims."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        (folder / f"input_{index}").write_bytes(b"".join(raw_chunks(tensor)))
        files[name] = f"input_{index}", list(tensor.shape)
    return files


def example(program: Program) -> tuple[torch.Tensor, Sequence[torch.Tensor]] | None:
    """The request among the assets as bytes, and the model's outputs for it; None where there is none that it answers."""
    request = program.example()
    if request is None:
        return None
    args, kwargs = program.processing.preprocess(request)
    try:
        outputs = program.run_flat(program.leaves(args, kwargs))
        program.processing.postprocess(program.built(outputs), request)
    except GrcError:
        return None
    return tensor_of(json.dumps(request)), outputs


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
