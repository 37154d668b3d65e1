"""--precision from the command to an artifact that answers, is inspected and is checked again."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import grc
from grc.cli.app import app
from grc.precision.outcome import Lowered, outside
from grc.progress import Silent
from grc.runtime.artifact import read_manifest, write_manifest
from grc.runtime.golden import read_golden
from tests.precision.models import Fragile, Ranker, fragile_inputs, ranker_inputs, searched

pytestmark = pytest.mark.engine


class Recorder(Silent):
    """Keeps the names of the stages that begin."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def begin(self, name: str) -> None:
        self.begun.append(name)


MODEL = """\
import torch
from tests.precision.models import Ranker, ranker_inputs as get_inputs


def get_model():
    torch.manual_seed(0)
    return Ranker().eval()


def calibration():
    return [{"inputs": get_inputs(64), "labels": torch.arange(64) % 2}]
"""


def run(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("precision") / "ranker.py"
    file.write_text(MODEL)
    return file


@pytest.fixture(scope="module")
def artifact(model: Path) -> Path:
    path = model.parent / "int8.grc"
    code, out, err = run(
        "compile", model, "-o", path, "--precision", "int8", "--budget", "max-error=0.05,auc-drop=0.1", "--batches", "8",
        "--engine", "inductor",
    )  # fmt: skip
    assert code == 0, out + err
    return path


def test_answers_are_inside_of_the_budget_and_files_hold_no_table_of_floats(artifact: Path) -> None:
    program = grc.load(artifact)
    dense, ids = torch.randn(32, 8), torch.randint(300, (32, 2))
    torch.manual_seed(0)
    want = Ranker().eval()(dense, ids)
    got = program(dense, ids)
    assert 0 < (got - want).abs().max() <= 0.05
    assert program(dense[:0], ids[:0]).shape == (0,)
    dtypes = {str(tensor.dtype) for tensor in program.artifact.weights.values() if tensor.nbytes > 4096}
    assert "torch.float32" not in dtypes
    with pytest.raises(ValueError, match=r"has id 500 at row 3, column 1; table items\.weight has 500 rows"):
        ids[3, 1] = 500
        program(dense, ids)


def test_the_manifest_tells_the_whole_search(artifact: Path) -> None:
    found = read_manifest(artifact)["precision"]
    assert found["asked"] == "int8" and found["budget"] == ["max-error=0.05", "auc-drop=0.1"]
    assert found["calibration"]["labels"] is True and found["calibration"]["rows"] == 64
    assert {site["name"] for site in found["sites"]} == {"deep.weight", "head.weight", "users.weight", "items.weight"}
    assert found["trials"] > 4 and len(found["frontier"]) > 2
    path = found["path"]
    assert path[0]["rows"] == 64 and set(path[0]["tried"].values()) <= {"int8", "bf16"}
    assert all(step["outside"] is None or " of " in step["outside"] for step in path)
    lowered = {site["name"]: site["format"] for site in found["sites"] if site["format"] != "fp32"}
    assert path[-1] == {"tried": lowered, "rows": 64, "outside": None}


def test_inspect_shows_precision_by_layer(artifact: Path) -> None:
    _, out, _ = run("inspect", artifact)
    assert "precision: at most int8; max-error" in out and "64 rows of calibration()" in out
    (line,) = [line for line in out.splitlines() if line.split()[:3] == ["users.weight", "table", "int8"]]
    assert "19.2 KB -> 6.0 KB" in line


def test_the_report_plots_the_frontier(artifact: Path) -> None:
    page = (artifact / "report.html").read_text()
    for limit in ("max-error", "auc-drop"):
        assert f"{limit} against bytes" in page and f"{limit} against estimated work: elements × bits" in page
    assert "<h3>Measured time</h3>" in page
    assert page.count("<circle") > 8


def test_check_measures_the_quality_again(artifact: Path) -> None:
    code, out, err = run("check", artifact)
    assert code == 0, err
    assert "inductor on 64 of 64 calibration rows: max-error" in out and "of 0.05, auc-drop" in out
    manifest = read_manifest(artifact)
    kept = manifest["precision"]["budget"]
    try:
        manifest["precision"]["budget"] = ["max-error=1e-9"]
        write_manifest(artifact, manifest)
        code, _, err = run("check", artifact)
        assert code == 1 and "inductor has max-error" in err and "outside of max-error=1e-09" in err
    finally:
        manifest["precision"]["budget"] = kept
        write_manifest(artifact, manifest)


def test_where_nothing_was_lowered_there_is_nothing_to_measure_again(model: Path, tmp_path: Path) -> None:
    """A budget of nothing is below the rounding of a sum in another order."""
    path = tmp_path / "none.grc"
    words = ("--precision", "int8", "--budget", "max-error=0", "--batches", 8, "--engine", "inductor")
    assert run("compile", model, "-o", path, *words)[0] == 0
    assert not (path / "calibration.safetensors").exists()
    code, out, err = run("check", path, "--json")
    assert code == 0, err
    assert (json.loads(out)["calibrated"], json.loads(out)["calibration_rows"]) == ({}, 0)


class Layers(nn.Module):
    """Three layers and no table: what the quantisers of onnxruntime take."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def layer_inputs(batch: int) -> tuple[torch.Tensor]:
    return (torch.randn(batch, 32, generator=torch.Generator().manual_seed(batch)),)


@pytest.mark.parametrize("engine", ["onnxruntime", "onnxruntime-static"])
def test_the_quantisers_of_onnxruntime_are_held_to_the_same_budget(engine: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Layers().eval()
    options = grc.Options(
        tmp_path / "layers.grc", batches=(8,), precision="int8", budget=("max-error=0.05",), engine=engine
    )
    program = grc.load(grc.compile(model, layer_inputs, options).path)
    assert program.artifact.manifest["budget_quality"][engine]["max-error"] <= 0.05
    for batch in (1, 50):
        inputs = layer_inputs(batch)
        with torch.no_grad():
            want = model(*inputs)
        assert 0 < (program(*inputs) - want).abs().max() <= 0.1 * want.abs().max()


def test_layers_stay_in_float32_where_the_engine_keeps_them_so(tmp_path: Path) -> None:
    options = grc.Options(
        tmp_path / "tables.grc",
        batches=(8,),
        precision="int8",
        budget=("max-error=0.05",),
        engine="inductor-float-layers",
    )
    torch.manual_seed(0)
    program = grc.load(grc.compile(Ranker().eval(), ranker_inputs, options).path)
    sites = program.artifact.manifest["precision"]["sites"]
    assert {site["name"]: site["format"] for site in sites} == {
        "deep.weight": "fp32", "head.weight": "fp32", "users.weight": "int8", "items.weight": "int8",
    }  # fmt: skip
    assert (
        sites[0]["reason"] == "int8: the engine chosen keeps layers in fp32"
        and sites[0]["lowered_bytes"] == sites[0]["bytes"]
    )
    assert {str(t.dtype) for t in program.artifact.weights.values()} == {"torch.float32", "torch.uint8"}
    inputs = ranker_inputs(9)
    torch.manual_seed(0)
    assert 0 < (program(*inputs) - Ranker().eval()(*inputs)).abs().max() <= 0.05


def test_an_engine_that_lands_outside_is_built_again_with_less_lowered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every engine is judged as if it were half as far off again as the trial of it."""
    judge = Lowered.judge

    def strict(self: Lowered, run: Any) -> tuple[dict[str, float], str | None]:
        found = {name: 1.5 * loss for name, loss in judge(self, run)[0].items()}
        return found, outside(self.limits, found)

    torch.manual_seed(0)
    every = searched(Ranker().eval(), ranker_inputs, "int8", "max-error=0.5")
    limit = every.quality["max-error"] / 0.75  # a trial of everything in int8 is inside of 0.8 of it
    monkeypatch.setattr(Lowered, "judge", strict)
    told = Recorder()
    options = grc.Options(
        tmp_path / "again.grc", batches=(8,), precision="int8", budget=(f"max-error={limit}",), engine="inductor"
    )
    manifest = grc.compile(Ranker().eval(), ranker_inputs, options, told).manifest
    assert [name for name in told.begun if name in ("precision", "build")] == ["precision", "build"] * 2
    formats = {site["format"] for site in manifest["precision"]["sites"]}
    assert formats > {"int8"}
    assert manifest["budget_quality"]["inductor"]["max-error"] <= limit


def test_the_quality_told_is_that_of_the_engines_that_answer(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    (part,) = manifest["parts"]
    assert manifest["precision"]["quality"] == manifest["budget_quality"][part["engine"]]


def test_where_every_engine_lands_outside_the_artifact_is_of_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lowered, "judge", lambda self, run: ({"max-error": 0.6}, "max-error 0.6, of max-error=0.5"))
    torch.manual_seed(0)
    options = grc.Options(
        tmp_path / "none.grc", batches=(8,), precision="int8", budget=("max-error=0.5",), engine="inductor"
    )
    artifact = grc.compile(Ranker().eval(), ranker_inputs, options)
    found = artifact.manifest["precision"]
    assert {site["format"] for site in found["sites"]} == {"fp32"}
    assert {site["reason"] for site in found["sites"]} == {"int8: no engine is inside the budget"}
    assert found["notes"][-1].startswith("nothing could be lowered within the budget: engine inductor can't be used: ")
    assert found["quality"] == {"max-error": 0.0}
    assert {str(tensor.dtype) for tensor in grc.load(artifact.path).artifact.weights.values()} == {"torch.float32"}


HARMFUL = """\
import torch
from tests.precision.models import Fragile, fragile_inputs as get_inputs


def get_model():
    torch.manual_seed(0)
    return Fragile().eval()
"""


def test_a_head_that_8_bits_ruin_stays_in_float32_in_an_artifact(tmp_path: Path) -> None:
    """A tiny one, of two inputs whose difference is a thousandth of them."""
    file = tmp_path / "harmful.py"
    file.write_text(HARMFUL)
    options = grc.Options(tmp_path / "harmful.grc", batches=(8,), precision="int8", engine="inductor")
    artifact = grc.compile(file, options=options)
    sites = {site["name"]: site for site in artifact.manifest["precision"]["sites"]}
    assert (sites["body.weight"]["format"], sites["head.weight"]["format"]) == ("int8", "fp32")
    assert sites["head.weight"]["reason"].startswith("int8: max-error") and sites["head.weight"]["loss"] > 2
    assert artifact.manifest["precision"]["quality"]["max-error"] <= 0.02
    assert sites["head.weight"]["reason"] in html.unescape((artifact.path / "report.html").read_text())
    code, out, _ = run("inspect", artifact.path)
    (line,) = [line for line in out.splitlines() if line.split()[:2] == ["head.weight", "layer"]]
    assert code == 0 and "fp32" in line and "int8: max-error" in line
    inputs = fragile_inputs(32)
    torch.manual_seed(0)
    want = Fragile().eval()(*inputs)
    assert 0 < (grc.load(artifact.path)(*inputs) - want).abs().max() <= 0.02 * want.abs().max()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--precision", "fp8"), "error: no CPU has fp8"),
        (("--precision", "int8", "--budget", "speed=9"), "error: 'speed=9' is no limit of quality"),
        (("--precision", "int8", "--calibration", "none.npz"), "error: no calibration file at none.npz"),
        (("--precision", "int8", "--budget", "topk-overlap@5=0.9"), "error: no output ranks 5 items"),
    ],
)
def test_what_can_not_be_is_said(model: Path, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    code, out, err = run("compile", model, "-o", tmp_path / "x.grc", *words)
    assert code == 1 and out == ""
    assert message in err.splitlines()
    assert not list(tmp_path.iterdir())


def test_labels_that_are_asked_for_and_missing_are_named(tmp_path: Path) -> None:
    file = tmp_path / "plain.py"
    file.write_text(MODEL[: MODEL.index("\n\ndef calibration")])
    code, _, err = run("compile", file, "-o", tmp_path / "x.grc", "--precision", "int8", "--budget", "auc-drop=0.01")
    assert code == 1
    assert "error: auc-drop needs labels, and the calibration data (get_inputs) has none" in err.splitlines()


def test_json_holds_the_precision(artifact: Path) -> None:
    _, out, _ = run("inspect", artifact, "--json")
    assert json.loads(out)["precision"]["asked"] == "int8"


class BestItems(nn.Module):
    """Answers ids alone: near ties swap places where bits are saved."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(8, 50)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.topk(self.scores(x), 5).indices


def test_golden_requests_whose_ids_swap_places_pass_the_check(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = grc.Options(
        tmp_path / "ids.grc", engine="inductor", batches=(4,), precision="int8", budget=("max-error=1",)
    )

    def inputs(batch: int) -> tuple[torch.Tensor]:
        return (torch.randn(batch, 8, generator=torch.Generator().manual_seed(batch)),)

    artifact = grc.compile(BestItems().eval(), inputs, options)
    program = grc.load(artifact.path)
    differ = [golden for golden in read_golden(artifact) if not torch.equal(program(*golden.inputs), golden.outputs[0])]
    assert differ, "no ids swap places"
    code, out, _ = run("check", artifact.path)
    assert code == 0, out
