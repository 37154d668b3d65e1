"""gRPC: the same protocol as protobuf messages. Their stubs come from tritonclient, which keeps them with the protocol."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import torch
from google.protobuf.json_format import ParseDict
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from grc.runtime.server import describe, messages
from grc.runtime.server.cut import Cut
from grc.runtime.server.datatypes import NAMES, bytes_of_list, check_shape, check_size
from grc.runtime.server.health import Health
from grc.runtime.server.listener import FAREWELL
from grc.runtime.server.logs import clean_id, request_id
from grc.runtime.server.models import Models
from grc.runtime.server.packed import Packed
from grc.runtime.server.refusal import ended, gone, invalid, out_of_time
from grc.runtime.server.service import Call, Service
from grc.runtime.server.settings import Settings
from grc.runtime.server.version import Version

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    503: grpc.StatusCode.UNAVAILABLE,
}
CONTENTS = {
    torch.bool: "bool_contents",
    torch.int8: "int_contents",
    torch.int16: "int_contents",
    torch.int32: "int_contents",
    torch.int64: "int64_contents",
    torch.uint8: "uint_contents",
    torch.float32: "fp32_contents",
    torch.float64: "fp64_contents",
}


class Grpc(service_pb2_grpc.GRPCInferenceServiceServicer):
    """What is not here (shared memory, traces) answers UNIMPLEMENTED by itself."""

    def __init__(self, service: Service, models: Models, health: Health, settings: Settings):
        self.service, self.models, self.health, self.settings = service, models, health, settings
        self.begun: set[asyncio.Task[Any]] = set()
        self.ending = False

    async def drain(self, server: Any, seconds: float) -> None:
        """Take no new call, wait for the answers that have begun, and refuse what is left."""
        self.service.loop.call_later(seconds, self.end)
        await server.stop(seconds + FAREWELL)

    def end(self) -> None:
        """Wait no longer. grpc would cut the calls off by itself, and nobody would hear of them."""
        self.ending = True
        for task in self.begun:
            task.cancel()

    async def unless_ended(self, call: Call, answer: Awaitable[Any]) -> Any:
        """The answer. Raises Refused where the server waits for it no longer, and CancelledError where its client does not."""
        task = asyncio.current_task()
        assert task is not None
        self.begun.add(task)
        try:
            return await answer
        except asyncio.CancelledError:
            if not self.ending:  # its client left, or grpc did at the client's deadline
                late = time.monotonic() >= call.deadline
                self.service.failed(call, out_of_time(call.model, 0.0) if late else gone("its answer"))
                raise
            task.uncancel()
            raise ended("the answer") from None
        finally:
            self.begun.discard(task)

    async def answered(self, context: Any, call: Call, answer: Callable[[], Awaitable[Any]]) -> Any:
        """The answer, or the status that an error is told as."""
        try:
            found = await self.unless_ended(call, answer())
            context.set_trailing_metadata((("x-request-id", call.id),))
            return found
        except Exception as error:  # every error is some client's status, and the server goes on
            told = self.service.failed(call, error)
            trailing = [("x-request-id", call.id)]
            if told.retry_after is not None:
                trailing.append(("retry-after", str(told.retry_after)))
            code = CODES.get(told.status, grpc.StatusCode.INTERNAL)
            await context.abort(code, told.message, tuple(trailing))

    async def about(self, request: Any, context: Any, describe: Callable[[Version], Any]) -> Any:
        call = self.call(context)

        async def answer() -> Any:
            call.model = request.name
            return describe(self.models.find(request.name, request.version or None))

        return await self.answered(context, call, answer)

    def call(self, context: Any, id: str = "") -> Call:
        """`id` is the protocol's own, which x-request-id goes before."""
        given = dict(context.invocation_metadata()).get("x-request-id") or id
        call = Call(clean_id(given) if given else request_id(), "grpc", self.settings.timeout)
        left = context.time_remaining()
        if left is not None:
            call.due(left)
        return call

    async def ServerLive(self, request: Any, context: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:
        return pb.ServerReadyResponse(ready=self.health.ready())

    async def ModelReady(self, request: Any, context: Any) -> Any:
        def ready(version: Version) -> Any:
            return pb.ModelReadyResponse(ready=self.health.model_ready(version.name))

        return await self.about(request, context, ready)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:
        return ParseDict(describe.server_metadata(), pb.ServerMetadataResponse())

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        return await self.about(request, context, lambda v: ParseDict(describe.metadata(v), pb.ModelMetadataResponse()))

    async def ModelConfig(self, request: Any, context: Any) -> Any:
        return await self.about(
            request, context, lambda v: ParseDict({"config": describe.config(v)}, pb.ModelConfigResponse())
        )

    async def ModelStatistics(self, request: Any, context: Any) -> Any:
        def statistics(versions: list[Version]) -> Any:
            found = [v.statistics.json(v.name, v.number) for v in versions]
            return ParseDict({"model_stats": found}, pb.ModelStatisticsResponse())

        if not request.name:
            return statistics(list(self.models.versions()))
        return await self.about(request, context, lambda version: statistics([version]))

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        ready = {model.name: self.health.model_ready(model.name) for model in self.models.all.values()}
        found = describe.index(list(self.models.versions()), ready)
        return ParseDict({"models": found}, pb.RepositoryIndexResponse())

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        told = "models are those that the server was started with; new versions of them are found on disk"
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, told)

    RepositoryModelUnload = RepositoryModelLoad

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        call = self.call(context, request.id)
        return await self.answered(context, call, lambda: self.infer(call, request))

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """One answer for each request, in order; an error is an answer too, and the stream goes on."""
        async for request in requests:
            call = self.call(context, request.id)
            try:
                found = await self.unless_ended(call, self.infer(call, request))
                yield pb.ModelStreamInferResponse(infer_response=found)
            except Exception as error:  # it belongs to this request
                told = self.service.failed(call, error)
                failed = pb.ModelInferResponse(id=request.id, model_name=request.model_name)
                yield pb.ModelStreamInferResponse(error_message=told.message, infer_response=failed)

    async def infer(self, call: Call, request: Any) -> Any:
        call.model = request.model_name
        version = call.version = self.models.find(request.model_name, request.model_version or None)
        parameters = parameters_of(request.parameters)
        messages.refuse_unknown(parameters)
        call.asks(messages.timeout(parameters), messages.priority(parameters))
        wanted = wanted_outputs(request, version)
        cut = Cut.all_of(await self.service.infer(call, version, read_inputs(request, version)))
        found = pb.ModelInferResponse(model_name=version.name, model_version=version.number, id=request.id)
        for index in wanted:
            dtype = NAMES[version.output_dtypes[index]]
            found.outputs.add(name=version.output_names[index], datatype=dtype, shape=cut.shape(index))
            found.raw_output_contents.append(cut.packed(index))
        self.service.succeeded(call)
        return found


