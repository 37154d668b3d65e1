"""ONNX Runtime: the graph exported with fused ops in plain form; weights stay outside of the ONNX file."""

from __future__ import annotations

import importlib.util
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from grc.errors import LoweringError, first_line
from grc.graph.flat import quiet_export
from grc.lowering.engine import Built, Lowerable, Target
from grc.lowering.export import plain_program

FILE = "model.onnx"  # initialisers point at the file itself: ONNX Runtime wants a path that exists, and reads none
# Bytes: smaller constants stay in the file, where shape inference and constant folding read them. ONNX Runtime folds masks
# and biases of attention (160 KB in HSTU) and looks for them in the file alone.
INLINE = 256 * 1024


NOWHERE = 1 << 40  # an offset past the end of every file: what reads a weight there fails, and folds no other bytes


class OnnxRuntime:
    name = "onnxruntime"

    def missing(self, target: Target) -> str | None:
        if target.device != "cpu":
            return "only its CPU provider is used"
        absent = [m for m in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(m) is None]
        return f"{', '.join(absent)} not installed: pip install 'grc-compiler[onnxruntime]'" if absent else None

    def build(self, lowerable: Lowerable, target: Target, folder: Path) -> Built:
        proto, constants = onnx_model(lowerable)
        externalise(proto, constants)
        (folder / FILE).write_bytes(proto.SerializeToString())
        return Built(self.name, FILE, constants)


def onnx_model(lowerable: Lowerable) -> tuple[Any, dict[str, torch.Tensor]]:
    """The graph as an ONNX ModelProto with empty large initialisers, and those initialisers as tensors."""
    program = plain_program(lowerable)
    try:
        with quiet(), torch.no_grad(), quiet_export():
            exported = torch.onnx.export(program, dynamo=True, verbose=False, optimize=True)
    except Exception as error:
        raise LoweringError(f"torch.onnx can't export the graph: {first_reason(error)}") from error
    assert exported is not None
    model = exported.model
    constants: dict[str, torch.Tensor] = {}
    for name, value in model.graph.initializers.items():
        array = value.const_value
        if array is not None and array.nbytes > INLINE:
            constants[name] = as_tensor(array)
    rename_inputs(model)
    for node in model.graph.all_nodes():
        if node.op_type in ("Scan", "Loop"):
            raise LoweringError(f"the ONNX graph holds a {node.op_type}, which runs one row at a time")
    import onnx_ir

    empty = {name: model.graph.initializers[name].const_value for name in constants}
    for name in constants:
        value = model.graph.initializers[name]
        value.const_value = onnx_ir.ExternalTensor(
            FILE, 0, empty[name].nbytes, empty[name].dtype, shape=empty[name].shape, name=name
        )
    return onnx_ir.to_proto(model), constants


def rename_inputs(model: Any) -> None:
    """`input_0`, `input_1`, ...: the order survives where the exporter drops an input that nothing reads."""
    for index, value in enumerate(model.graph.inputs):
        value.name = f"input_{index}"
    for index, value in enumerate(model.graph.outputs):
        if not value.is_graph_input():
            value.name = f"output_{index}"


def as_tensor(array: Any) -> torch.Tensor:
    raw = getattr(array, "raw", None)
    if isinstance(raw, torch.Tensor):
        return raw.detach().contiguous()
    return torch.from_numpy(array.numpy()).contiguous()


def externalise(proto: Any, constants: dict[str, torch.Tensor], file: str = FILE) -> None:
    """Point large initialisers outside of the file; the runtime hands over the memory-mapped weights by name."""
    import onnx

    for tensor in proto.graph.initializer:
        if tensor.name in constants:
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            del tensor.external_data[:]
            tensor.external_data.add(key="location", value=file)
            tensor.external_data.add(key="offset", value=str(NOWHERE))


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter prints its progress; grc shows its own."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        logging.disable(logging.NOTSET)


def first_reason(error: BaseException) -> str:
    """The innermost cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
