"""A tritonserver of this host, on the repository that grc exports: which server `grc serve` takes, and why."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grc.cli.errors import say
from grc.errors import GrcError

IMAGE = Path("/opt/tritonserver/bin/tritonserver")  # where the tritonserver image has it
EXPORT = "grc.runtime.triton_repository"
HINT = "run grc serve inside of a tritonserver image, or with --server own"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
# Parameters of grc serve that are fields of an export's settings, and those that tritonserver itself is told.
EXPORTED = {"workers": "instances", "max_rows": "max_batch", "max_queue": "max_queue", "timeout": "timeout_us"}
TOLD = ("artifacts", "host", "port", "grpc", "grpc_port", "server", "drain", "traceback")


def system_server() -> Path | None:
    found = shutil.which("tritonserver")
    return Path(found) if found else IMAGE if os.access(IMAGE, os.X_OK) else None


def can_export() -> bool:
    return importlib.util.find_spec(EXPORT) is not None


def unknown(given: Mapping[str, str]) -> list[str]:
    """Those of the flags that only grc's own server knows."""
    return [flag for name, flag in given.items() if name not in EXPORTED and name not in TOLD]


def settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an export's settings that parameters stand for. Triton has defaults of its own for what is not given."""
    found = {field: given[name] for name, field in EXPORTED.items() if name in given}
    if "timeout_us" in found:
        found["timeout_us"] = round(found["timeout_us"] * 1e6)
    return found


def choose(wanted: str, own_only: Sequence[str] = (), artifacts: Sequence[str] = ()) -> tuple[str, str]:
    """`own` or `triton`, and the reason in words. `own_only` are flags that were given and only grc's own server knows.

    Raises GrcError where triton was asked for and can't be had, ArtifactError where the choice needs an artifact that is not
    there.
    """
    flags = " and no ".join(own_only)
    if wanted == "own":
        return "own", "as asked"
    if wanted == "triton" and own_only:
        raise GrcError(f"tritonserver knows no {flags}", "leave it out, or choose --server own")
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
        return "own", f"because {found} knows no {flags}"
    spoken = speaking(artifacts)
    if spoken:
        return "own", f"because {found} has no /recommend, which {' and '.join(spoken)} can answer"
    return "triton", f"because {found} is there"


def speaking(artifacts: Sequence[str]) -> list[str]:
    """The names of those that answer requests in their users' words."""
    from grc.runtime.artifact import read_manifest
    from grc.runtime.server.source import sources

    newest = {source.name: source.newest() for source in sources(list(artifacts))}
    return [name for name, found in newest.items() if found and read_manifest(found.path)["processing"]]


class Told(NamedTuple):
    """What tritonserver is told: where to listen, without gRPC where its port is None, and seconds to drain."""

    host: str
    port: int
    grpc_port: int | None
    drain: float


class Listening(NamedTuple):
    """The ports that tritonserver gets; without gRPC that one is None."""

    host: str
    http: int
    grpc: int | None
    metrics: int


def run(artifacts: list[str], told: Told, chosen: Mapping[str, Any]) -> int:
    """Export every artifact into a repository of its own, run tritonserver on all of them, and leave nothing behind.

    `chosen` are fields of the export's settings. The exit code is the server's. Raises GrcError before it starts, where a
    port is in use or an artifact can't be exported.
    """
    from grc.runtime.server.ports import free_port

    launcher: Any = importlib.import_module(f"{EXPORT}.launcher")
    found = launcher.find()
    http = free_port(told.host, told.port, "--port")
    grpc = None if told.grpc_port is None else free_port(told.host, told.grpc_port, "--grpc-port")
    where = Listening(told.host, http, grpc, free_port(told.host, 0, "--port"))
    with tempfile.TemporaryDirectory(prefix="grc-triton-") as work:
        repositories = exported(Path(work) / "repositories", artifacts, chosen)
        tell(repositories, where)
        words = command_line(found, Path(work), repositories, where, told.drain)
        return obeying(words, launcher.environment(found, None))


