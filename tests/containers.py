"""Images, built by whichever container engine works on this host."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ENGINES = ("docker", "podman", "buildah")


def engine() -> str:
    """The first engine that works. Skips the test, with what each of them said, where none does."""
    reasons = []
    for name in ENGINES:
        if shutil.which(name) is None:
            reasons.append(f"no {name} on PATH")
            continue
        ran = subprocess.run([name, "info"], capture_output=True, text=True)
        if ran.returncode == 0:
            return name
        reasons.append(f"{name}: {ran.stderr.strip().rpartition(chr(10))[2]}")
    pytest.skip("no image can be built: " + "; ".join(reasons))


@contextmanager
def image(folder: Path, name: str) -> Iterator[str]:
    """Build the Dockerfile of a folder, and remove what was built at the end."""
    found = engine()
    ran = subprocess.run([found, "build", "-t", name, str(folder)], capture_output=True, text=True)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-4000:]
    try:
        yield name
    finally:
        subprocess.run([found, "rmi", name], capture_output=True)


def output_of(name: str, *words: str, entrypoint: str | None = None) -> str:
    """What a program in an image writes. Skips the test where the engine only builds."""
    found = engine()
    if found == "buildah":
        pytest.skip("the image was built; buildah runs none")
    start = ["--entrypoint", entrypoint] if entrypoint else []
    ran = subprocess.run([found, "run", "--rm", *start, name, *words], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stdout
