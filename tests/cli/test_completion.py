"""Completion in the shell: what bash is offered for a command, an option and an option's values."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grc.cli.app import app
from grc.options import ENGINES
from grc.runtime.engines import LOADERS

GRC = Path(sys.executable).parent / "grc"


def offered(line: str) -> list[str]:
    """What bash's completion function gets for a command line, the cursor at its end."""
    asked = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")), "_GRC_COMPLETE": "complete_bash"}
    ran = CliRunner().invoke(app, [], env=asked, prog_name="grc")
    assert (ran.exit_code, ran.stderr) == (0, "")
    return ran.stdout.split()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("grc comp", ["compile"]),
        ("grc export", ["export-onnx", "export-triton"]),
        ("grc compile --prec", ["--precision"]),
        ("grc compile --precision ", ["fp32", "bf16", "fp16", "int8", "int4", "fp8", "auto"]),
        ("grc compile model.py --precision int", ["int8", "int4"]),
        ("grc compile --engine ", list(ENGINES)),
        ("grc compile model.py --engine a", ["auto", "aoti"]),
        ("grc bench model.py --engine on", ["onnxruntime", "onnxruntime-static"]),
        ("grc compile --on-bad-id ", ["error", "zero", "clamp", "hash"]),
        ("grc compile --device c", ["cpu", "cuda"]),
    ],
)
def test_bash_is_offered(line: str, words: list[str]) -> None:
    assert offered(line) == words


def test_every_engine_is_offered() -> None:
    assert ("auto", *LOADERS) == ENGINES


@pytest.mark.skipif(not (GRC.exists() and shutil.which("bash")), reason="needs bash, and grc beside this Python")
def test_the_installed_script_completes_in_bash(tmp_path: Path) -> None:
    """grc --install-completion writes it, and bash reads it at its start."""
    env = os.environ | {"HOME": str(tmp_path), "PATH": f"{GRC.parent}:{os.environ['PATH']}"}
    told = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    ran = subprocess.run(
        [GRC, "--install-completion", "bash"], env=env | told, capture_output=True, text=True, timeout=60
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    script = """
        source ~/.bashrc
        COMP_WORDS=(grc compile --precision int) COMP_CWORD=3
        _grc_completion grc
        echo "${COMPREPLY[@]}"
    """
    found = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert (found.stdout, found.stderr) == ("int8 int4\n", "")
