"""Requests for perf_analyzer: what it sends by --input-data, instead of random ids that are in no table."""

from __future__ import annotations

from typing import Any

import torch

from grc.runtime.golden import Golden
from grc.runtime.triton_repository.rows import single_rows
from grc.runtime.triton_repository.tensors import Interface, Tensor


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
