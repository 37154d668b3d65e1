"""grc compile: one screen of story, its summary as JSON, its flags, and its errors."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from grc import Artifact, Program
from grc.errors import ArtifactError, LoweringError
from grc.lowering.eager import Eager
from grc.passes.pipeline import NAMES
from grc.report.summary import summarise
from grc.runtime.artifact import writing
from grc.runtime.triton_repository.slices import write_stage
from tests.cli.conftest import idle_host
from tests.cli.session import Grc, Ran, refused

QUICK = ("--engine", "eager", "--batches", "4")


def test_tells_its_stages_on_stderr_and_its_results_on_stdout(compiled: tuple[Path, Ran]):
    path, ran = compiled
    stages = [line.split()[0] for line in ran.err.splitlines() if re.search(r"\d s$", line)]
    assert stages == ["capture", "passes", "build", "measure", "write"]
    lines = ran.out.splitlines()
    assert lines[0] == ""
    assert lines[1].split() == ["fused", "where", "saves"]
    assert "2 look-ups of 2 tables -> 1" in lines[2]
    assert "tiny.py:13  both = torch.cat([self.users(ids[:, 0])" in lines[2]
    assert lines[-2].startswith(f"  {path}   ")
    assert "x eager at batch 4   largest error " in lines[-2]
    assert lines[-1] == f"  try: grc run {path} --example"


def test_timing_tells_the_cost_of_each_pass(compiled: tuple[Path, Ran]):
    rows = [line.split() for line in compiled[1].err.splitlines()]
    assert ["pass", "changes", "pass", "s", "proof", "s"] in rows
    (merge,) = [row for row in rows if row[0] == "merge-tables"]
    assert merge[1] == "1"
    assert float(merge[2]) >= 0


def test_json_is_the_summary_and_nothing_else(
    grc: Grc, model: Path, artifact_path: Path, monkeypatch: pytest.MonkeyPatch
):
    idle_host(monkeypatch)
    ran = grc("compile", model, "-o", artifact_path, *QUICK, "--json")
    summary = json.loads(ran.out)
    assert ran.code == 0
    assert summary["path"] == str(artifact_path)
    assert [stage["name"] for stage in summary["stages"]] == ["capture", "passes", "build", "measure", "write"]
    assert [change["where"] for change in summary["fused"]] == ["tiny.py:13"]
    assert summary["speed"]["batch"] == 4
    assert summary["speed"]["eager"] > 0
    assert summary["engines"][0]["engine"] == "eager"
    assert 0 <= summary["error"] < 1e-5


@pytest.mark.parametrize("largest", [1, 3])
def test_golden_requests_fit_the_largest_batch(grc: Grc, model: Path, artifact_path: Path, largest: int):
    flags = ("--engine", "eager", "--batches", "1", "--max-batch", str(largest))
    assert grc("compile", model, "-o", artifact_path, *flags).code == 0
    assert grc("check", artifact_path).code == 0


def test_a_disabled_pass_leaves_the_tables_apart(grc: Grc, model: Path, artifact_path: Path):
    ran = grc("compile", model, "-o", artifact_path, *QUICK, "--disable", "merge-tables", "--json")
    assert json.loads(ran.out)["fused"] == []
    assert "arena" not in (artifact_path / "graph.txt").read_text()


def test_print_after_shows_the_graph_between_two_passes(grc: Grc, model: Path, artifact_path: Path):
    ran = grc("compile", model, "-o", artifact_path, *QUICK, "--print-after", "merge-tables", "--json")
    _, _, shown = ran.err.partition("// after merge-tables\n")
    assert "grc.lookup(%arena" in shown
    assert json.loads(ran.out)["path"] == str(artifact_path)


def test_a_rolled_back_pass_is_told(grc: Grc, model: Path, artifact_path: Path, monkeypatch: pytest.MonkeyPatch):
    break_pass(monkeypatch)
    ran = grc("compile", model, "-o", artifact_path, *QUICK)
    assert ran.code == 0
    assert any(line.split()[:2] == ["rolled", "back"] for line in ran.out.splitlines())
    assert any("against fp64" in line and "broken" in line for line in ran.out.splitlines())


def test_what_is_told_to_try_next_can_be_run(
    grc: Grc, model: Path, artifact_path: Path, monkeypatch: pytest.MonkeyPatch
):
    flags = (*QUICK, "--max-batch", "9", "--on-bad-id", "clamp", "--disable", "fuse")
    with monkeypatch.context() as patched:
        break_pass(patched)
        ran = grc("compile", model, "-o", artifact_path, *flags, "--json")
    assert json.loads(ran.out)["next"] == [
        f"grc opt {model} --on-bad-id clamp --disable fuse --passes broken --print-after all"
    ]
    lone = {"what": "look-up", "where": "tiny.py:13", "missed": "it stands alone", "source": "", "saves": ""}
    record = {"pass": "merge-tables", "rolled_back": None, "changes": [lone]}
    manifest = {**Artifact.open(artifact_path).manifest, "passes": [record]}
    (step,) = summarise(manifest)["next"]
    assert step == f"grc explain {model} --on-bad-id clamp --disable fuse"
    assert grc(*step.split()[1:]).code == 0


def test_an_engine_that_is_left_out_says_why_and_leaves_no_file(
    grc: Grc, model: Path, artifact_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Refused(Eager):
        name = "refused"

        def build(self, lowerable, target, folder):
            (folder / "refused.json").write_text("{}")
            raise LoweringError("it has no kernel for sort")

    monkeypatch.setattr("grc.compiler.engines_for", lambda ours, *_: [(Eager(), ours), (Refused(), ours)])
    ran = grc("compile", model, "-o", artifact_path, "--batches", "4")
    assert ran.code == 0
    assert "note: without refused: it has no kernel for sort" in ran.told
    assert [file.name for file in (artifact_path / "parts").iterdir()] == ["eager.json"]


def test_a_policy_for_bad_ids_is_held_or_refused(
    grc: Grc, model: Path, artifact_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stumble(self, graph):
        raise RuntimeError("value cannot be converted")

    monkeypatch.setattr("grc.passes.guard_ids.GuardIds.run", stumble)
    ran = grc("compile", model, "-o", artifact_path, *QUICK, "--on-bad-id", "clamp")
    assert (ran.code, ran.told) == (
        1,
        [
            "error: pass guard-ids: failed: RuntimeError: value cannot be converted",
            "hint: leave out --on-bad-id clamp: requests are checked",
        ],
    )
    refused(
        grc("compile", model, "-o", artifact_path, *QUICK, "--on-bad-id", "clamp", "--disable", "guard-ids"),
        "error: --on-bad-id clamp is what the pass guard-ids does, which is disabled",
        "hint: leave out --on-bad-id, or --disable guard-ids",
    )
    refused(
        grc("compile", model, "-o", artifact_path, *QUICK, "--on-bad-id", "clamp", "--bisect-limit", "1"),
        "error: --bisect-limit ends before the pass guard-ids, which --on-bad-id clamp needs",
        "hint: bisect without --on-bad-id",
    )
    assert not artifact_path.exists()


def test_times_that_other_programs_had_a_part_in_are_told(
    grc: Grc, model: Path, artifact_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("grc.lowering.timing.Processors.crowded", lambda *_: "other programs took 1.0 of 2 cores")
    ran = grc("compile", model, "-o", artifact_path, *QUICK)
    assert "note: other programs took 1.0 of 2 cores" in ran.told
    assert "speed not measured" in ran.out and "x eager" not in ran.out


def test_strict_makes_a_broken_pass_an_error(
    grc: Grc, model: Path, artifact_path: Path, monkeypatch: pytest.MonkeyPatch
):
    break_pass(monkeypatch)
    ran = grc("compile", model, "-o", artifact_path, *QUICK, "--strict")
    assert ran.code == 1
    assert ran.told[0].startswith("error: pass broken: error ")
    assert ran.told[1] == "hint: leave it out with --disable broken"
    assert not artifact_path.exists()


def break_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pipeline be one pass that turns sigmoid into tanh."""
    import torch

    from grc.passes.manager import Change, Pass

    class Broken(Pass):
        name = "broken"

        def run(self, graph):
            for node in graph.graph.nodes:
                if node.target is torch.ops.aten.sigmoid.default:
                    node.target = torch.ops.aten.tanh.default
            graph.recompile()
            return [Change("tanh", "tiny.py:14")]

    monkeypatch.setattr("grc.compiler.pipeline", lambda *_: [Broken()])


