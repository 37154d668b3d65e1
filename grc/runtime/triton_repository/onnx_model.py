"""model.onnx for Triton's own backend, where an artifact needs no more than its graph: the graph that ONNX Runtime won with,
under the model's own names, its weights read from the artifact's file, which lies beside it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from grc.errors import ArtifactError, GrcError
from grc.runtime.artifact import Artifact
from grc.runtime.closeness import QUALITY, largest_error, within
from grc.runtime.golden import Golden
from grc.runtime.triton_repository import launcher
from grc.runtime.triton_repository.settings import Settings
from grc.runtime.triton_repository.slices import WEIGHTS
from grc.runtime.triton_repository.tensors import Interface

FILE = "model.onnx"  # as Triton's backend looks for it
ENGINE = "onnxruntime"


def choose(manifest: Mapping[str, Any], shapes: Interface, settings: Settings) -> tuple[str, str]:
    """`python` or `onnxruntime`, and why. Raises ArtifactError where onnxruntime was asked for and is not enough."""
    if settings.backend == "python":
        return "python", "as asked"
    reason = "stages run on our runtime" if settings.layout == "stages" else obstacle(manifest, shapes)
    if settings.backend == ENGINE:
        if reason:
            raise ArtifactError(
                f"Triton's onnxruntime backend can't run this artifact: {reason}", "export with --backend python"
            )
        return ENGINE, "as asked"
    if reason:
        return "python", reason
    if not launcher.has_backend(ENGINE):
        return "python", "the tritonserver of this host has no onnxruntime backend"
    return ENGINE, "ONNX Runtime answers every batch, and nothing needs our runtime"


def obstacle(manifest: Mapping[str, Any], shapes: Interface) -> str | None:
    """What our runtime does for this artifact that Triton's backend would not, or None."""
    engines = list(dict.fromkeys(manifest["parts"][choice["part"]]["engine"] for choice in manifest["choice"]))
    if engines != [ENGINE]:
        return f"it is answered by {' and '.join(engines)}"
    if len({choice["part"] for choice in manifest["choice"]}) > 1:
        return "it has parts for different batches"
    if manifest["ids"] and manifest["on_bad_id"] == "error":
        # Gather takes negative ids from the table's end, and fails the whole merged batch for those that are too large.
        return "its ids must be checked: compile with --on-bad-id zero to have that in the graph"
    if manifest["batch"]["min"] > 1:
        return f"batches below {manifest['batch']['min']} are padded"
    for tensor in (*shapes.inputs, *shapes.outputs):
        if any(size != "batch" and not isinstance(size, int) for size in tensor.sizes):
            return f"{tensor.name} has a size beside the batch that varies"
    return None


def write(artifact: Artifact, shapes: Interface, folder: Path) -> None:
    """model.onnx and the weights that it points into."""
    onnx = module("onnx")
    part = artifact.manifest["parts"][artifact.manifest["choice"][0]["part"]]
    proto = onnx.load(str(artifact.path / "parts" / part["file"]), load_external_data=False)
    shutil.copyfile(artifact.path / WEIGHTS, folder / WEIGHTS)  # a link would be taken for an attack by onnx itself
    begins = starts(folder / WEIGHTS)
    for tensor in proto.graph.initializer:
        if tensor.name in part["weights"]:
            start, length = span(part["weights"][tensor.name], artifact.weights, begins)
            del tensor.external_data[:]
            for key, value in (("location", WEIGHTS), ("offset", start), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
    rename(proto, shapes)
    onnx.save_model(proto, str(folder / FILE))


def starts(path: Path) -> dict[str, int]:
    """Where each tensor begins in a safetensors file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def span(ref: Mapping[str, Any], weights: Mapping[str, torch.Tensor], begins: Mapping[str, int]) -> tuple[int, int]:
    """First byte and bytes of a weight: a whole tensor, or a slice of one that others share."""
    whole = weights[ref["key"]]
    if "shape" not in ref:
        return begins[ref["key"]], whole.nbytes
    return begins[ref["key"]] + ref["start"] * whole.element_size(), math.prod(ref["shape"]) * whole.element_size()


def rename(proto: Any, shapes: Interface) -> None:
    """The model's names instead of input_0 and output_0: Triton wants the graph's in config.pbtxt."""
    graph = proto.graph
    given = {f"input_{i}": tensor.name for i, tensor in enumerate(shapes.inputs)}
    missing = [name for old, name in given.items() if old not in {value.name for value in graph.input}]
    if missing:
        raise ArtifactError(f"the ONNX graph does not read input {missing[0]}", "export with --backend python")
    new = given | {value.name: tensor.name for value, tensor in zip(graph.output, shapes.outputs, strict=True)}
    own = {t.name for t in graph.initializer} | {o for n in graph.node for o in n.output}
    # An inner value that is called as an input or output shall be gets out of the way.
    new |= {name: f"inner/{name}" for name in own if name in new.values() and name not in new}
    for entries in (graph.input, graph.output, graph.value_info, graph.initializer):
        for value in entries:
            value.name = new.get(value.name, value.name)
    for node in graph.node:
        for slots in (node.input, node.output):
            slots[:] = [new.get(name, name) for name in slots]


def check(folder: Path, shapes: Interface, golden: Sequence[Golden], budget: float) -> None:
    """The file must answer the golden requests by ONNX Runtime alone, as Triton will run it. Raises ArtifactError."""
    ort = module("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in shapes.outputs]
    for request in golden:
        given = {entry.name: t.numpy() for entry, t in zip(shapes.inputs, request.inputs, strict=True)}
        error = largest_error([torch.from_numpy(out) for out in session.run(names, given)], request.outputs)
        if not within(error, budget, QUALITY):
            raise ArtifactError(
                f"{FILE} answers a golden request {error:.1e} away from the model", "export with --backend python"
            )


def module(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise GrcError(
            f"a model for Triton's onnxruntime backend needs {name}", "pip install 'grc-compiler[onnxruntime]'"
        ) from None
