"""An ONNX model for other runtimes: named inputs, a dynamic batch, weights beside the model, checked and compared."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from grc.errors import LoweringError, first_line
from grc.graph.capture import EXPORT_BATCH, Size, Source
from grc.graph.oracle import largest_error, within
from grc.lowering.choose import QUALITY
from grc.lowering.engine import Lowerable
from grc.lowering.onnxruntime import onnx_model
from grc.runtime.structure import leaf_names
from grc.runtime.weights import raw_chunks

FILE = "model.onnx"
WEIGHTS = "model.onnx.data"
ALIGNMENT = 4096  # bytes: external tensors that begin on a page can be memory-mapped (the ONNX format asks for no less)


def write_onnx(source: Source, graph: torch.fx.GraphModule, folder: Path) -> float | None:
    """Write model.onnx and its weights into `folder`, and check them with onnx's checker and strict shape inference.

    Returns the largest difference from the eager model, run by ONNX Runtime at two batch sizes; None where it is not
    installed. Raises LoweringError when the graph has no ONNX form, or the file is wrong.
    """
    absent = [m for m in ("onnx", "onnxscript") if importlib.util.find_spec(m) is None]
    if absent:
        raise LoweringError(f"{', '.join(absent)} not installed", "pip install 'grc-compiler[onnxruntime]'")
    import onnx

    proto, constants = onnx_model(Lowerable(graph, source.inputs(EXPORT_BATCH), source.shapes()))
    name_batch(proto, source)
    rename(proto, source)
    write_weights_file(proto, constants, folder / WEIGHTS)
    onnx.save_model(proto, str(folder / FILE))
    try:
        onnx.checker.check_model(str(folder / FILE), full_check=False)
        inferred = folder / "inferred.onnx"
        onnx.shape_inference.infer_shapes_path(str(folder / FILE), str(inferred), check_type=True, strict_mode=True)
        inferred.unlink()
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise LoweringError(f"the ONNX file is not valid: {first_line(error)}") from error
    return compare(source, folder / FILE) if importlib.util.find_spec("onnxruntime") else None


def rename(proto: Any, source: Source) -> None:
    """The model's own names instead of input_0 and output_0."""
    outputs = [name.removeprefix("output.") for name in leaf_names(source.out_structure, "output")]
    names = {f"input_{i}": name for i, name in enumerate(source.names)}
    names |= {f"output_{i}": name for i, name in enumerate(outputs) if name not in source.names}
    taken = {o for node in proto.graph.node for o in node.output} | {t.name for t in proto.graph.initializer}
    names = {old: new for old, new in names.items() if new not in taken}
    for values in (proto.graph.input, proto.graph.output, proto.graph.value_info):
        for value in values:
            value.name = names.get(value.name, value.name)
    for node in proto.graph.node:
        for slots in (node.input, node.output):
            for i, name in enumerate(slots):
                slots[i] = names.get(name, name)


def name_batch(proto: Any, source: Source) -> None:
    """`batch` instead of the exporter's symbol, wherever that symbol stands by itself or in an expression."""
    symbols = {
        dim.dim_param: "batch"
        for value, sizes in zip(proto.graph.input, source.sizes, strict=False)
        for dim, size in zip(value.type.tensor_type.shape.dim, sizes, strict=True)
        if dim.dim_param and size == Size(scale=1)
    }
    for values in (proto.graph.input, proto.graph.output, proto.graph.value_info):
        for value in values:
            for dim in value.type.tensor_type.shape.dim:
                for symbol, name in symbols.items():
                    if dim.dim_param:
                        dim.dim_param = dim.dim_param.replace(symbol, name)


def write_weights_file(proto: Any, constants: dict[str, torch.Tensor], path: Path) -> None:
    """Stream the large initialisers into one file, where there are any, and tell the model where each begins."""
    import onnx

    large = [tensor for tensor in proto.graph.initializer if tensor.name in constants]
    if not large:
        return
    with open(path, "wb") as file:
        for tensor in large:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            start = file.tell()
            for chunk in raw_chunks(constants[tensor.name]):
                file.write(chunk)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            del tensor.external_data[:]
            for key, value in (("location", path.name), ("offset", start), ("length", file.tell() - start)):
                tensor.external_data.add(key=key, value=str(value))


def compare(source: Source, path: Path) -> float:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in source.proof_batches():
        answers = answer(session, source.names, source.inputs(batch))
        worst = max(worst, largest_error(answers, source.eager(batch)))
    if not within(worst, 0.0, QUALITY):
        raise LoweringError(f"the ONNX model answers {worst:.1e} away from the model", "report the model to grc")
    return worst


def answer(session: Any, names: Sequence[str], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    wanted = {i.name for i in session.get_inputs()}
    given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True) if name in wanted}
    return [torch.from_numpy(out) for out in session.run(None, given)]
