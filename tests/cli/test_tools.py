"""inspect, explain, opt, check, export-onnx, doctor, help, and the HTML report."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from grc.cli.host import TORCH
from grc.cli.summary import show_changes
from grc.graph.match import Miss
from grc.report.html import render
from grc.report.summary import size, summarise
from grc.runtime.artifact import read_manifest
from grc.runtime.version import VERSION
from tests.cli.session import MODEL, Grc, Ran, refused

ROOT = Path(__file__).resolve().parents[2]


def test_inspect_shows_interface_layers_engines_and_files(grc: Grc, compiled: tuple[Path, Ran]):
    ran = grc("inspect", compiled[0])
    rows = [line.split() for line in ran.out.splitlines()]
    assert (ran.code, ran.err) == (0, "")
    assert ["dense", "float32", "[batch,", "3]"] in rows
    assert ["ids", "column", "1", "80", "rows", "items.weight"] in rows
    assert ["layers:", "1,060", "parameters,", "4.2", "KB,", "38", "FLOPs", "a", "row"] in rows
    assert ["items.weight", "table", "80x8", "2.6", "KB"] in rows
    assert any(row[:1] == ["eager"] and row[2].endswith("us*") for row in rows)
    assert {"graph.txt", "report.html", "weights.safetensors"} <= {row[0] for row in rows if row}


def test_inspect_gives_scripts_the_manifest(grc: Grc, compiled: tuple[Path, Ran]):
    told = json.loads(grc("inspect", compiled[0], "--json").out)
    assert told["refused"] is None
    assert told["inputs"] == read_manifest(compiled[0])["inputs"]
    assert told["bytes"] == sum(f.stat().st_size for f in compiled[0].rglob("*") if f.is_file())


def test_explain_tells_what_fuses_without_building(grc: Grc, model: Path):
    ran = grc("explain", model, "--print-graph")
    lines = ran.out.splitlines()
    assert ran.code == 0
    assert lines[1].split() == ["fused", "where", "saves"]
    assert "tiny.py:13" in lines[2]
    assert any("grc.lookup(%arena" in line for line in lines)
    assert "build" not in ran.err


def test_explain_tells_what_the_trace_does_not_hold_for(grc: Grc, model_file: Callable[[str], Path]):
    branch = "        if ids.shape[0] > 50:\n            dense = -dense\n"
    file = model_file(MODEL.replace("        both = ", f"{branch}        both = "))
    note = "the batch is up to 50, and a larger request is refused"
    assert grc("explain", file).told[-1] == f"note: {note}"
    assert json.loads(grc("explain", file, "--json").out)["notes"] == [note]


def test_explain_tells_why_something_misses(
    grc: Grc, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class Picky:
        name = "picky"
        anchors = (torch.ops.aten.sigmoid,)

        def fuse(self, edit, node):
            raise Miss("width 1 is not a multiple of 4")

    monkeypatch.setattr("grc.compiler.FUSIONS", (Picky(),))
    told = json.loads(grc("explain", model, "--json").out)
    (missed,) = told["missed"]
    assert (missed["what"], missed["where"]) == ("picky", "tiny.py:14")
    assert missed["source"] == "return torch.sigmoid(self.top(both)).squeeze(1)"
    assert missed["missed"] == "width 1 is not a multiple of 4"
    show_changes({**told, "fused": []})
    title, line = capsys.readouterr().out.splitlines()[1:]
    assert title.split() == ["missed", "where", "why"]
    assert line.startswith("  picky   tiny.py:14  return torch.sigmoid(")
    assert line.endswith("  width 1 is not a multiple of 4")


def test_opt_prints_the_graph_that_the_passes_leave(grc: Grc, model: Path):
    merged = grc("opt", model, "--passes", "normalise,merge-tables", "--verify", "end")
    plain = grc("opt", model, "--passes", "normalise")
    assert (merged.code, plain.code) == (0, 0)
    assert "grc.lookup(" in merged.out
    assert "grc.lookup(" not in plain.out
    assert plain.out.count("aten.embedding(") == 2
    assert merged.out.splitlines()[-1].startswith("return [%")


def test_opt_prints_after_a_pass_on_stderr_and_times_it(grc: Grc, model: Path):
    ran = grc("opt", model, "--print-after", "all", "--timing")
    shown = re.findall(r"^// after (\S+)$", ran.err, re.M)
    assert {"normalise", "merge-tables", "fuse"} <= set(shown)
    assert re.search(r"^  merge-tables +1 +\d+\.\d+ +\d+\.\d+$", ran.err, re.M)


def test_opt_stops_at_the_bisect_limit(grc: Grc, model: Path):
    assert grc("opt", model, "--bisect-limit", "0").out.count("aten.embedding(") == 2
    assert "aten.embedding(" not in grc("opt", model).out


def test_opt_proves_at_the_end_too(grc: Grc, model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("grc.passes.manager.Proof.check", lambda self, graph: (1.0, "wrong" if self.inputs else None))
    ran = grc("opt", model, "--verify", "end")
    assert ran.code == 1
    assert ran.told == [
        "error: the passes together: wrong",
        "hint: find the one to blame with --verify each, or --bisect-limit",
    ]


def test_opt_counts_no_change_that_is_rolled_back(grc: Grc, model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("grc.passes.manager.Proof.check", lambda self, graph: (1.0, "wrong"))
    ran = grc("opt", model, "--passes", "merge-tables")
    (line,) = [line for line in ran.err.splitlines() if line.startswith("  passes ")]
    assert "no pass changed anything" in line
    assert "  rolled back merge-tables: wrong" in ran.err.splitlines()


def test_opt_refuses_an_unknown_pass(grc: Grc, model: Path):
    ran = grc("opt", model, "--passes", "normalise,polish")
    assert ran.told[0] == "error: there is no pass polish"
    assert ran.code == 1


def test_check_replays_every_part_and_the_routing(grc: Grc, compiled: tuple[Path, Ran]):
    ran = grc("check", compiled[0])
    assert (ran.code, ran.err) == (0, "")
    assert "4 golden requests replayed" in ran.out
    assert [line.split()[0] for line in ran.out.splitlines()[1:]] == ["eager", "routing"]
    told = json.loads(grc("check", compiled[0], "--json").out)
    assert [part["ok"] for part in told["parts"]] == [True, True]
    assert all(part["error"] < 1e-5 for part in told["parts"])


@pytest.mark.engine
def test_export_onnx_writes_a_valid_model_with_a_dynamic_batch(grc: Grc, model: Path, tmp_path: Path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    output = tmp_path / "onnx"
    ran = grc("export-onnx", model, "-o", output, "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert [file.name for file in output.iterdir()] == ["model.onnx"]  # its weights are small enough to be in the file
    graph = onnx.load(told["path"], load_external_data=False).graph
    dims = [[d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input]
    assert [i.name for i in graph.input] == ["dense", "ids"]
    assert dims == [["batch", 3], ["batch", 2]]
    assert [o.name for o in graph.output] == ["output"]
    assert all(node.domain in ("", "ai.onnx") for node in graph.node)
    if told["error"] is not None:
        assert told["error"] < 1e-5
    refused(
        grc("export-onnx", model, "-o", output),
        f"error: {output} exists",
        "hint: choose another -o, or replace it with --force",
    )


@pytest.mark.engine
def test_export_onnx_keeps_large_weights_beside_the_model(
    grc: Grc, model: Path, model_file: Callable[[str], Path], tmp_path: Path
):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    output = tmp_path / "onnx"
    ran = grc("export-onnx", model_file(model.read_text().replace("(80, 8)", "(9000, 8)")), "-o", output)
    assert ran.code == 0, ran.err
    assert sorted(file.name for file in output.iterdir()) == ["model.onnx", "model.onnx.data"]
    graph = onnx.load(str(output / "model.onnx"), load_external_data=False).graph
    outside = [tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert len(outside) == 1 and (output / "model.onnx.data").stat().st_size == 4 * 8 * 9050


def test_doctor_names_every_engine_and_how_to_get_it(grc: Grc):
    found = json.loads(grc("doctor", "--json").out)
    engines = {name for name, finding in found.items() if finding["kind"] == "engine"}
    assert engines >= {"inductor", "aoti", "onnxruntime", "eager", "inductor on cuda", "aoti on cuda", "eager on cuda"}
    assert found["eager"]["usable"]
    assert {"torch", "c++", "cpu", "threads", "huge pages", "gpu", "triton", "tritonserver"} <= set(found)
    lines = grc("doctor").out.splitlines()
    assert len(lines) == len(found)


def test_doctor_tells_how_to_mend_a_host_without_a_compiler(grc: Grc, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = json.loads(grc("doctor", "--json").out)
    assert found["c++"] == {
        "kind": "software",
        "name": "c++",
        "usable": False,
        "detail": "no C++ compiler: no-such-compiler is not on PATH",
        "command": "apt-get install g++",
    }
    assert not found["inductor"]["usable"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the engines are usable on a GPU host")
def test_doctor_tells_why_there_are_no_engines_on_a_gpu(grc: Grc):
    found = json.loads(grc("doctor", "--json").out)
    for name in ("inductor on cuda", "aoti on cuda", "eager on cuda"):
        assert not found[name]["usable"]
        assert found[name]["detail"] == f"needs a GPU: {found['gpu']['detail']}"


def test_doctor_knows_the_range_of_torch(grc: Grc):
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (low, high) = (".".join(map(str, version)) for version in TORCH)
    assert f"torch>={low},<{high}" in required


def test_version_and_help(grc: Grc):
    assert grc("--version").out == f"grc {VERSION}\n"
    for command in (
        "compile",
        "run",
        "inspect",
        "explain",
        "opt",
        "check",
        "export-onnx",
        "export-triton",
        "doctor",
        "bench",
    ):
        ran = grc(command, "--help")
        assert ran.code == 0
        assert f"grc {command}" in ran.out
    assert "compile" in grc("--help").out
    assert grc("compil").code == 2


def test_the_report_is_one_page_that_fetches_nothing(compiled: tuple[Path, Ran]):
    page = (compiled[0] / "report.html").read_text()
    for title in ("Stages", "Fused", "Missed", "Measured", "Quality", "Layers"):
        assert f"<h2>{title}</h2>" in page
    assert "both = torch.cat([self.users(ids[:, 0])" in page
    assert "<svg" in page
    assert page.count("<rect") == 2  # the engine and the model
    assert not re.search(r"(src|href)=|https?://", page)


def test_the_report_escapes_what_the_user_wrote(compiled: tuple[Path, Ran]):
    manifest = read_manifest(compiled[0])
    manifest["name"] = "<script>alert(1)</script>"
    manifest["rejected"] = {"onnxruntime": "a < b"}
    page = render(manifest)
    assert "<script>" not in page
    assert "a &lt; b" in page


def test_the_summary_compares_with_plain_aotinductor(compiled: tuple[Path, Ran]):
    manifest = read_manifest(compiled[0])
    manifest["measured"] = [
        {"engine": "eager", "batch": 4, "p50_us": 50.0},
        {"engine": "aoti", "batch": 4, "p50_us": 100.0},
        {"engine": "model", "batch": 4, "p50_us": 200.0},
    ]
    assert summarise(manifest)["speed"] == {"batch": 4, "eager": 4.0, "aotinductor": 2.0}


def test_sizes_have_three_digits():
    assert [size(n) for n in (0, 999, 1000, 99_949, 668_000_000, 3.5e12)] == [
        "0 B", "999 B", "1.0 KB", "99.9 KB", "668 MB", "3.5 TB",
    ]  # fmt: skip


def test_grc_is_on_the_path_of_an_installed_package():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"grc": "grc.cli:main"}
