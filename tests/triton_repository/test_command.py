"""grc export-triton: what it tells, and every way in which it is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grc.cli.export_triton import proven
from grc.errors import GrcError
from grc.runtime.triton_repository import config, launcher, wheel
from grc.runtime.triton_repository.replay import Replayed, read_requests
from grc.runtime.triton_repository.repository import Repository
from tests.cli.conftest import grc as grc  # the command line as a function
from tests.cli.session import SERVED, Grc, edit_manifest, refused
from tests.server.running import until

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed: pip install 'grc-compiler[triton]'")


@pytest.fixture
def artifact(dlrm: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(dlrm, tmp_path / "dlrm.grc"))


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A host without tritonserver."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITONSERVER", raising=False)
    monkeypatch.setattr(launcher, "SYSTEM", tmp_path / "opt/tritonserver")


def test_it_tells_what_clients_call(grc: Grc, artifact: Path, tmp_path: Path) -> None:
    ran = grc("export-triton", artifact, "-o", tmp_path / "repo", "--layout", "stages")
    assert ran.code == 0, ran.err
    assert ran.out.splitlines() == [
        "  backend python: stages run on our runtime",
        f"  {tmp_path / 'repo'}   clients call ensemble_model   "
        "not verified: --verify replays golden requests on the real server",
        f"  try: {tmp_path / 'repo'}/run_server.sh",
    ]


def test_scripts_get_json(grc: Grc, artifact: Path, tmp_path: Path) -> None:
    told = json.loads(grc("export-triton", artifact, "-o", tmp_path / "repo", "--name", "ctr", "--json").out)
    assert told == {"path": str(tmp_path / "repo"), "layout": "fused", "models": ["ctr"], "entry": "ctr"}


@pytest.mark.triton
def test_verify_tells_what_the_server_answered(grc: Grc, artifact: Path, tmp_path: Path) -> None:
    ran = grc("export-triton", artifact, "-o", tmp_path / "repo", "--verify", "--json")
    assert ran.code == 0, ran.err
    assert not list(tmp_path.rglob("__pycache__"))
    verified = json.loads(ran.out)["verified"]
    assert verified["tensors"] >= 104 and verified["error"] < 1e-5 and verified["server"].startswith("2.")


def test_it_tells_where_preprocess_was_given_nothing() -> None:
    for replayed, told in (Replayed(4), "and none of"), (Replayed(4, 2), "and 2 of"):
        assert proven(replayed, True).startswith(f"4 golden requests {told} JSON answered over HTTP and gRPC, ")
    assert proven(Replayed(4), False).startswith("4 golden requests answered")
    alone = Replayed(4, alone="its rows read each other")
    assert ", each alone: its rows read each other; largest error" in proven(alone, False)


@pytest.mark.triton
def test_it_warns_where_no_example_went_through_preprocess(grc: Grc, spoken: Path, tmp_path: Path) -> None:
    served = spoken.parent / "unasked.py"
    served.write_text(SERVED)
    assert grc("compile", served, "-o", tmp_path / "m.grc", "--engine", "eager", "--batches", "4").code == 0
    ran = grc("export-triton", tmp_path / "m.grc", "-o", tmp_path / "repo", "--verify", "--max-batch", 1, "--json")
    warning = "no example request went through preprocess: only tensors and {} were sent"
    assert ran.code == 0 and ran.told == [
        f"warning: {warning}",
        "hint: name a request.json among the model's assets and compile it again, or send requests with --requests",
    ]
    verified = json.loads(ran.out)["verified"]
    assert (verified["warning"], verified["alone"]) == (warning, "the largest batch of unasked is 1")


def test_an_existing_repository_is_kept(grc: Grc, artifact: Path, tmp_path: Path) -> None:
    output = tmp_path / "repo"
    assert grc("export-triton", artifact, "-o", output).code == 0
    refused(
        grc("export-triton", artifact, "-o", output, "--layout", "stages"),
        f"error: {output} exists",
        "hint: choose another -o, or replace it with --force",
    )
    assert Repository.open(output).layout == "fused"
    assert grc("export-triton", artifact, "-o", output, "--layout", "stages", "--force").code == 0
    assert Repository.open(output).layout == "stages"


def test_a_version_is_added_to_a_repository_that_is_there(grc: Grc, artifact: Path, tmp_path: Path) -> None:
    output = tmp_path / "repo"
    refused(
        grc("export-triton", artifact, "-o", output, "--add"),
        f"error: {output} is no Triton repository of grc: it has no repository.json",
        "hint: write one with grc export-triton",
    )
    assert grc("export-triton", artifact, "-o", output).code == 0
    assert grc("export-triton", artifact, "-o", output, "--add").code == 0
    assert (output / "dlrm/2/model.py").is_file() and (output / "dlrm/1/model.py").is_file()
    refused(
        grc("export-triton", artifact, "-o", output, "--add", "--version", "2"),
        f"error: {output} has version 2",
        "hint: leave out --version, or name a higher one",
    )


def test_a_field_of_a_model_is_set_or_refused(grc: Grc, artifact: Path, tmp_path: Path) -> None:
    output = tmp_path / "repo"
    refused(
        grc("export-triton", artifact, "-o", output, "--set", "dlrm.max_queue=4"),
        "error: --set dlrm.max_queue=4: ModelConfig has no field max_queue",
        "hint: the nearest is max_batch_size",
    )
    assert not output.exists()
    words = (
        "--set",
        "dlrm.instance_group[0].count=4",
        "--set",
        "*.version_policy.latest.num_versions=3",
        "--image",
        "i",
    )
    assert grc("export-triton", artifact, "-o", output, *words).code == 0
    found = config.read(output / "dlrm/config.pbtxt")
    assert (found.instance_group[0].count, found.version_policy.latest.num_versions) == (4, 3)
    assert "FROM i\n" in (output / "Dockerfile").read_text()
    assert grc("export-triton", artifact, "-o", output, "--add").code == 0
    assert Repository.open(output).record["settings"]["overrides"] == [words[1], words[3]]
    ran = grc("export-triton", artifact, "-o", output, "--gpus", "0;1")
    assert ran.code == 2 and "'0;1' is no list of GPUs such as 0,1" in ran.err


def test_settings_beside_add_are_refused(grc: Grc, artifact: Path, tmp_path: Path) -> None:
    output = tmp_path / "repo"
    assert grc("export-triton", artifact, "-o", output).code == 0
    refused(
        grc("export-triton", artifact, "-o", output, "--add", "--max-delay", "500", "--no-warmup"),
        "error: --add makes no use of --max-delay and --no-warmup: a new version has the repository's settings",
        "hint: leave it out, or export a repository anew without --add",
    )
    assert not (output / "dlrm/2").exists()


def test_an_environment_must_be_there(grc: Grc, dlrm: Path, tmp_path: Path) -> None:
    refused(
        grc("export-triton", dlrm, "-o", tmp_path / "repo", "--python", tmp_path / "venv"),
        f"error: no virtual environment at {tmp_path / 'venv'}",
        "hint: name its folder, as python -m venv made it",
    )


def test_force_replaces_only_a_repository(grc: Grc, artifact: Path, tmp_path: Path) -> None:
    output = tmp_path / "photos"
    output.mkdir()
    refused(
        grc("export-triton", artifact, "-o", output, "--force"),
        f"error: {output} exists and is no Triton repository",
        "hint: choose another -o; --force replaces a Triton repository only",
    )


def test_an_artifact_of_another_torch_is_refused(grc: Grc, artifact: Path, tmp_path: Path) -> None:
    edit_manifest(artifact, lambda manifest: manifest["target"].update(torch="2.1.0"))
    ran = grc("export-triton", artifact, "-o", tmp_path / "repo")
    assert ran.told[0] == f"error: dlrm.grc was built with torch 2.1.0; this is torch {torch.__version__.split('+')[0]}"
    assert ran.told[1].startswith("hint: rebuild it here: grc compile ") and ran.code == 1


def test_an_artifact_of_another_device_is_refused(grc: Grc, artifact: Path, tmp_path: Path) -> None:
    edit_manifest(artifact, lambda manifest: manifest["target"].update(device="cuda", sm="sm_1"))
    ran = grc("export-triton", artifact, "-o", tmp_path / "repo")
    here = "this GPU is sm_" if torch.cuda.is_available() else "this host has no usable GPU"
    assert ran.told[0].startswith(f"error: dlrm.grc was built for sm_1; {here}") and ran.code == 1


def test_an_artifact_without_stages_says_how_to_build_them(grc: Grc, artifact: Path, tmp_path: Path) -> None:
    edit_manifest(artifact, lambda manifest: manifest.pop("cut"))
    ran = grc("export-triton", artifact, "-o", tmp_path / "repo", "--layout", "stages")
    assert ran.told[0] == "error: dlrm.grc carries no stages"
    assert "dlrm.py --" in ran.told[1] and ran.told[1].endswith(" --stages; or export with --layout fused")
    assert not (tmp_path / "repo").exists()


def test_a_damaged_artifact_is_refused(grc: Grc, artifact: Path, tmp_path: Path) -> None:
    (artifact / "golden.safetensors").write_bytes(b"")
    ran = grc("export-triton", artifact, "-o", tmp_path / "repo")
    assert ran.told[0].startswith("error: dlrm.grc/golden.safetensors has 0 bytes, the manifest says ")


def test_a_model_may_not_take_the_name_of_a_stage(grc: Grc, artifact: Path, tmp_path: Path) -> None:
    refused(
        grc("export-triton", artifact, "-o", tmp_path / "repo", "--name", "gr_trt"),
        "error: the fused model can't be called gr_trt",
        "hint: name it with --name",
    )


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("--name", "../victim"), "../victim"),
        (("--name", "a/b"), "a/b"),
        (("--name", "ü"), "ü"),
        (("--name", "a b"), "a b"),
        (("--prefix", "../"), "../dlrm"),
        (("--prefix", "_", "--layout", "stages"), "_preprocess_py"),
    ],
)
def test_a_name_that_triton_can_not_take_writes_nothing(
    grc: Grc, dlrm: Path, tmp_path: Path, words: tuple[str, ...], name: str
) -> None:
    (tmp_path / "victim/1").mkdir(parents=True)
    (tmp_path / "victim/1/model.py").write_text("precious")
    refused(
        grc("export-triton", dlrm, "-o", tmp_path / "repo", *words),
        f"error: {name!r} can't be a model's name",
        "hint: let --prefix and --name make letters and digits of ASCII, '.', '_' and '-', the first a letter or a digit",
    )
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.py")] == ["victim/1/model.py"]
    assert (tmp_path / "victim/1/model.py").read_text() == "precious"


def test_the_artifacts_own_name_becomes_one_that_triton_takes(grc: Grc, artifact: Path, tmp_path: Path) -> None:
    edit_manifest(artifact, lambda manifest: manifest.update(name="für alle"))
    told = json.loads(grc("export-triton", artifact, "-o", tmp_path / "repo", "--json").out)
    assert told["entry"] == "f_r_alle"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1, 2", "Expecting ',' delimiter: line 1 column 6 (char 5)"),
        ('{"user": 1}\n\n{"user" 2}\n', "line 3: Expecting ':' delimiter at column 9"),
    ],
)
def test_requests_that_are_no_json_are_refused(
    grc: Grc, artifact: Path, tmp_path: Path, text: str, reason: str
) -> None:
    (tmp_path / "requests.json").write_text(text)
    refused(
        grc("export-triton", artifact, "-o", tmp_path / "repo", "--verify", "--requests", tmp_path / "requests.json"),
        f"error: {tmp_path / 'requests.json'} holds no JSON requests: {reason}",
        "hint: write one request, a JSON list, or one request a line",
    )


@pytest.mark.parametrize(
    "text", ['[{"user": 1}]', '{\n  "user": 1\n}\n', '{"user": 1}\n', '{"user": 1}\n{"user": 2}\n']
)
def test_requests_are_a_list_or_one_or_one_a_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "requests.json").write_text(text)
    assert read_requests(tmp_path / "requests.json") == [{"user": 1}, {"user": 2}][: text.count("user")]


def test_requests_need_verify(grc: Grc, artifact: Path, tmp_path: Path) -> None:
    refused(
        grc("export-triton", artifact, "-o", tmp_path / "repo", "--requests", tmp_path / "requests.json"),
        "error: --requests are sent by --verify, which is not there",
        "hint: add --verify, or leave --requests out",
    )


def test_requests_that_the_model_refuses_prove_nothing(
    grc: Grc, films: Path, dlrm: Path, requests: list[dict], tmp_path: Path
) -> None:
    file = tmp_path / "requests.json"
    again = "mend or remove them; grc run ARTIFACT --request answers one"
    for artifact, asked, error, hint in (
        (films, [{"ids": [1, 2, 3]}], "1 of 1 of your requests was refused: preprocess: ", again),
        (films, [requests[0], {}, {}], "2 of 3 of your requests were refused: preprocess: ", again),
        (dlrm, [{}], "dlrm.grc has no preprocess and no ", "define them in the model file, or send tensors"),
    ):
        file.write_text(json.dumps(asked))
        ran = grc("export-triton", artifact, "-o", tmp_path / "repo", "--verify", "--requests", file)
        assert ran.code == 1 and ran.told[0].startswith(f"error: {error}")
        assert ran.told[-1] == f"hint: {hint}"
        assert not (tmp_path / "repo").exists()


def test_without_a_server_nothing_is_called_good(grc: Grc, artifact: Path, tmp_path: Path, nowhere: None) -> None:
    refused(
        grc("export-triton", artifact, "-o", tmp_path / "repo", "--verify"),
        f"error: no tritonserver found on PATH, at {launcher.SYSTEM} or in the pytriton wheel",
        "hint: install tritonserver, name its binary in TRITONSERVER, or run python -m grc.runtime.triton_repository.wheel",
    )
    assert not (tmp_path / "repo").exists()


def test_a_server_that_is_named_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nowhere: None) -> None:
    binary = tmp_path / "triton/bin/tritonserver"
    binary.parent.mkdir(parents=True)
    binary.touch(0o755)
    monkeypatch.setenv("TRITONSERVER", str(binary))
    found = launcher.find()
    assert found is not None
    assert (found.binary, found.backends, found.libraries) == (binary, tmp_path / "triton/backends", None)


def test_the_log_of_a_server_that_does_not_start_is_kept(
    grc: Grc, dlrm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = tmp_path / "triton/bin/tritonserver"
    binary.parent.mkdir(parents=True)
    binary.write_text("#!/bin/sh\necho first words\nfor i in 1 2 3 4 5 6 7 8 9 10 11 12; do echo $i; done\nexit 3\n")
    binary.chmod(0o755)
    (tmp_path / "triton/backends/python").mkdir(parents=True)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TRITONSERVER", str(binary))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    ran = grc("export-triton", dlrm, "-o", tmp_path / "repo", "--verify")
    (log,) = (tmp_path / "tmp").iterdir()
    assert ran.told[0] == "error: tritonserver ended with 3:"
    assert ran.told[-1] == f"hint: see its whole log: {log}"
    assert log.read_text().startswith("first words\n1\n")


def test_the_server_of_a_command_that_is_killed_ends_as_well(dlrm: Path, tmp_path: Path) -> None:
    binary, said = tmp_path / "triton/bin/tritonserver", tmp_path / "said"
    binary.parent.mkdir(parents=True)
    waiting = "echo $$ > said.new; mv said.new said; while :; do sleep 0.1; done"
    binary.write_text(f"#!/bin/sh\ncd '{tmp_path}'\ntrap 'echo ended > said; exit' TERM\n{waiting}\n")
    binary.chmod(0o755)
    (tmp_path / "triton/backends/python").mkdir(parents=True)
    (tmp_path / "tmp").mkdir()
    words = [sys.executable, "-m", "grc", "export-triton", dlrm, "-o", tmp_path / "repo", "--verify"]
    environment = {**os.environ, "TRITONSERVER": str(binary), "TMPDIR": str(tmp_path / "tmp")}
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for _ in until("the server"):
        assert process.poll() is None, process.stderr.read()
        if said.exists():
            break
    server = int(said.read_text())
    process.kill()
    process.communicate()
    try:
        for _ in until("the end of the server", 20):
            if said.read_text() == "ended\n":
                break
    except AssertionError:
        os.kill(server, signal.SIGKILL)
        raise


def test_without_tritonclient_it_says_what_to_install(
    grc: Grc, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    refused(
        grc("export-triton", artifact, "-o", tmp_path / "repo"),
        "error: a Triton repository needs tritonclient, which is not installed",
        "hint: pip install 'grc-compiler[triton]'",
    )


def test_the_wheel_is_fetched_once_and_says_why_it_can_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nowhere: None
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(wheel, "obstacle", lambda: None)
    with pytest.raises(GrcError) as caught:
        wheel.fetch()
    assert caught.value.message == (
        "pip can't download nvidia-pytriton==0.7.0: ERROR: No matching distribution found for nvidia-pytriton==0.7.0"
    )
    monkeypatch.setattr(wheel, "obstacle", lambda: "it needs glibc 2.35, and this host has glibc 2.17")
    with pytest.raises(GrcError, match=r"can't run here: it needs glibc 2.35, and this host has glibc 2.17"):
        wheel.fetch()
    assert not wheel.folder().exists()
    wheel.folder().mkdir()
    assert wheel.fetch() == wheel.folder()


def test_doctor_says_how_to_get_a_server(grc: Grc, nowhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "obstacle", lambda: None)
    assert json.loads(grc("doctor", "--json").out)["tritonserver"] == {
        "kind": "software",
        "name": "tritonserver",
        "usable": False,
        "detail": f"no tritonserver found on PATH, at {launcher.SYSTEM} or in the pytriton wheel",
        "command": "python -m grc.runtime.triton_repository.wheel",
    }
