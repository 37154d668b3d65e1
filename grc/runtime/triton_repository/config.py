"""config.pbtxt: built as protobuf messages, so that a field that Triton does not know fails here and not at load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grc.errors import GrcError
from grc.runtime.triton_repository.settings import Settings
from grc.runtime.triton_repository.tensors import Interface, Tensor

Config = Any  # tritonclient.grpc.model_config_pb2.ModelConfig, which is generated when it is imported


def messages() -> Any:
    """Triton's own messages. Raises GrcError where tritonclient is not installed."""
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError:
        raise GrcError(
            "a Triton repository needs tritonclient, which is not installed", "pip install 'grc-compiler[triton]'"
        ) from None
    return model_config_pb2


def text(config: Config) -> str:
    from google.protobuf import text_format

    return text_format.MessageToString(config)


def read(path: Path) -> Config:
    from google.protobuf import text_format

    return text_format.Parse(path.read_text(), messages().ModelConfig())


@dataclass(frozen=True)
class Step:
    """One model of an ensemble: which of the ensemble's tensors it reads and makes, by its own names."""

    model: str
    reads: Mapping[str, str]
    makes: Mapping[str, str]


@dataclass(frozen=True)
class Port:
    """A tensor as config.pbtxt has it."""

    name: str
    type: str
    dims: Sequence[int]
    ragged: bool = False


REQUEST = Port("request", "UINT8", [-1])
ANSWER = Port("answer", "UINT8", [-1])


def ports(tensors: Iterable[Tensor], *, batched: bool) -> list[Port]:
    """With `batched` the batch is left out, as in a model that Triton merges; else it is a dim like any other."""
    found = []
    for tensor in tensors:
        explicit = tensor.scale > 0 and not batched
        dims = [-1, *tensor.dims] if explicit else list(tensor.dims)
        found.append(Port(tensor.name, tensor.triton_type, dims, batched and tensor.ragged))
    return found


@dataclass(frozen=True)
class Warmup:
    """Requests that are answered before the model is ready: `batch` times one row, whose bytes lie in a file an input.

    For a model that is not merged `batch` is 1, and the row is the whole request: Triton passes over warm-ups of 0.
    """

    name: str
    batch: int
    files: Mapping[str, tuple[str, Sequence[int]]]


def program(
    name: str, interface: Interface, settings: Settings, device: str = "cpu", warmups: Iterable[Warmup] = ()
) -> Config:
    """A model that our runtime runs."""
    inputs = ports(interface.inputs, batched=interface.merges)
    config = python_model(name, inputs, ports(interface.outputs, batched=interface.merges), settings, device)
    return scheduled(config, inputs, interface, settings, warmups)


def onnx_program(name: str, interface: Interface, settings: Settings, warmups: Iterable[Warmup] = ()) -> Config:
    """A model.onnx that Triton's own backend runs, on a CPU. Its names are the interface's."""
    pb = messages()
    inputs, outputs = (ports(tensors, batched=interface.merges) for tensors in (interface.inputs, interface.outputs))
    config = pb.ModelConfig(name=name, platform="onnxruntime_onnx", backend="onnxruntime")
    add_ports(config, inputs, outputs)
    # Triton wants a dim beside the batch, which a model's [B] has not: the backend takes it away and puts it back.
    for tensors, entries in ((interface.inputs, config.input), (interface.outputs, config.output)):
        for tensor, entry in zip(tensors, entries, strict=True):
            if interface.merges and len(tensor.sizes) == 1:
                entry.reshape.SetInParent()
    config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU, count=settings.instances)
    config.version_policy.latest.num_versions = settings.keep_versions
    return scheduled(config, inputs, interface, settings, warmups)


def scheduled(
    config: Config, inputs: Sequence[Port], interface: Interface, settings: Settings, warmups: Iterable[Warmup]
) -> Config:
    """How the requests of a program are merged, kept and warmed up for."""
    config.max_batch_size = interface.max_batch
    if interface.merges:
        config.dynamic_batching.max_queue_delay_microseconds = settings.max_delay_us
    queue(config, settings)
    config.response_cache.enable = settings.cache
    warm(config, inputs, warmups)
    return config


def warm(config: Config, inputs: Sequence[Port], warmups: Iterable[Warmup]) -> None:
    for warmup in warmups:
        entry = config.model_warmup.add(name=warmup.name, batch_size=warmup.batch)
        for port in inputs:
            file, dims = warmup.files[port.name]
            entry.inputs[port.name].data_type = data_type(port.type)
            entry.inputs[port.name].dims.extend(dims)
            entry.inputs[port.name].input_data_file = file


def python_model(
    name: str, inputs: Sequence[Port], outputs: Sequence[Port], settings: Settings, device: str = "cpu"
) -> Config:
    """What every model of ours has: tensors, instances, versions and where its Python lies."""
    pb = messages()
    config = pb.ModelConfig(name=name, backend="python")
    add_ports(config, inputs, outputs)
    kind = pb.ModelInstanceGroup.KIND_GPU if device == "cuda" else pb.ModelInstanceGroup.KIND_CPU
    gpus = settings.gpus if device == "cuda" else ()
    config.instance_group.add(kind=kind, count=settings.instances, gpus=gpus)
    config.version_policy.latest.num_versions = settings.keep_versions
    if settings.python is not None:
        config.parameters["EXECUTION_ENV_PATH"].string_value = str(settings.python)
    return config


def ensemble(
    name: str,
    inputs: Sequence[Port],
    outputs: Sequence[Port],
    steps: Sequence[Step],
    settings: Settings,
    max_batch: int,
) -> Config:
    config = messages().ModelConfig(name=name, platform="ensemble", max_batch_size=max_batch)
    add_ports(config, [Port(p.name, p.type, p.dims) for p in inputs], outputs)
    config.response_cache.enable = settings.cache
    config.version_policy.latest.num_versions = settings.keep_versions
    for step in steps:
        # By its number: while a new version is moved in, no request goes through stages of two versions.
        entry = config.ensemble_scheduling.step.add(model_name=step.model, model_version=settings.version)
        for own, shared in step.reads.items():
            entry.input_map[own] = shared
        for own, shared in step.makes.items():
            entry.output_map[own] = shared
    return config


def add_ports(config: Config, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
    for port in inputs:
        config.input.add(name=port.name, data_type=data_type(port.type), dims=port.dims, allow_ragged_batch=port.ragged)
    for port in outputs:
        config.output.add(name=port.name, data_type=data_type(port.type), dims=port.dims)


def data_type(name: str) -> int:
    return messages().DataType.Value(f"TYPE_{name}")


def queue(config: Config, settings: Settings) -> None:
    """Where asked for, the urgent overtake, and what finds the queue full or waits too long is refused. A model that is not
    merged has a queue as well: at max_batch_size 0 the dynamic batcher takes one request at a time.

    No policy is written unasked: with any of its fields tritonserver 2.51 holds requests for about 500 ms under load.
    """
    if settings.priorities:
        config.dynamic_batching.priority_levels = settings.priorities
        config.dynamic_batching.default_priority_level = settings.priorities
    if not settings.max_queue and not settings.timeout_us:
        return
    policy = config.dynamic_batching.default_queue_policy
    policy.timeout_action = policy.REJECT
    policy.max_queue_size = settings.max_queue
    policy.default_timeout_microseconds = settings.timeout_us
    policy.allow_timeout_override = True
