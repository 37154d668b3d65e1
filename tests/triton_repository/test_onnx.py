"""An artifact that needs no more than ONNX Runtime becomes a model of Triton's own backend; every other says why not."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grc
from grc.errors import ArtifactError, GrcError
from grc.runtime.artifact import Artifact, read_manifest
from grc.runtime.golden import Golden, read_golden
from grc.runtime.triton_repository import config as configurations
from grc.runtime.triton_repository import launcher, onnx_model
from grc.runtime.triton_repository.export import export
from grc.runtime.triton_repository.replay import verify
from grc.runtime.triton_repository.settings import Settings
from grc.runtime.triton_repository.tensors import interface
from tests.cli.conftest import grc as command  # noqa: F401  (the command line as a function)
from tests.cli.session import Grc
from tests.triton_repository.test_config import config, ports

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed: pip install 'grc-compiler[triton]'")
onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'grc-compiler[onnxruntime]'")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'grc-compiler[onnxruntime]'")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'grc-compiler[onnxruntime]'")
pytestmark = pytest.mark.engine


class Click(nn.Module):
    """A table that is large enough to lie outside of the ONNX file, and answers of both shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(10_000, 16)
        self.top = nn.Linear(19, 4)

    def forward(self, dense: Tensor, item: Tensor) -> dict[str, Tensor]:
        parts = self.top(torch.cat([self.items(item), dense], 1))
        return {"parts": parts, "click": torch.sigmoid(parts.sum(1))}


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, generator=make), torch.randint(10_000, (batch,), generator=make)


@pytest.fixture(scope="module")
def click(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    output = tmp_path_factory.mktemp("click") / "click.grc"
    options = grc.Options(output=output, engine="onnxruntime", batches=(1, 8), max_batch=64, on_bad_id="zero")
    grc.compile(Click().eval(), inputs, options)
    return output


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "find", lambda: None)


