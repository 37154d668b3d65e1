"""grc serve on the command line: its help, which server it takes and why, and on a host with tritonserver, that one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from grc.cli import triton_server
from grc.errors import GrcError
from tests.cli.session import Grc, Ran, edit_manifest, refused
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


def test_a_path_may_have_an_equals_sign(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_extra()
    from grc.runtime.server.source import Source

    (tmp_path / "run=1").mkdir()
    placed = artifact.rename(tmp_path / "run=1/m.grc")
    monkeypatch.chdir(tmp_path)
    assert Source.of(str(placed)) == Source("tiny", placed, versions=False)
    assert Source.of("run=1/m.grc") == Source("tiny", Path("run=1/m.grc"), versions=False)
    assert Source.of("ctr=run=1/m.grc") == Source("ctr", Path("run=1/m.grc"), versions=False)
    with pytest.raises(GrcError) as caught:
        Source.of("/data/run=1/no.grc")
    assert caught.value.message == "/data/run=1/no.grc is neither an artifact nor a folder of versions"


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


def test_auto_takes_its_own_server_for_requests_in_the_users_words(
    on_path: Path, compiled: tuple[Path, Ran], artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_server, "can_export", lambda: True)
    edit_manifest(artifact, lambda manifest: manifest.update(processing={"preprocess": {}}))
    assert triton_server.choose("auto", [], [str(compiled[0])]) == ("triton", f"because {on_path} is there")
    assert triton_server.choose("auto", [], [f"a={compiled[0]}", f"films={artifact}"]) == (
        "own",
        f"because {on_path} has no /recommend, which films can answer",
    )


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (("--threads", 2), "--threads"),
        (("--max-body", 64), "--max-body"),
        (("--watch", 2, "--access-log"), "--watch and no --access-log"),
        (("--engine", "eager"), "--engine"),
    ],
)
def test_triton_is_refused_flags_that_it_does_not_know(
    grc: Grc, compiled: tuple[Path, Ran], words: tuple[object, ...], flags: str
) -> None:
    refused(
        grc("serve", compiled[0], "--server", "triton", *words),
        f"error: tritonserver knows no {flags}",
        "hint: leave it out, or choose --server own",
    )


def test_one_port_for_both_protocols_is_refused_at_once(grc: Grc) -> None:
    refused(
        grc("serve", "no.grc", "--port", 8020, "--grpc-port", 8020),
        "error: --port and --grpc-port are both 8020",
        "hint: choose another for one of them, or --no-grpc",
    )
    assert "8020" not in grc("serve", "no.grc", "--port", 8020, "--grpc-port", 8020, "--no-grpc", "--server", "own").err


FAKE = """\
#!{python}
import os, shutil, signal, sys
def end(*_):
    print("told to end", flush=True)
    sys.exit(7)
signal.signal(signal.SIGTERM, end)
for word in sys.argv:
    if word.startswith("--model-repository="):
        shutil.copytree(word.partition("=")[2], "{repositories}", dirs_exist_ok=True)
print(os.getpid(), "is ready", flush=True)
while True:
    signal.pause()
"""


class Served(NamedTuple):
    """`grc serve` with a tritonserver that is a script, and what both say."""

    process: subprocess.Popen[bytes]
    child: int
    log: Path


@pytest.fixture
def fake(compiled: tuple[Path, Ran], tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Serve with these words, or the artifact alone, until the child is ready."""
    needs_extra()
    pytest.importorskip("tritonclient.grpc")
    binary, log = tmp_path / "triton/bin/tritonserver", tmp_path / "triton.log"
    binary.parent.mkdir(parents=True)
    binary.write_text(FAKE.format(python=sys.executable, repositories=tmp_path / "served"))
    binary.chmod(0o755)
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TRITONSERVER": str(binary), "TMPDIR": str(tmp_path / "tmp")}
    started: list[int] = []  # one at the most

    def serve(*words: object) -> Served:
        words = command(*(words or compiled[:1]), "--server", "triton", "--port", 0, "--grpc-port", 0)
        with log.open("w") as said:
            process = subprocess.Popen(words, stdout=said, stderr=said, env=environment)
        for _ in until("the server"):
            assert process.poll() is None, log.read_text()
            last = log.read_text().rpartition("\n")[0].rpartition("\n")[2]
            if last.endswith(" is ready"):
                break
        started.append(int(last.split()[0]))
        return Served(process, started[-1], log)

    yield serve
    if started and not log.read_text().endswith("told to end\n"):
        os.kill(started[-1], signal.SIGKILL)


def test_triton_is_a_child_that_gets_settings_and_signals(
    fake: Callable[..., Served], compiled: tuple[Path, Ran], tmp_path: Path
) -> None:
    served = fake(compiled[0], "--timeout", 0.5, "--max-queue", 9, "--max-rows", 16, "--workers", 2)
    from grc.runtime.triton_repository import config

    served.process.terminate()
    assert served.process.wait(60) == 7
    assert not list((tmp_path / "tmp").glob("grc-triton-*"))
    found = config.read(tmp_path / "served/tiny/config.pbtxt")
    queue = found.dynamic_batching.default_queue_policy
    assert (found.max_batch_size, found.instance_group[0].count) == (16, 2)
    assert (queue.max_queue_size, queue.default_timeout_microseconds) == (9, 500_000)


@pytest.fixture(scope="module")
def spoken(grc: Grc, folder: Path) -> Path:
    """An artifact with preprocess and postprocess."""
    path = folder / "spoken.grc"
    assert grc("compile", folder / "served.py", "-o", path, "--engine", "eager", "--batches", "4").code == 0
    return path


def test_triton_serves_models_under_the_names_that_were_given_and_tells_where(
    fake: Callable[..., Served], compiled: tuple[Path, Ran], spoken: Path, tmp_path: Path
) -> None:
    served = fake(f"bags={compiled[0]}", f"films={spoken}")
    served.process.terminate()
    served.process.wait(60)
    models = {entry.name for entry in (tmp_path / "served").iterdir() if entry.is_dir()}
    assert models == {"bags", "films", "films_preprocess_py", "films_postprocess_py", "films_ensemble_model"}
    merge = "version 1, eager; requests merge by rows up to batch 4096"
    said = re.sub(r":\d{2,}", ":PORT", served.log.read_text()).splitlines()
    assert said[:6] == [
        "server: triton, as asked",
        f"  bags         {merge}",
        f"  films        {merge}; films_ensemble_model takes requests as preprocess does",
        "  http         http://127.0.0.1:PORT/v2",
        "  grpc         127.0.0.1:PORT",
        "  metrics      http://127.0.0.1:PORT/metrics",
    ]


def test_two_models_of_one_name_are_refused(compiled: tuple[Path, Ran], spoken: Path, tmp_path: Path) -> None:
    needs_extra()
    pytest.importorskip("tritonclient.grpc")
    with pytest.raises(GrcError) as caught:
        triton_server.exported(tmp_path, [f"a={spoken}", f"a_ensemble_model={compiled[0]}"], {})
    assert caught.value.message == "two models would be called a_ensemble_model"


def test_triton_ends_when_its_parent_is_killed(fake: Callable[..., Served]) -> None:
    served = fake()
    served.process.kill()
    served.process.wait(60)
    for _ in until("the end of the child", 20):
        if served.log.read_text().endswith("told to end\n"):
            break


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
