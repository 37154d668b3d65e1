"""Engines at run time: load a part of an artifact into a function from a list of tensors to a list of tensors."""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from grc.errors import ArtifactError
from grc.runtime.buckets import Buckets
from grc.runtime.device import DeviceWeights
from grc.runtime.graph_json import decode_graph
from grc.runtime.plan import Plan

Tensors = list[torch.Tensor]
Run = Callable[[Tensors], Sequence[torch.Tensor]]
COUNTER = "bad_ids_counter"  # the constant of a part on a GPU that tells its kernels where to count bad ids
CONCURRENT = 8  # AOTInductor model instances: as many requests run at once, all on the same weights


def load_part(part: Mapping[str, Any], folder: Path, constants: Mapping[str, torch.Tensor]) -> Run:
    """The function behind a part, on its constants by name. Raises ArtifactError when its engine is not usable on this host."""
    loader = LOADERS.get(part["engine"])
    if loader is None:
        raise ArtifactError(f"unknown engine {part['engine']}", "install the version of grc that built the artifact")
    return loader(folder / part["file"], constants)


def part_loader(
    manifest: Mapping[str, Any], alone: bool = False
) -> Callable[[Mapping[str, Any], Path, Mapping[str, torch.Tensor]], Run]:
    """`load_part` for the device that an artifact was built for. On a GPU all its parts share one upload of the weights, and
    each has the buckets of the requests that it is chosen for: with `alone`, where it answers all, all buckets."""
    if manifest["target"]["device"] != "cuda":
        return load_part
    weights = DeviceWeights(torch.device("cuda", torch.cuda.current_device()))
    plan = Plan.of(manifest["inputs"], manifest["outputs"], **manifest["gpu"])
    own = {} if alone else buckets_of_parts(manifest)

    def load(part: Mapping[str, Any], folder: Path, constants: Mapping[str, torch.Tensor]) -> Run:
        chosen = replace(plan, buckets=own.get(part["file"], plan.buckets))
        return load_on_gpu(part, folder, {n: weights.on_device(t) for n, t in constants.items()}, chosen)

    return load


def buckets_of_parts(manifest: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The buckets that each part answers, by its file."""
    choice = manifest["choice"]
    own: dict[str, tuple[int, ...]] = {}
    for size in manifest["gpu"]["buckets"]:
        entry = choice[bisect.bisect_left([c["up_to"] for c in choice[:-1]], size)]
        file = manifest["parts"][entry["part"]]["file"]
        own[file] = (*own.get(file, ()), size)
    return own


def load_on_gpu(part: Mapping[str, Any], folder: Path, constants: Mapping[str, torch.Tensor], plan: Plan) -> Run:
    """A part on constants that lie on the GPU, with a CUDA graph for each bucket where the part has them.

    Raises ArtifactError when a graph can't be captured.
    """
    path = folder / part["file"]
    if not part["graphs"]:
        plan = replace(plan, buckets=())
    elif part["bucket"] is not None:
        plan = replace(plan, buckets=(part["bucket"],))

    def make(told: torch.Tensor) -> Run:
        if part["engine"] == "eager":
            return load_eager(path, constants)
        # One thread a runner: the runner that serves many waits for events, which can't be captured.
        return load_inductor(path, {**constants, COUNTER: told}, alone=True)

    return Buckets(make, plan, part["counts_bad_ids"])


def load_inductor(path: Path, constants: Mapping[str, torch.Tensor], alone: bool = False) -> Run:
    """AOTInductor through its direct loader: 4 us a call, no compiler, weights used where they lie."""
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", alone, 1 if alone else CONCURRENT, -1)
    wanted = loader.get_constant_fqns()
    missing = [name for name in wanted if name not in constants]
    if missing:
        raise ArtifactError(
            f"{path.name} needs the weight {missing[0]}, which the artifact lacks", "rebuild the artifact"
        )
    if wanted:
        loader.load_constants({name: constants[name] for name in wanted}, False, True, True)
    return Held(loader.boxed_run, constants)


class Held:
    """A bound function that keeps the memory its weights live in."""

    __slots__ = ("run", "weights")

    def __init__(self, run: Run, weights: object):
        self.run = run
        self.weights = weights

    def __call__(self, inputs: Tensors) -> Sequence[torch.Tensor]:
        return self.run(inputs)


def load_eager(path: Path, constants: Mapping[str, torch.Tensor]) -> Run:
    module = decode_graph(json.loads(path.read_text()), constants)
    forward = module.forward

    def run(inputs: Tensors) -> Sequence[torch.Tensor]:
        with torch.inference_mode():
            return forward(*inputs)

    return run


def load_onnxruntime(path: Path, constants: Mapping[str, torch.Tensor]) -> Run:
    """ONNX Runtime on the memory-mapped weights: initialisers are handed over, not copied."""
    try:
        import onnxruntime as ort
    except ImportError:
        raise ArtifactError("this artifact needs onnxruntime", "pip install 'grc-compiler[onnxruntime]'") from None
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what it fails for is raised too
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if torch.get_num_threads() == 1 else "1")
    values = {name: ort.OrtValue.ortvalue_from_numpy(tensor.numpy()) for name, tensor in constants.items()}
    for name, given in values.items():
        options.add_initializer(name, given)  # used where it lies; add_external_initializers would copy every table
    session = onnx_session(str(path), options)
    names = [i.name for i in session.get_inputs()]
    order = {name: int(name.removeprefix("input_")) for name in names}
    session_run = session.run

    def run(inputs: Tensors) -> Sequence[torch.Tensor]:
        feed = {name: inputs[index].numpy() for name, index in order.items()}
        return [torch.from_numpy(out) for out in session_run(None, feed)]

    return Held(run, (values, constants))


def onnx_session(model: str | bytes, options: Any) -> Any:
    """A session of a file or its bytes. Constants stay unfolded where that would read a weight that the model does not hold."""
    import onnxruntime as ort

    providers = ["CPUExecutionProvider"]
    try:
        return ort.InferenceSession(model, options, providers=providers)
    except Exception as error:
        if "External initializer" not in str(error):
            raise
        return ort.InferenceSession(model, options, providers=providers, disabled_optimizers=["ConstantFolding"])


LOADERS: dict[str, Callable[[Path, Mapping[str, torch.Tensor]], Run]] = {
    "inductor": load_inductor,
    "inductor-float-layers": load_inductor,  # of a choice that keeps layers in float32
    "aoti": load_inductor,
    "onnxruntime": load_onnxruntime,
    "onnxruntime-static": load_onnxruntime,
    "eager": load_eager,
}
