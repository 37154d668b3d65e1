"""tritonclient over HTTP and over gRPC as one function: tensors by name in, tensors by name out."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Literal

import torch

from grc.errors import GrcError, InputError
from grc.runtime.triton_repository.tensors import Tensor

Protocol = Literal["http", "grpc"]
PROTOCOLS: tuple[Protocol, ...] = ("http", "grpc")
SECONDS = 60.0


class Unavailable(GrcError):
    """The server has no room for a request, or no time: 503."""


class Client:
    """Safe to call from many threads: each has a connection of its own, as tritonclient wants it over HTTP."""

    def __init__(self, protocol: Protocol, address: str):
        self.protocol = protocol
        self.address = address
        self.module = module(protocol)
        self.local = threading.local()
        self.opened: list[Any] = []

    @property
    def connection(self) -> Any:
        if not hasattr(self.local, "connection"):
            limits = {"network_timeout": SECONDS} if self.protocol == "http" else {}
            self.local.connection = self.module.InferenceServerClient(self.address, **limits)
            self.opened.append(self.local.connection)
        return self.local.connection

    def infer(
        self, model: str, inputs: Sequence[tuple[Tensor, torch.Tensor]], outputs: Sequence[Tensor], **options: Any
    ) -> list[torch.Tensor]:
        """Raises InputError where the server says that the request is at fault, Unavailable where it has too many, and
        GrcError for any other failure."""
        from tritonclient.utils import InferenceServerException

        limits = {"client_timeout": SECONDS} if self.protocol == "grpc" else {}
        try:
            answer = self.connection.infer(
                model,
                [self.given(entry, tensor) for entry, tensor in inputs],
                outputs=[self.module.InferRequestedOutput(entry.name) for entry in outputs],
                **limits,
                **options,
            )
        except InferenceServerException as error:
            kind = KINDS.get(str(error.status()), GrcError)
            raise kind(f"{model} over {self.protocol}: {error.message()}") from error
        return [taken(entry, answer.as_numpy(entry.name)) for entry in outputs]

    def given(self, entry: Tensor, tensor: torch.Tensor) -> Any:
        made = self.module.InferInput(entry.name, list(tensor.shape), entry.triton_type)
        # tritonclient takes bfloat16 as float32, because numpy has none
        tensor = tensor.float() if tensor.dtype is torch.bfloat16 else tensor
        made.set_data_from_numpy(tensor.contiguous().numpy())
        return made

    def statistics(self, model: str) -> tuple[int, int]:
        """(inferences, executions) so far: with merging, there are fewer executions than requests."""
        if self.protocol == "http":
            found: Mapping[str, Any] = self.connection.get_inference_statistics(model)["model_stats"][0]
        else:
            found = self.connection.get_inference_statistics(model, as_json=True)["model_stats"][0]
        return int(found["inference_count"]), int(found["execution_count"])

    def load(self, model: str, config: Any) -> None:
        """Load a model again, with another configuration. Raises GrcError where the server does not."""
        from google.protobuf import json_format
        from tritonclient.utils import InferenceServerException

        try:
            self.connection.load_model(
                model, config=json_format.MessageToJson(config, preserving_proto_field_name=True)
            )
        except InferenceServerException as error:
            raise GrcError(f"{model} can't be loaded again: {error.message()}") from error

    def close(self) -> None:
        """An open connection would hold the server for the whole of its exit timeout."""
        for connection in self.opened:
            connection.close()


KINDS: dict[str, type[GrcError]] = {
    "400": InputError,
    "StatusCode.INVALID_ARGUMENT": InputError,
    "503": Unavailable,
    "StatusCode.UNAVAILABLE": Unavailable,
}


def taken(entry: Tensor, array: Any) -> torch.Tensor:
    return torch.from_numpy(array.copy()).to(entry.torch_dtype)


def module(protocol: Protocol) -> ModuleType:
    """Raises GrcError where tritonclient is not installed."""
    try:
        if protocol == "http":
            import tritonclient.http as found
        else:
            import tritonclient.grpc as found
    except ImportError:
        raise GrcError("tritonclient is not installed", "pip install 'grc-compiler[triton]'") from None
    return found