def test_an_output_that_exists_is_replaced_only_with_force(grc: Grc, model: Path, artifact: Path):
    before = (artifact / "manifest.json").read_bytes()
    refused(
        grc("compile", model, "-o", artifact, *QUICK),
        f"error: {artifact} exists",
        "hint: choose another -o, or replace it with --force",
    )
    assert (artifact / "manifest.json").read_bytes() == before
    assert grc("compile", model, "-o", artifact, *QUICK, "--force", "--max-batch", "9").code == 0
    assert json.loads((artifact / "manifest.json").read_text())["batch"]["max"] == 9


@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_appears_meanwhile_is_replaced_only_with_force(artifact: Path, tmp_path: Path, force: bool):
    output = tmp_path / "x.grc"

    def build() -> None:
        with writing(output, force) as folder:
            (folder / "manifest.json").write_text("second")
            artifact.rename(output)

    before = (artifact / "manifest.json").read_text()
    if force:
        build()
    else:
        with pytest.raises(ArtifactError, match=r"x\.grc exists$"):
            build()
    assert (output / "manifest.json").read_text() == ("second" if force else before)
    assert list(tmp_path.iterdir()) == [output]


def test_force_never_replaces_what_is_no_artifact(grc: Grc, model: Path, tmp_path: Path):
    (tmp_path / "precious").mkdir()
    refused(
        grc("compile", model, "-o", tmp_path / "precious", *QUICK, "--force"),
        f"error: {tmp_path}/precious exists and is no grc artifact",
        "hint: choose another -o; --force replaces a grc artifact only",
    )


