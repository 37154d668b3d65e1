"""Peer: ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grc.bench.contender import Contender, Stopwatch
from grc.bench.requests import Request
from grc.bench.subject import BenchError, Subject
from grc.errors import LoweringError
from grc.graph.capture import EXPORT_BATCH, Source
from grc.kernels import FUSIONS
from grc.lowering.engine import Lowerable
from grc.lowering.onnx_int8 import quantised
from grc.lowering.onnxruntime import externalise, onnx_model
from grc.options import Options
from grc.passes.manager import Proof, run_passes
from grc.passes.pipeline import pipeline
from grc.runtime.engines import onnx_session


def build_onnxruntime(subject: Subject, example: Request, batch: int) -> Iterator[Contender]:
    """ONNX Runtime with all graph optimisations, on numpy inputs made ahead of the clock. In fewer bits, it is given its own
    quantiser's int8 with a scale for each column.

    The exporter writes EmbeddingBag as a Scan or Loop, which runs one row at a time; the peer is then given the graph
    that grc made of the model, in plain operators.
    """
    import onnxruntime as ort

    if subject.place.device != "cpu":
        raise BenchError("ONNX Runtime is measured on the CPU only", "leave onnxruntime out of --against")
    file = subject.place.folder / "onnxruntime.pt"
    seconds = None if file.exists() else write_model(subject, file)
    clock = Stopwatch()
    # The model, its weights outside of it by name, and where they come from.
    model, constants, form = torch.load(file, mmap=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = subject.place.threads
    options.log_severity_level = 3
    values = [ort.OrtValue.ortvalue_from_numpy(tensor.numpy()) for tensor in constants.values()]
    options.add_external_initializers(list(constants), values)
    session = onnx_session(model, options)
    load_s = clock.read()
    names = {value.name: int(value.name.removeprefix("input_")) for value in session.get_inputs()}

    def prepare(request: Request) -> dict[str, Any]:
        return {name: request.leaves[index].numpy() for name, index in names.items()}

    def tensors(answer: Sequence[Any]) -> list[torch.Tensor]:
        return [torch.from_numpy(array) for array in answer]

    yield Contender(
        "onnxruntime",
        form,
        prepare,
        Session(session, values).run,
        tensors,
        build_s=seconds,
        load_s=load_s,
        bytes=file.stat().st_size,
    )


@dataclass(frozen=True)
class Session:
    """An inference session, which reads its weights where `values` hold them."""

    session: Any
    values: list[Any]

    def run(self, feed: dict[str, Any]) -> Any:
        return self.session.run(None, feed)


def write_model(subject: Subject, file: Path) -> float:
    """Export the model. Answers with the seconds that it took."""
    clock = Stopwatch()
    source = subject.source
    example, shapes = source.inputs(EXPORT_BATCH), source.shapes()
    label, (proto, constants) = first_export(source, Lowerable(source.graph, example, shapes))
    if subject.place.precision == "fp32":
        externalise(proto, constants)
    else:
        label = f"{label}, dynamic int8"
        proto, constants = quantised(proto, constants)
    torch.save((proto.SerializeToString(), dict(constants), label), file)
    return clock.read()


def first_export(source: Source, own: Lowerable) -> tuple[str, tuple[Any, dict[str, torch.Tensor]]]:
    """The model's own export or, where that holds a loop over rows, the export of grc's graph in plain operators.

    The peer then profits from grc's merged tables, which is the best form it can be given. Raises LoweringError with
    the reason of the model's own export when neither exports.
    """
    try:
        return "model's own export", onnx_model(own)
    except LoweringError as error:
        proof = Proof([source.inputs(size) for size in source.proof_batches()]).prepare(source.graph)
        graph, _ = run_passes(source.graph, pipeline(Options(), FUSIONS), proof)
        try:
            return f"grc's graph, plain ({error.message})", onnx_model(Lowerable(graph, own.inputs, own.shapes))
        except LoweringError:
            raise error from None
