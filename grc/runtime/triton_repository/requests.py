"""Requests as their users write them: JSON text in and out of a repository, as UINT8 tensors of its bytes.

Triton's own strings (BYTES) would end the process of a Python model where the server was built for numpy 1 and the model
runs on numpy 2; bytes pass everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from grc.errors import EngineError, GrcError, InputError
from grc.runtime.artifact import Artifact
from grc.runtime.inputs import InputCheck
from grc.runtime.processing import Processing, read_request, written
from grc.runtime.signature import Signature
from grc.runtime.structure import builder
from grc.runtime.triton_repository.tensors import interface


def text_of(tensor: torch.Tensor) -> str:
    """Raises InputError for bytes that are no UTF-8."""
    try:
        return tensor.contiguous().numpy().tobytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"the request is no UTF-8: {error}", "send JSON as UTF-8") from error


def failed(triton: Any, error: GrcError) -> Any:
    """The response to a request that failed, of `triton_python_backend_utils`: the client's fault or the server's."""
    mendable = isinstance(error, InputError) and not isinstance(error, EngineError)
    kind = triton.TritonError.INVALID_ARG if mendable else triton.TritonError.INTERNAL
    return triton.InferenceResponse([], error=triton.TritonError(error.message, kind))


def tensor_of(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


class Preprocess:
    """From JSON text to the model's inputs, by name and in Triton's shapes."""

    def __init__(self, folder: Path):
        artifact = Artifact.open(folder)
        self.processing = Processing(artifact)
        self.leaves = Signature(artifact.manifest).leaves
        self.check = InputCheck(artifact.manifest)
        self.inputs = interface(artifact.manifest).inputs

    def __call__(self, request: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """Raises InputError for text that is no request, and for tensors that the model does not take."""
        args, kwargs = self.processing.preprocess(read_request(text_of(request)))
        leaves = self.leaves(args, kwargs)
        self.check.batch(leaves)
        return [(entry.name, entry.to_rows(t).contiguous()) for entry, t in zip(self.inputs, leaves, strict=True)]


class Postprocess:
    """From the model's outputs, in Triton's shapes, and the request's JSON text to the answer's."""

    def __init__(self, folder: Path):
        artifact = Artifact.open(folder)
        self.processing = Processing(artifact)
        self.outputs = interface(artifact.manifest).outputs
        self.build = builder(artifact.manifest["structure"]["outputs"])

    def __call__(self, request: torch.Tensor, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Raises InputError for text that is no request, ArtifactError with the function's own words."""
        tensors = [entry.to_model(tensor) for entry, tensor in zip(self.outputs, outputs, strict=True)]
        return tensor_of(written(self.processing.postprocess(self.build(tensors), read_request(text_of(request)))))