def exported(folder: Path, artifacts: list[str], chosen: Mapping[str, Any]) -> list[Any]:
    """Every artifact as a repository of its own below `folder`, the model under the name that its user gave.

    Raises GrcError where models of two artifacts would be called the same.
    """
    from grc.runtime.server.source import sources

    export: Any = importlib.import_module(f"{EXPORT}.export").export
    made: list[Any] = []
    taken: set[str] = set()
    served = list(sources(artifacts))
    for source in served:
        newest = source.newest()
        assert newest is not None  # sources() has just seen it
        # Models of one server share their names: with several artifacts, those around each model begin with its own.
        prefix = f"{source.name}_" if len(served) > 1 else ""
        version = newest.number or 1
        repository = export(
            newest.path, folder / source.name, name=source.name, prefix=prefix, version=version, **chosen
        )
        for model in taken.intersection(repository.models):
            raise GrcError(f"two models would be called {model}", "name the artifacts otherwise: NAME=PATH")
        taken.update(repository.models)
        made.append(repository)
    return made


def tell(repositories: Sequence[Any], where: Listening) -> None:
    """Which models will be served, what runs each, and where the server listens."""
    for made in repositories:
        name, record = made.programs[0], made.record
        runs = record["backend"] if record["backend"] != "python" else " and ".join(record["engines"])
        alone = record["alone"]
        how = f"run alone: {alone}" if alone else f"merge by rows up to batch {record['max_batch']}"
        asked = f"; {made.entry} takes requests as preprocess does" if made.preprocesses else ""
        say(f"  {name:<12} version {record['version']}, {runs}; requests {how}{asked}")
    host = f"[{where.host}]" if ":" in where.host else where.host
    say(f"  http         http://{host}:{where.http}/v2")
    if where.grpc is not None:
        say(f"  grpc         {host}:{where.grpc}")
    say(f"  metrics      http://{host}:{where.metrics}/metrics")


def command_line(found: Any, work: Path, repositories: Sequence[Any], where: Listening, drain: float) -> list[str]:
    """The words that start tritonserver on the repositories; `work` is a folder for what it needs."""
    launcher: Any = importlib.import_module(f"{EXPORT}.launcher")
    host, grpc = where.host, where.grpc
    return [
        str(found.binary),
        *(f"--model-repository={made.path}" for made in repositories),
        f"--backend-directory={launcher.backends(found, work)}",
        f"--cache-directory={found.caches}",
        "--disable-auto-complete-config",
        f"--http-address={host}",
        f"--http-port={where.http}",
        *((f"--grpc-address={host}", f"--grpc-port={grpc}") if grpc is not None else ("--allow-grpc=false",)),
        f"--metrics-address={host}",
        f"--metrics-port={where.metrics}",
        f"--exit-timeout-secs={round(drain)}",
    ]


def obeying(words: Sequence[str], env: Mapping[str, str]) -> int:
    """Run a program until it ends, and pass signals on to it. Its exit code, or 128 + N where signal N ended it.

    It has a session of its own: Ctrl-C at a terminal would reach it twice otherwise. When this process is killed, which it
    can't pass on, the program is told to end.
    """
    launcher: Any = importlib.import_module(f"{EXPORT}.launcher")
    early: list[int] = []
    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    for number in heard:
        signal.signal(number, lambda got, frame: early.append(got))
    process = subprocess.Popen(words, env=env, start_new_session=True, preexec_fn=launcher.ending_with_parent())
    for number in heard:
        signal.signal(number, lambda got, frame: process.send_signal(got))
    for got in early:
        process.send_signal(got)
    code = process.wait()
    with contextlib.suppress(ProcessLookupError):  # the stubs of a server that crashed outlive it
        os.killpg(process.pid, signal.SIGKILL)
    return code if code >= 0 else 128 - code
