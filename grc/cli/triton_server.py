"""A tritonserver of this host, on the repository that grc exports: which server `grc serve` takes, and why."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grc.errors import GrcError

IMAGE = Path("/opt/tritonserver/bin/tritonserver")  # where the tritonserver image has it
EXPORT = "grc.runtime.triton_repository"
HINT = "run grc serve inside of a tritonserver image, or with --server own"


def system_server() -> Path | None:
    found = shutil.which("tritonserver")
    return Path(found) if found else IMAGE if os.access(IMAGE, os.X_OK) else None


def can_export() -> bool:
    return importlib.util.find_spec(EXPORT) is not None


def choose(wanted: str, own_only: Sequence[str] = ()) -> tuple[str, str]:
    """`own` or `triton`, and the reason in words. `own_only` are flags that were given and only grc's own server knows.

    Raises GrcError where triton was asked for and can't be had.
    """
    if wanted == "own":
        return "own", "as asked"
    if wanted == "triton" and own_only:
        raise GrcError(f"tritonserver knows no {own_only[0]}", "leave it out, or choose --server own")
    if wanted == "triton":
        if not can_export():
            raise GrcError("this grc can't export a repository for tritonserver", "choose --server own")
        reason = importlib.import_module(f"{EXPORT}.launcher").missing()
        if reason:
            raise GrcError(reason, HINT)
        return "triton", "as asked"
    found = system_server()
    if found is None:
        return "own", f"because there is no tritonserver on PATH or at {IMAGE}"
    if not can_export():
        return "own", f"because this grc can't export a repository for {found}"
    if own_only:
        return "own", f"because {found} knows no {own_only[0]}"
    return "triton", f"because {found} is there"


def run(artifacts: list[str], host: str, port: int, grpc_port: int | None, drain: float) -> None:
    """Export every artifact into a repository of its own, and become tritonserver on all of them.

    Raises GrcError before that, where a port is in use or an artifact can't be exported.
    """
    from grc.runtime.server.ports import free_port
    from grc.runtime.server.source import sources

    launcher: Any = importlib.import_module(f"{EXPORT}.launcher")
    export: Any = importlib.import_module(f"{EXPORT}.export").export
    settings: Any = importlib.import_module(f"{EXPORT}.settings").Settings
    found = launcher.find()
    http = free_port(host, port, "--port")
    grpc = None if grpc_port is None else free_port(host, grpc_port, "--grpc-port")
    work = Path(tempfile.mkdtemp(prefix="grc-triton-"))
    repositories = []
    served = list(sources(artifacts))
    for source in served:
        newest = source.newest()
        assert newest is not None  # sources() has just seen it
        # Models of one server share their names: with several artifacts each repository's begin with its own.
        prefix = f"{source.name}_" if len(served) > 1 else ""
        export(newest.path, work / source.name, settings(name=source.name, prefix=prefix))
        repositories.append(work / source.name)
    words = [
        str(found.binary),
        *(f"--model-repository={repository}" for repository in repositories),
        f"--backend-directory={launcher.backends(found, work)}",
        f"--cache-directory={found.caches}",
        "--disable-auto-complete-config",
        f"--http-address={host}",
        f"--http-port={http}",
        *((f"--grpc-address={host}", f"--grpc-port={grpc}") if grpc is not None else ("--allow-grpc=false",)),
        f"--metrics-address={host}",
        f"--metrics-port={free_port(host, 0, '--port')}",
        f"--exit-timeout-secs={round(drain)}",
    ]
    os.execve(found.binary, words, launcher.environment(found, None))
