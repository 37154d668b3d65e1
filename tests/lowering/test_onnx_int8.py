"""ONNX Runtime's quantisers: layers that are to stay in float32 do, whichever operator the exporter writes them as."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from grc.compiler import optimise
from grc.graph.capture import capture
from grc.graph.model_file import from_module
from grc.kernels.cpp import target_isa
from grc.lowering.choose import load_built
from grc.lowering.engine import Lowerable, Target
from grc.lowering.onnx_int8 import OnnxRuntimeInt8, OnnxRuntimeStatic
from grc.options import Options
from grc.progress import Silent

pytest.importorskip("onnxruntime", reason="the engine needs it")


class Layers(nn.Module):
    """Over a matrix, exported as Gemm, and over steps, exported as MatMul and Add."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(32, 64), nn.Linear(64, 48), nn.Linear(48, 4)

    def forward(self, x: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        return self.third(self.second(self.first(x).relu()).relu()), self.second(self.first(steps).relu())


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 32), torch.randn(batch, 5, 32)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("low", [("first",), ("second", "third"), ("third",)], ids="+".join)
def test_only_the_named_layers_are_quantised(low: tuple[str, ...], static: bool, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    torch.manual_seed(0)
    model = Layers().eval()
    source = capture(from_module(model, inputs))
    lowerable = Lowerable(optimise(source, Options(), Silent()).graph, source.inputs(8), source.shapes())
    names = {str(n.target) for n in lowerable.graph.graph.nodes if n.op == "get_attr" and n.meta["val"].dim() > 1}
    chosen = {name: "int8" if name.split(".")[0] in low else "bf16" for name in names}
    engine = OnnxRuntimeStatic(chosen, [source.inputs(64)]) if static else OnnxRuntimeInt8(chosen)
    built = engine.build(lowerable, Target("cpu", target_isa(), 1), tmp_path)

    proto = onnx.load(tmp_path / built.file, load_external_data=False)
    kept = {tuple(t.dims) for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1}
    shapes = {"first": (64, 32), "second": (48, 64), "third": (4, 48)}
    assert {tuple(sorted(shape)) for shape in kept} == {tuple(sorted(shapes[name])) for name in low}
    run, given = load_built(built, tmp_path), inputs(7)
    for got, want in zip(run(list(given)), model(*given), strict=True):
        assert (got - want).abs().max() <= 0.2 * want.abs().max()


class Alike(nn.Module):
    """Weights of one shape, one of which is no layer's, beside a table."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.experts, self.table = nn.Parameter(torch.randn(3, 32, 32)), nn.Embedding(50, 32)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        x = self.second(self.first(x).tanh())
        return torch.einsum("bi,eij->bej", x.flatten(1)[:, :32] + self.table(ids), self.experts).sum(1)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("steps", [(), (5,)], ids=["Gemm", "MatMul"])
@pytest.mark.parametrize("low", ["first", "second"])
def test_of_layers_of_one_shape_only_the_named_one_is_quantised(
    low: str, steps: tuple[int, ...], static: bool, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    torch.manual_seed(0)
    model = Alike().eval()

    def alike(batch: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, *steps, 32), torch.randint(50, (batch,))

    source = capture(from_module(model, alike))
    lowerable = Lowerable(optimise(source, Options(), Silent()).graph, source.inputs(8), source.shapes())
    chosen = {f"{low}.weight": "int8"}
    engine = OnnxRuntimeStatic(chosen, [source.inputs(64)]) if static else OnnxRuntimeInt8(chosen)
    built = engine.build(lowerable, Target("cpu", target_isa(), 1), tmp_path)

    proto = onnx.load(tmp_path / built.file, load_external_data=False)
    (kept,) = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    numbers, weight = torch.from_numpy(onnx.numpy_helper.to_array(kept).copy()), getattr(model, low).weight
    likeness = [torch.corrcoef(torch.stack([numbers.flatten(), w.flatten()]))[0, 1] for w in (weight, weight.t())]
    assert max(likeness) > 0.9