def parameters_of(given: Any) -> dict[str, Any]:
    """The protocol's parameters, as JSON has them."""
    kinds = {name: value.WhichOneof("parameter_choice") for name, value in given.items()}
    return {name: getattr(given[name], kind) for name, kind in kinds.items() if kind is not None}


def read_inputs(request: Any, version: Version) -> Packed:
    data: dict[int, bytes] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise invalid(f"the request has {len(request.inputs)} inputs and {len(raw)} raw contents", "truncated")
    for place, entry in enumerate(request.inputs):
        index = version.input_index.get(entry.name)
        if index is None:
            raise invalid(
                f"the request has an unknown input {entry.name}; the inputs are {', '.join(version.input_index)}"
            )
        if index in data:
            raise invalid(f'input "{entry.name}" is given twice')
        dtype = messages.checked_dtype(entry.name, entry.datatype, version.dtypes[index])
        messages.refuse_unknown(parameters_of(entry.parameters))
        shape = list(entry.shape)
        check_shape(entry.name, shape)
        shapes[index] = tuple(shape)
        if raw:
            check_size(entry.name, len(raw[place]), shape, dtype)
            data[index] = raw[place]
        elif dtype in CONTENTS:
            data[index] = bytes_of_list(entry.name, list(getattr(entry.contents, CONTENTS[dtype])), shape, dtype)
        else:
            raise invalid(f'input "{entry.name}" is {NAMES[dtype]}, which travels in raw_input_contents only')
    return version.packed(data, shapes)


def wanted_outputs(request: Any, version: Version) -> list[int]:
    wanted = []
    for entry in request.outputs:
        index = version.output_index.get(entry.name)
        if index is None:
            raise invalid(f"there is no output {entry.name}; the outputs are {', '.join(version.output_index)}")
        messages.refuse_unknown(parameters_of(entry.parameters))
        wanted.append(index)
    return wanted or list(range(len(version.output_names)))


async def start(service: Grpc, port: int) -> tuple[Any, int]:
    """A server that listens, and its port. Two servers on one port would share its requests: that is refused."""
    limits = service.settings
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", limits.max_body),
            ("grpc.max_send_message_length", -1),
        ],
        maximum_concurrent_rpcs=limits.max_connections,
    )
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    bound = server.add_insecure_port(f"[{limits.host}]:{port}" if ":" in limits.host else f"{limits.host}:{port}")
    await server.start()
    return server, bound
