"""A tiny model file, its artifact, and `grc` as a function that says what went to stdout and what to stderr."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from grc.cli.app import app
from tests.cli.session import MODEL, SERVED, WORDS, Grc, Ran


@pytest.fixture(scope="session")
def grc() -> Grc:
    runner = CliRunner()

    def run(*words: Any, stdin: str | bytes | None = None) -> Ran:
        result = runner.invoke(app, [str(word) for word in words], input=stdin)
        return Ran(result.exit_code, result.stdout, result.stderr, result.stdout_bytes)

    return run


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.py, and served.py whose artifact takes requests in its users' words."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "tiny.py").write_text(MODEL)
    (folder / "served.py").write_text(SERVED)
    (folder / "words.py").write_text(WORDS)
    return folder


@pytest.fixture(scope="session")
def model(folder: Path) -> Path:
    return folder / "tiny.py"


def idle_host(patch: pytest.MonkeyPatch) -> None:
    """Other tests meanwhile are no other programs: they would cost a summary its speed."""
    patch.setattr("grc.lowering.timing.Processors.crowded", lambda *_: None)


@pytest.fixture(scope="session")
def compiled(grc: Grc, model: Path, folder: Path) -> tuple[Path, Ran]:
    """The artifact of tiny.py, and what compiling it said. Never to be changed."""
    path = folder / "tiny.grc"
    with pytest.MonkeyPatch.context() as patch:
        idle_host(patch)
        ran = grc("compile", model, "-o", path, "--engine", "eager", "--batches", "4", "--timing")
    assert ran.code == 0, ran.err
    return path, ran


@pytest.fixture
def artifact(compiled: tuple[Path, Ran], tmp_path: Path) -> Path:
    """A copy of the artifact that a test may spoil."""
    return Path(shutil.copytree(compiled[0], tmp_path / "tiny.grc"))


@pytest.fixture
def model_file(tmp_path: Path) -> Callable[[str], Path]:
    """Write a model file of the test's own."""

    def write(text: str) -> Path:
        path = tmp_path / "model.py"
        path.write_text(text)
        return path

    return write
