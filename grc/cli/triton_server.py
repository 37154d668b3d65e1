"""A tritonserver of this host, on the repository that grc exports: which server `grc serve` takes, and why."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

BUNDLED = Path("/opt/tritonserver/bin/tritonserver")
EXPORT = "grc.runtime.triton_repository"


def find_tritonserver() -> Path | None:
    found = shutil.which("tritonserver")
    return Path(found) if found else BUNDLED if BUNDLED.is_file() else None


def can_export() -> bool:
    return importlib.util.find_spec(EXPORT) is not None


def choose(wanted: str) -> tuple[str, str]:
    """`own` or `triton`, and the reason in words. Raises GrcError where triton was asked for and can't be had."""
    from grc import GrcError

    if wanted == "own":
        return "own", "as asked"
    found = find_tritonserver()
    if found is not None and can_export():
        return "triton", f"found at {found}" if wanted == "auto" else f"as asked, at {found}"
    if found is None:
        reason = "there is no tritonserver on PATH or in /opt/tritonserver"
    else:
        reason = f"there is a tritonserver at {found}, but this grc has no export for it"
    if wanted == "triton":
        raise GrcError(reason, "run grc serve inside of a tritonserver image, or with --server own")
    return "own", f"because {reason}"


def run(artifacts: list[str], host: str, port: int, grpc_port: int) -> None:
    """Export every artifact into one repository and become tritonserver on it. Raises GrcError before that."""
    from grc.cli.serve import serving_part

    binary = find_tritonserver()
    assert binary is not None
    module: Any = importlib.import_module(EXPORT)
    repository = Path(tempfile.mkdtemp(prefix="grc-triton-"))
    for source in serving_part().sources(artifacts):
        newest = source.newest()
        module.export(newest.path, repository)
    words = [
        str(binary),
        f"--model-repository={repository}",
        f"--http-address={host}",
        f"--http-port={port}",
        f"--grpc-address={host}",
        f"--grpc-port={grpc_port}",
        f"--metrics-address={host}",
        "--disable-auto-complete-config",
    ]
    os.execv(binary, words)
