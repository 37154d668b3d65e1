"""grc serve on the command line: its help, which server it takes and why, and on a host with tritonserver, that one."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from grc.cli import triton_server
from grc.errors import GrcError
from tests.cli.session import Grc, Ran, refused
from tests.server.running import command, needs_extra, until

EXPORTED = importlib.util.find_spec(triton_server.EXPORT) is not None


def test_help_names_every_flag_of_the_settings(grc: Grc) -> None:
    needs_extra()
    from dataclasses import fields

    from grc.runtime.server.settings import Settings

    said = grc("serve", "--help").out
    flags = {"max_body": "--max-body", "grpc_port": "--grpc-port"}
    for field in fields(Settings):
        assert flags.get(field.name, "--" + field.name.replace("_", "-")) in said, field.name


def test_defaults_are_those_of_the_settings() -> None:
    needs_extra()
    import inspect
    from dataclasses import fields

    from grc.cli.serve import KB, MB, command
    from grc.runtime.server.settings import Settings

    flags = {name: p.default for name, p in inspect.signature(command).parameters.items()}
    units = {"max_body": MB, "max_head": KB}
    for field in fields(Settings):
        own = flags[field.name] * units[field.name] if field.name in units else flags[field.name]
        assert own == field.default, field.name


def test_an_artifact_is_needed(grc: Grc) -> None:
    ran = grc("serve")
    assert ran.code == 2 and "Missing argument" in ran.err


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (
            ("FOLDER",),
            "FOLDER is neither an artifact nor a folder of versions",
            "build one with grc compile MODEL -o PATH; versions are artifacts named 1, 2, …",
        ),
        (("TINY", "TINY"), "TINY and TINY are both named tiny", "name one of them: grc serve OTHER=TINY"),
        (("a b=TINY",), "'a b' can't be a model's name in a URL", "name it: grc serve NAME=TINY"),
    ],
)
def test_what_is_no_artifact(
    grc: Grc, compiled: tuple[Path, Ran], tmp_path: Path, words: tuple[str, ...], error: str, hint: str
) -> None:
    needs_extra()

    def placed(text: str) -> str:
        return text.replace("FOLDER", str(tmp_path)).replace("TINY", str(compiled[0]))

    ran = grc("serve", *map(placed, words), "--server", "own", "--port", 0)
    assert ran.err.splitlines()[0] == "server: own, as asked"
    assert ran.err.splitlines()[1:] == [f"error: {placed(error)}", f"hint: {placed(hint)}"]
    assert (ran.out, ran.code) == ("", 1)


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file named tritonserver on PATH: enough to be found."""
    binary = tmp_path / "bin" / "tritonserver"
    binary.parent.mkdir()
    binary.write_text("#!/bin/sh\nexit 9\n")
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{binary.parent}:{os.environ['PATH']}")
    return binary


def test_auto_takes_its_own_server_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(triton_server, "IMAGE", tmp_path / "tritonserver")
    assert triton_server.choose("auto") == (
        "own",
        f"because there is no tritonserver on PATH or at {tmp_path}/tritonserver",
    )


def test_auto_takes_the_systems_server_where_grc_can_export(on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_server, "can_export", lambda: True)
    assert triton_server.choose("auto") == ("triton", f"because {on_path} is there")
    assert triton_server.choose("own") == ("own", "as asked")
    assert triton_server.choose("auto", ["--answer-cache"]) == ("own", f"because {on_path} knows no --answer-cache")
    monkeypatch.setattr(triton_server, "can_export", lambda: False)
    assert triton_server.choose("auto") == ("own", f"because this grc can't export a repository for {on_path}")


def test_triton_that_can_not_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GrcError) as caught:
        triton_server.choose("triton", ["--answer-cache"])
    assert caught.value.message == "tritonserver knows no --answer-cache"
    monkeypatch.setattr(triton_server, "can_export", lambda: False)
    with pytest.raises(GrcError) as caught:
        triton_server.choose("triton")
    assert caught.value.message == "this grc can't export a repository for tritonserver"


SCRIPT = ("-P", "-c", "from grc.cli import main; main()")  # as the `grc` on PATH starts: not in the current directory


def test_nothing_is_imported_from_the_current_directory(tmp_path: Path) -> None:
    needs_extra()
    for name in ("random", "uvloop", "grc"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current directory')")
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    words = [sys.executable, *SCRIPT, "serve", "no.grc", "--server", "own"]
    ran = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stderr.splitlines()[:2]) == (
        1,
        ["server: own, as asked", "error: no.grc is neither an artifact nor a folder of versions"],
    )


def test_without_its_packages_it_says_what_to_install(
    grc: Grc, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("grc.runtime.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvloop", None)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    ran = grc("serve", artifact, "--server", "own")
    assert (ran.told[1:], ran.code) == (
        ["error: grc serve needs uvloop", "hint: pip install 'grc-compiler[serve]'"],
        1,
    )


def test_a_damaged_artifact_is_refused(grc: Grc, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_extra()
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    (artifact / "parts" / "eager.json").unlink()
    refused(
        grc("serve", artifact, "--server", "own", "--port", 0, "--grpc-port", 0),
        "server: own, as asked",
        "error: tiny.grc/parts/eager.json is missing",
        "hint: copy the artifact again, or rebuild it",
    )


@pytest.mark.skipif(not EXPORTED, reason="needs the exporter of Triton repositories")
def test_the_real_tritonserver_answers(compiled: tuple[Path, object], tmp_path: Path) -> None:
    reason = importlib.import_module(f"{triton_server.EXPORT}.launcher").missing()
    if reason:
        pytest.skip(reason)
    from tests.server.test_lifecycle import BODY

    needs_extra()
    from grc.runtime.server.ports import free_port

    port = free_port("127.0.0.1", 0, "--port")
    log = tmp_path / "triton.log"
    words = command(f"ranker={compiled[0]}", "--server", "triton", "--port", port, "--no-grpc", "--drain", 5)
    with log.open("w") as said:
        process = subprocess.Popen(words, stdout=said, stderr=said)
    try:
        for _ in until("tritonserver", 240):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                url = f"http://127.0.0.1:{port}/v2/models/ranker/infer"
                with urllib.request.urlopen(urllib.request.Request(url, BODY), timeout=30) as answer:
                    found = json.loads(answer.read())
                break
            except OSError:
                continue
        assert found["model_name"] == "ranker" and len(found["outputs"][0]["data"]) == 1
        assert log.read_text().startswith("server: triton, as asked\n")
    finally:
        process.terminate()
        process.wait(60)