def test_an_output_that_cannot_be_written(grc: Grc, model: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "x.grc"
    refused(
        grc("compile", model, "-o", output, *QUICK),
        f"error: can't write {output}: {tmp_path}/file is no folder",
        "hint: choose another -o",
    )


def test_a_full_disk_leaves_nothing(grc: Grc, model: Path, artifact_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("grc.lowering.store.write_weights", full)
    refused(
        grc("compile", model, "-o", artifact_path, *QUICK),
        f"error: can't write {artifact_path}: No space left on device",
        "hint: free some space, or choose another -o",
    )
    assert list(artifact_path.parent.iterdir()) == []


def test_a_file_that_is_read_meanwhile_is_no_output_that_cannot_be_written(tmp_path: Path):
    output = tmp_path / "x.grc"
    with pytest.raises(FileNotFoundError), writing(output, force=False):
        (tmp_path / "clicks.npz").read_bytes()
    with pytest.raises(ArtifactError, match="can't write"), writing(output, force=False) as folder:
        (folder / "parts" / "model.so").write_bytes(b"")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_engine_is_refused_at_once(grc: Grc, model: Path, artifact_path: Path):
    ran = grc("compile", model, "-o", artifact_path, "--engine", "abacus")
    refused(
        ran,
        "error: there is no engine abacus",
        "hint: choose auto or one of inductor, inductor-float-layers, aoti, onnxruntime, onnxruntime-static, eager",
    )
    assert "capture" not in ran.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_engines_of_a_gpu_are_known(grc: Grc, model: Path, artifact_path: Path):
    ran = grc("compile", model, "-o", artifact_path, "--device", "cuda", "--engine", "inductor-small")
    assert ran.code == 1 and "no usable GPU here" in ran.told[0]
    ran = grc("compile", model, "-o", artifact_path, "--engine", "inductor-small")
    assert ran.code == 1 and ran.told[0] == "error: there is no engine inductor-small"


CPU, FP32 = "leave it out, or choose --device cuda", "leave it out, or choose another --precision, such as int8"


@pytest.mark.parametrize(
    ("flags", "error", "hint"),
    [
        (("--buckets", "1,8"), "--device cpu makes no use of --buckets", CPU),
        (("--streams", "4", "--static-buckets"), "--device cpu makes no use of --streams and --static-buckets", CPU),
        (("--traffic", "/nonexistent"), "--device cpu makes no use of --traffic", CPU),
        (("--budget", "max-error=0.01"), "--precision fp32 makes no use of --budget", FP32),
        (("--calibration", "/nonexistent.npz"), "--precision fp32 makes no use of --calibration", FP32),
    ],
)
def test_a_flag_without_use_is_refused_at_once(
    grc: Grc, model: Path, artifact_path: Path, flags: tuple[str, ...], error: str, hint: str
):
    ran = grc("compile", model, "-o", artifact_path, *QUICK, *flags)
    refused(ran, f"error: {error}", f"hint: {hint}")
    assert "capture" not in ran.err


@pytest.mark.parametrize("flag", ["--disable", "--print-after"])
def test_an_unknown_pass_is_refused_at_once(grc: Grc, model: Path, artifact_path: Path, flag: str):
    ran = grc("compile", model, "-o", artifact_path, flag, "polish")
    assert ran.told[0] == "error: there is no pass polish"
    assert ran.told[1] == f"hint: the passes are {', '.join(NAMES)}"
    assert ran.code == 1
    assert "capture" not in ran.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--batches", "1,x"), "'1,x' is no list of batch sizes"),
        (("--batches", "0"), "a batch size is at least 1"),
        (("--on-bad-id", "ignore"), "is not one of"),
        (("--device", "abacus"), "is not one of"),
        (("--max-batch", "0"), "--max-batch"),
        (("--precision", "int8", "--budget", ","), "',' holds no limit such as max-error=0.02"),
        (("--precision", "int8", "--budget", "max-error=0.1", "--budget", ""), "'' holds no limit"),
        (("--colour",), "No such option: --colour"),
        ((), "MODEL"),
    ],
)
def test_usage_errors_are_exit_code_2(grc: Grc, model: Path, flags: tuple[str, ...], words: str):
    ran = grc("compile", *([model] if flags else []), *flags)
    assert ran.code == 2
    assert words in " ".join(ran.err.split())
    assert "Traceback" not in ran.err


