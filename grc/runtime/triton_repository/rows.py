"""Whether rows are answered alone as they are together: what merging the requests of strangers rests on."""

from __future__ import annotations

from typing import Any

import torch

from grc.runtime.closeness import QUALITY, largest_error, within
from grc.runtime.golden import Golden
from grc.runtime.program import Program
from grc.runtime.triton_repository.tensors import Interface, Tensor


def single_rows(shapes: Interface, request: Golden) -> list[Golden]:
    """Each row of a request as a request of its own."""
    inputs = [entry.to_rows(tensor) for entry, tensor in zip(shapes.inputs, request.inputs, strict=True)]
    outputs = [entry.to_rows(tensor) for entry, tensor in zip(shapes.outputs, request.outputs, strict=True)]
    return [
        Golden(
            [entry.to_model(t[i : i + 1]) for entry, t in zip(shapes.inputs, inputs, strict=True)],
            [entry.to_model(t[i : i + 1]) for entry, t in zip(shapes.outputs, outputs, strict=True)],
        )
        for i in range(inputs[0].shape[0])
    ]


def load_data(shapes: Interface, requests: list[Golden]) -> dict[str, Any]:
    """Requests as perf_analyzer takes them by --input-data: tensors without their batch, flat."""
    asked = [row for request in requests for row in (single_rows(shapes, request) if shapes.merges else [request])]
    return {"data": [{e.name: content(e, t) for e, t in zip(shapes.inputs, row.inputs, strict=True)} for row in asked]}


def content(entry: Tensor, tensor: torch.Tensor) -> dict[str, Any] | list[Any]:
    """The numbers of one request's tensor, with their shape. A number a row has one where Triton serves it and none where grc
    does; left out, each server's own holds."""
    flat = tensor.flatten().tolist()
    shape = entry.to_rows(tensor).shape[1 if entry.scale else 0 :]
    return flat if entry.sizes == ("batch",) else {"content": flat, "shape": list(shape)}


def independent(program: Program, shapes: Interface, golden: list[Golden]) -> bool:
    """False for a model that reads its batch as a whole: a softmax over it, in-batch negatives, a batch's own statistics."""
    budget = max(program.artifact.manifest["quality"].values(), default=0.0)
    return all(
        within(largest_error(list(program.run_flat(list(row.inputs))), row.outputs), budget, QUALITY)
        for row in single_rows(shapes, golden[-1])
    )
