"""Ctrl-C, or the signal that stops a container, in mid-compile: nothing half-written stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


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
    out, err = process.communicate(timeout=30)
    assert [line for line in err.splitlines() if not line.startswith("  ")] == told
    assert (process.returncode, out) == (code, "")
    assert list(tmp_path.iterdir()) == []


def wait_for_partial(folder: Path, process: subprocess.Popen) -> None:
    for _ in range(600):
        if any(folder.glob(".x.grc.*.partial")):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("the compilation did not begin")