def test_stages_are_built_beside_the_whole(grc: Grc, model: Path, artifact_path: Path, tmp_path: Path):
    flags = ("--engine", "eager", "--batches", "4", "--on-bad-id", "clamp", "--stages")
    ran = grc("compile", model, "-o", artifact_path, *flags)
    assert ran.code == 0, ran.err
    artifact = Artifact.open(artifact_path, verify=True)
    names = [stage["name"] for stage in artifact.manifest["cut"]]
    assert names == ["embedding_service", "interaction_python", "gr_trt"]
    told = [line.split() for line in ran.err.splitlines() if line.startswith("  stage")]
    assert [line[1:4] for line in told] == [[f"{name}:", "eager", "at"] for name in names]
    stages = []
    for stage in artifact.manifest["cut"]:
        (tmp_path / stage["name"]).mkdir()
        stages.append(Program(write_stage(artifact, stage, tmp_path / stage["name"])))
    dense, ids = torch.rand(3, 3), torch.tensor([[1, 2], [99, 3], [4, -5]])
    (embedding,) = stages[0].run_flat([ids])
    (interaction,) = stages[1].run_flat([dense, embedding])
    assert torch.equal(stages[2].run_flat([interaction])[0], Program(artifact).run_flat([dense, ids])[0])


def test_stages_that_can_not_be_built_are_refused_before_building(
    grc: Grc, model: Path, model_file: Callable[[str], Path], artifact_path: Path
):
    for words in (("--device", "cuda"), ("--precision", "int8")):
        refused(
            grc("compile", model, "-o", artifact_path, "--stages", *words),
            "error: stages are built for the CPU in fp32 only",
            "hint: leave out --stages, or --device cuda and --precision",
        )
    plain = model_file(
        "import torch\n"
        "def get_model(): return torch.nn.ReLU().eval()\n"
        "def get_inputs(batch): return (torch.arange(3.0).repeat(batch, 1),)\n"
    )
    ran = grc("compile", plain, "-o", artifact_path, "--stages")
    assert ran.told == [
        "error: the model has no tables and no layers to cut it at",
        "hint: leave out --stages",
    ]
    assert "  build" not in ran.err and not artifact_path.exists()


def test_the_command_that_rebuilds_has_every_flag(grc: Grc, model: Path, artifact_path: Path):
    flags = (
        "--engine",
        "eager",
        "--batches",
        "4,8",
        "--max-batch",
        "9",
        "--on-bad-id",
        "clamp",
        "--disable",
        "fuse",
        "--strict",
    )
    assert grc("compile", model, "-o", artifact_path, *flags).code == 0
    command = Artifact.open(artifact_path).manifest["command"]
    assert command.split()[:3] == ["grc", "compile", str(model)]
    assert sorted(command.split()[3:]) == sorted(flags)
    again = grc(*command.split()[1:], "-o", artifact_path, "--force")
    assert again.code == 0 and Artifact.open(artifact_path).manifest["command"] == command


def test_quality_is_measured_again_in_batches_that_the_artifact_takes(grc: Grc, model: Path, artifact_path: Path):
    flags = ("--engine", "inductor", "--batches", "4", "--max-batch", "16", "--precision", "int8")
    assert grc("compile", model, "-o", artifact_path, *flags).code == 0
    ran = grc("check", artifact_path)
    assert ran.code == 0, ran.err
