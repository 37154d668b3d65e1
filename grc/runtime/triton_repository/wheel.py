"""The tritonserver of the nvidia-pytriton wheel, unpacked beside other caches: a real server where none is installed.

    python -m grc.runtime.triton_repository.wheel

downloads it once. Installing the wheel instead would force numpy below 2 on everything else.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from grc.errors import GrcError

REQUIREMENT = "nvidia-pytriton==0.7.0"  # tritonserver 2.51.0
GLIBC = (2, 35)


def folder() -> Path:
    """Where the unpacked wheel lies, or would: one folder for each version."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "grc" / REQUIREMENT.replace("==", "-")


def obstacle() -> str | None:
    """Why the wheel can't run on this host, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"it is built for Linux on x86-64, and this is {platform.system()} on {platform.machine()}"
    name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    if name != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < GLIBC:
        return f"it needs glibc {GLIBC[0]}.{GLIBC[1]}, and this host has {name or 'no glibc'} {version}".rstrip()
    return None


def fetch() -> Path:
    """Download and unpack the wheel unless it is there. Raises GrcError where this host can't run it or pip fails."""
    target = folder()
    if target.is_dir():
        return target
    reason = obstacle()
    if reason:
        raise GrcError(f"the tritonserver of {REQUIREMENT} can't run here: {reason}", "install tritonserver itself")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as made:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*download, "--dest", made, REQUIREMENT], capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no word from pip"]
            raise GrcError(f"pip can't download {REQUIREMENT}: {said[-1]}", "see pip's index and proxy settings")
        (wheel,) = Path(made).glob("*.whl")
        unpacked = Path(made) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        for program in (
            *unpacked.rglob("triton_python_backend_stub"),
            unpacked / "pytriton/tritonserver/bin/tritonserver",
        ):
            program.chmod(0o755)  # zipfile drops the bits that make them programs
        try:
            unpacked.rename(target)
        except OSError:  # another process was sooner
            if not target.is_dir():
                raise
    return target


def main() -> int:
    try:
        print(fetch())
    except GrcError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return 0 if obstacle() else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
