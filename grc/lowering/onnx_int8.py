"""ONNX Runtime in int8: onnxruntime's own quantisers on the exported graph, a scale for each column of a weight."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from grc.errors import LoweringError
from grc.graph.match import attribute
from grc.lowering.engine import Built, Lowerable, Target
from grc.lowering.onnxruntime import FILE, INLINE, OnnxRuntime, externalise, onnx_model

PRODUCTS = ["MatMul", "Gemm"]
LARGEST = 1 << 30  # bytes: the quantiser holds the whole model in one protobuf, whose limit is 2 GiB


class OnnxRuntimeInt8(OnnxRuntime):
    """`formats` names the weights that may be kept in int8; the others stay in float32. Activations are quantised as they
    come."""

    def __init__(self, formats: Mapping[str, str]):
        self.formats = formats

    def missing(self, target: Target) -> str | None:
        if "int8" not in self.formats.values():
            return "no layer is kept in int8, the only format of its own quantiser"
        return super().missing(target)

    def build(self, lowerable: Lowerable, target: Target, folder: Path) -> Built:
        if any(n.op == "get_attr" and n.meta["val"].dtype is torch.uint8 for n in lowerable.graph.graph.nodes):
            raise LoweringError("it would need a float32 copy of the tables that are kept in fewer bits")
        proto, constants = onnx_model(lowerable)
        file = f"{self.name}.onnx"
        excluded = other_products(proto, constants, lowerable.graph, self.formats)
        proto, constants = quantised(proto, constants, excluded, self.quantise, file)
        (folder / file).write_bytes(proto.SerializeToString())
        return Built(self.name, file, constants)

    def quantise(self, before: Path, after: Path, excluded: list[str]) -> None:
        dynamically(before, after, excluded, PRODUCTS)


class OnnxRuntimeStatic(OnnxRuntimeInt8):
    """Activations are quantised by scales that calibration data tell, in QDQ form: no range is sought while it runs."""

    name = "onnxruntime-static"

    def __init__(self, formats: Mapping[str, str], batches: Sequence[Sequence[torch.Tensor]]):
        super().__init__(formats)
        self.batches = batches

    def quantise(self, before: Path, after: Path, excluded: list[str]) -> None:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        quantize_static(
            str(before),
            str(after),
            reader(self.batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=PRODUCTS,
            per_channel=True,
            reduce_range=narrow(),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=excluded,
        )


def reader(batches: Sequence[Sequence[torch.Tensor]]) -> Any:
    """The calibration data as onnxruntime's quantiser takes them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {f"input_{i}": tensor.numpy() for i, tensor in enumerate(batch)}

    return Reader()


def dynamically(before: Path, after: Path, excluded: list[str], kinds: list[str] | None = None) -> None:
    """With operators of all kinds that it knows, or of `kinds`."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        str(before), str(after), weight_type=QuantType.QInt8, per_channel=True, reduce_range=narrow(),
        nodes_to_exclude=excluded, op_types_to_quantize=kinds,
    )  # fmt: skip


def narrow() -> bool:
    """Whether weights must do with 7 bits: without VNNI, pairs of products are added in 16 bits, which 8 would overflow."""
    return not torch.cpu._is_vnni_supported()


def other_products(
    proto: Any, constants: Mapping[str, torch.Tensor], graph: fx.GraphModule, formats: Mapping[str, str]
) -> list[str]:
    """The products that stay in float32: those of activations, and those with a weight that is not kept in int8. The exporter
    leaves a weight its name, but where it stores it transposed."""
    import onnx

    weights = {str(n.target): w for n in graph.graph.nodes if (w := attribute(graph, n)) is not None}
    low = {name for name in weights if formats.get(name) == "int8"}
    for tensor in proto.graph.initializer:
        if tensor.name not in weights and len(tensor.dims) == 2:
            values = constants.get(tensor.name)
            values = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) if values is None else values
            if any(torch.equal(values, weights[name].t()) for name in low & weights.keys()):
                low.add(tensor.name)
    return [
        name
        for node in proto.graph.node
        if node.op_type in PRODUCTS and low.isdisjoint(node.input)
        for name in (node.name, f"{node.name}_MatMul")  # what the dynamic quantiser makes of a Gemm
    ]


def quantised(
    proto: Any,
    constants: dict[str, torch.Tensor],
    excluded: Sequence[str] = (),
    quantise: Callable[[Path, Path, list[str]], None] = dynamically,
    file: str = FILE,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model with int8 weights and activations, and its initialisers outside again. Nodes whose names are `excluded` stay
    as they are.

    Raises LoweringError for a model too large for the quantiser.
    """
    import onnx

    total = sum(tensor.nbytes for tensor in constants.values())
    if total > LARGEST:
        raise LoweringError(f"{total >> 20} MB of weights are too many for onnxruntime's quantiser")
    for tensor in proto.graph.initializer:
        if tensor.name in constants:
            tensor.ClearField("external_data")
            tensor.data_location = onnx.TensorProto.DEFAULT
            tensor.raw_data = constants[tensor.name].detach().contiguous().numpy().tobytes()
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
        before.write_bytes(proto.SerializeToString())
        logging.disable(logging.WARNING)
        try:
            quantise(before, after, list(excluded))
        finally:
            logging.disable(logging.NOTSET)
        made = onnx.load(str(after))
    outside = {
        tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
        for tensor in made.graph.initializer
        if len(tensor.raw_data) > INLINE
    }
    externalise(made, outside, file)
    return made, outside
