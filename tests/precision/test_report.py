"""What the report has of fewer bits beside the sites: other parameters, distinct points and measured times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grc
from grc.cli.summary import time_rows
from grc.precision.others import find_others
from grc.report.summary import distinct, measured_times
from tests.precision.models import captured


class Odd(nn.Module):
    """A layer and tables beside parameters that no lower format is for."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(300, 16), nn.Embedding(300, 1)
        self.gru, self.conv = nn.GRU(16, 16, batch_first=True), nn.Conv1d(16, 16, 3, padding=1)
        self.steps, self.head = nn.Parameter(torch.randn(64, 8)), nn.Linear(16, 8)
        self.register_buffer("offsets", torch.tensor([0, 100, 200]))

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table(ids + self.offsets)
        fm = 0.5 * (rows.sum(1).pow(2) - rows.pow(2).sum(1)).sum(1)
        first = self.linear(ids + self.offsets).sum((1, 2))
        steps = self.conv(self.gru(rows)[0].transpose(1, 2)).mean(2)
        return self.head(steps).sum(1) + self.steps[ids[:, 0] % 64].sum(1) + fm + first


def odd_inputs(batch: int) -> tuple[Tensor]:
    return (torch.randint(100, (batch, 3), generator=torch.Generator().manual_seed(batch)),)


def test_parameters_that_are_no_sites_are_found_with_their_use() -> None:
    _, graph = captured(Odd(), odd_inputs)
    found = {other.name: (other.bytes, other.reason) for other in find_others(graph)}
    assert found == {
        "conv.weight": (3072, "no lower format for its use in conv1d"),
        "gru.weight_ih_l0": (3072, "no lower format for its use in gru"),
        "gru.weight_hh_l0": (3072, "no lower format for its use in gru"),
        "steps": (2048, "no lower format for its use in index"),
        "linear.weight": (1200, "no lower format for its use in bag_fm"),
    }


def test_weights_that_the_model_holds_in_16_bits_are_told_so() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1)).bfloat16()

    def inputs(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 32, generator=torch.Generator().manual_seed(batch)).bfloat16(),)

    (other,) = find_others(captured(model, inputs)[1])
    assert (other.name, other.bytes, other.reason) == ("0.weight", 4096, "the model holds it in bfloat16")


def point(count: int, error: float, chosen: bool = False) -> dict[str, Any]:
    return {"bytes": count, "work": 0.5, "quality": {"max-error": error}, "inside": True, "chosen": chosen}


def test_points_that_are_alike_are_one_and_the_chosen_one_stays() -> None:
    points = [point(400, 0.0), point(400, 0.0), point(200, 0.1), point(200, 0.1, chosen=True), point(200, 0.2)]
    assert distinct(points) == [points[0], points[3], points[4]]


def test_measured_times_stand_beside_float32() -> None:
    rows = [("inductor", 1, 80.0), ("inductor", 64, 350.0), ("inductor-float-layers", 64, 300.0), ("model", 1, 700.0)]
    manifest = {
        "measured": [{"engine": engine, "batch": batch, "p50_us": median} for engine, batch, median in rows],
        "parts": [{"engine": "inductor"}, {"engine": "inductor-float-layers"}],
        "choice": [{"up_to": 8, "part": 0}, {"up_to": 4096, "part": 1}],
    }
    assert list(time_rows(measured_times(manifest))) == [
        ("measured", "", "", "float32, eager"),
        ("batch 1", "inductor", "80 us", "700 us"),
        ("batch 64", "inductor-float-layers", "300 us", ""),
    ]


class Alike(nn.Module):
    """Two layers of one shape, the second of which a budget of 0.04 keeps in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        with torch.no_grad():
            self.second.weight[:, 0] *= 40

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_what_onnxruntime_keeps_in_float32_is_told(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the engine needs it")
    onnx = pytest.importorskip("onnx")

    def inputs(batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 64, generator=torch.Generator().manual_seed(batch)),)

    torch.manual_seed(0)
    options = grc.Options(
        tmp_path / "alike.grc", batches=(8,), precision="int8", budget=("max-error=0.04",), engine="onnxruntime"
    )
    artifact = grc.compile(Alike().eval(), inputs, options)
    sites = {site["name"]: site for site in artifact.manifest["precision"]["sites"]}
    proto = onnx.load(artifact.path / "parts" / "onnxruntime.onnx", load_external_data=False)
    held = [t.name for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    assert [sites[f"{name}.weight"]["format"] for name in ("first", "second")] == ["int8", "fp32"] and len(held) == 1
    assert sites["second.weight"]["reason"] == "bf16: the engine chosen keeps layers in fp32"
