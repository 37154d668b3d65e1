"""Ctrl-C, or the signal that stops a container, in mid-compile: nothing half-written stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grc.cli import ending
from grc.cli.progress import Lines
from grc.runtime.artifact import writing

PATIENCE = 120.0  # seconds: importing torch on a busy machine takes tens of them


@pytest.mark.parametrize(
    ("sent", "code", "told"),
    [(signal.SIGINT, 130, ["interrupted; nothing was written"]), (signal.SIGTERM, 143, [])],
)
def test_an_interrupted_compilation_leaves_nothing(
    model: Path, tmp_path: Path, sent: signal.Signals, code: int, told: list
):
    command = [sys.executable, "-m", "grc", "compile", str(model), "-o", str(tmp_path / "x.grc"), "--engine", "eager"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    wait_for_partial(tmp_path, process)
    process.send_signal(sent)
    out, err = process.communicate(timeout=PATIENCE)
    assert [line for line in err.splitlines() if not line.startswith("  ")] == told
    assert (process.returncode, out) == (code, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("sent", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_what_was_lost_is_repeated_where_progress_is_told(
    sent: signal.Signals, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ending, "asked", None)
    with pytest.raises(raised):
        ending.end(sent, None)
    for tell in (Lines().begin, Lines().detail, Lines().end):
        with pytest.raises(raised):
            tell("stage")


def wait_for_partial(folder: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if any(folder.glob(".x.grc.*.partial")):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"the compilation did not begin: {process.communicate()}")


def test_a_signal_that_comes_with_the_folder_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The handler raises between two instructions, so also between the folder that was made and what is done next."""
    made = Path.mkdir

    def interrupted(self: Path, *args: object, **options: object) -> None:
        made(self, *args, **options)
        if self.name.endswith(".partial"):
            sys.exit(143)

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(SystemExit), writing(tmp_path / "x.grc", force=False):
        pytest.fail("the block began")
    assert list(tmp_path.iterdir()) == []