@pytest.fixture
def wheels_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server with the Python backend alone, as that of the pytriton wheel."""
    (tmp_path / "backends/python").mkdir(parents=True)
    found = launcher.Installation(tmp_path / "tritonserver", tmp_path / "backends", tmp_path / "caches")
    monkeypatch.setattr(launcher, "find", lambda: found)


def test_the_model_is_tritons_own(click: Path, tmp_path: Path, no_server: None) -> None:
    made = export(click, tmp_path / "repo")
    assert (made.record["backend"], made.record["backend_reason"]) == (
        "onnxruntime",
        "ONNX Runtime answers every batch, and nothing needs our runtime",
    )
    found = config(made, "click")
    assert (found.platform, found.backend, found.max_batch_size) == ("onnxruntime_onnx", "onnxruntime", 64)
    assert ports(found.input) == [("dense", "TYPE_FP32", [3]), ("item", "TYPE_INT64", [1])]
    assert ports(found.output) == [("parts", "TYPE_FP32", [4]), ("click", "TYPE_FP32", [1])]
    assert [tensor.HasField("reshape") for tensor in (*found.input, *found.output)] == [False, True, False, True]
    assert found.HasField("dynamic_batching") and found.model_warmup
    assert sorted(file.name for file in (made.path / "click/1").iterdir()) == ["model.onnx", "weights.safetensors"]
    assert (made.path / "click/1/model.onnx").stat().st_size < 100_000


def test_the_file_answers_by_the_models_own_names(click: Path, tmp_path: Path, no_server: None) -> None:
    import onnxruntime

    made = export(click, tmp_path / "repo")
    moved = (made.path / "click").rename(tmp_path / "moved") / "1/model.onnx"
    onnx.checker.check_model(str(moved))
    session = onnxruntime.InferenceSession(str(moved), providers=["CPUExecutionProvider"])
    given = dict(zip(("dense", "item"), (t.numpy() for t in inputs(7)), strict=True))
    parts, score = session.run(["parts", "click"], given)
    own = grc.load(click)(*inputs(7))
    torch.testing.assert_close(torch.from_numpy(parts), own["parts"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.from_numpy(score), own["click"], rtol=1e-5, atol=1e-6)


def test_a_file_that_answers_otherwise_is_not_written(
    click: Path, tmp_path: Path, no_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(artifact: Artifact) -> list[Golden]:
        return [Golden(g.inputs, [out + 1 for out in g.outputs]) for g in read_golden(artifact)]

    exporting = importlib.import_module("grc.runtime.triton_repository.export")  # its name is also the function's
    monkeypatch.setattr(exporting, "independent", lambda *_: True)
    monkeypatch.setattr(exporting, "read_golden", other)
    with pytest.raises(ArtifactError) as caught:
        export(click, tmp_path / "repo")
    assert caught.value.message.startswith("model.onnx answers a golden request ")
    assert caught.value.message.endswith(" away from the model")
    assert list(tmp_path.iterdir()) == []


def test_a_server_without_the_backend_gets_the_python_one(click: Path, tmp_path: Path, wheels_server: None) -> None:
    made = export(click, tmp_path / "repo")
    assert (made.record["backend"], made.record["backend_reason"]) == (
        "python",
        "the tritonserver of this host has no onnxruntime backend",
    )
    assert config(made, "click").backend == "python"
    asked = export(click, tmp_path / "asked", backend="onnxruntime")
    assert (asked.record["backend"], asked.record["backend_reason"]) == ("onnxruntime", "as asked")
    with pytest.raises(GrcError) as caught:
        verify(asked, click)
    assert caught.value.message == "the tritonserver of this host has no onnxruntime backend"
    assert caught.value.hint == "export with --backend python"


def change(**entries: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda manifest: {**manifest, **entries}


def other_engine(manifest: dict[str, Any]) -> dict[str, Any]:
    parts = [*manifest["parts"], {**manifest["parts"][0], "engine": "inductor"}]
    choice = [{"up_to": 8, "part": 0}, {"up_to": None, "part": len(parts) - 1}]
    return {**manifest, "parts": parts, "choice": choice}


def jagged(manifest: dict[str, Any]) -> dict[str, Any]:
    first, second = manifest["inputs"]
    return {**manifest, "inputs": [first, {**second, "sizes": ["batch", "n0"]}]}


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (other_engine, "it is answered by onnxruntime and inductor"),
        (
            change(on_bad_id="error", ids=[{"input": 1}]),
            "its ids must be checked: compile with --on-bad-id zero to have that in the graph",
        ),
        (change(batch={"min": 2, "max": 64, "capped": False, "dynamic": True}), "batches below 2 are padded"),
        (jagged, "item has a size beside the batch that varies"),
    ],
)
def test_what_needs_our_runtime_stays_with_it(
    click: Path, no_server: None, edit: Callable[[dict[str, Any]], dict[str, Any]], reason: str
) -> None:
    manifest = edit(read_manifest(click))
    assert onnx_model.choose(manifest, interface(manifest), Settings()) == ("python", reason)
    with pytest.raises(ArtifactError) as caught:
        onnx_model.choose(manifest, interface(manifest), Settings(backend="onnxruntime"))
    assert caught.value.message == f"Triton's onnxruntime backend can't run this artifact: {reason}"
    assert caught.value.hint == "export with --backend python"
    assert onnx_model.choose(manifest, interface(manifest), Settings(backend="python")) == ("python", "as asked")


def test_stages_stay_with_our_runtime(click: Path, no_server: None) -> None:
    manifest = read_manifest(click)
    told = onnx_model.choose(manifest, interface(manifest), Settings(layout="stages"))
    assert told == ("python", "stages run on our runtime")


def test_the_command_says_which_backend_and_why(command: Grc, click: Path, tmp_path: Path, no_server: None) -> None:  # noqa: F811
    ran = command("export-triton", click, "-o", tmp_path / "repo", "--backend", "python")
    assert ran.out.splitlines()[0] == "  backend python: as asked"


@pytest.mark.parametrize(("device", "kind"), [("cuda", "KIND_GPU"), ("cpu", "KIND_CPU")])
def test_instances_are_where_the_artifact_was_built_for(click: Path, device: str, kind: str) -> None:
    shapes = interface(read_manifest(click))
    found = configurations.program("click", shapes, Settings(instances=2), device)
    (group,) = found.instance_group
    assert (configurations.messages().ModelInstanceGroup.Kind.Name(group.kind), group.count) == (kind, 2)
