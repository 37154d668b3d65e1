"""Find a real tritonserver and start it on a repository: for `--verify`, for tests and for benchmarks.

with serving(repository) as server:
    tritonclient.http.InferenceServerClient(server.http)
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grc.errors import GrcError
from grc.runtime.triton_repository import wheel

SYSTEM = Path("/opt/tritonserver/bin/tritonserver")  # where the tritonserver image has it
READY_SECONDS = 200  # four models that import torch took 46 s on two busy cores
EXIT_SECONDS = 10  # for requests in flight; a client that keeps its connection open holds the server for all of it
PR_SET_PDEATHSIG = 1  # of sys/prctl.h
HINT = "install tritonserver, name its binary in TRITONSERVER, or run python -m grc.runtime.triton_repository.wheel"


@dataclass(frozen=True)
class Installation:
    """A tritonserver on this host. `libraries` is None for one that needs no help to find its own."""

    binary: Path
    backends: Path
    caches: Path
    libraries: Path | None = None
    stubs: Path | None = None


def find() -> Installation | None:
    """The server that TRITONSERVER names, else one on PATH, in /opt/tritonserver, or in the pytriton wheel."""
    for candidate in (os.environ.get("TRITONSERVER"), shutil.which("tritonserver"), SYSTEM):
        if candidate and os.access(candidate, os.X_OK):
            root = Path(candidate).resolve().parent.parent
            return Installation(Path(candidate), root / "backends", root / "caches")
    installed = importlib.util.find_spec("pytriton")
    for base in (Path(installed.origin).parent.parent if installed and installed.origin else None, wheel.folder()):
        server = base / "pytriton/tritonserver" if base else None
        if base and server and (server / "bin/tritonserver").exists():
            return Installation(
                server / "bin/tritonserver",
                server / "backends",
                server / "caches",
                base / "nvidia_pytriton.libs",
                server / "python_backend_stubs",
            )
    return None


def missing() -> str | None:
    """Why no server can be started here, or None."""
    found = find()
    if found is None:
        return f"no tritonserver found on PATH, at {SYSTEM} or in the pytriton wheel"
    if found.stubs is None:
        return None
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if not (found.stubs / version).is_dir():
        return f"the pytriton wheel has no Python backend for Python {version}"
    return None if library_folder() else f"tritonserver needs libpython{version}.so.1.0, which this Python lacks"


def has_backend(name: str) -> bool:
    """Whether the server of this host has a backend. Where there is none, the image's will be used, which has all."""
    found = find()
    return found is None or (found.backends / name).is_dir()


def library_folder() -> Path | None:
    """Where the shared library of this Python lies. It must be of the same build: another one breaks multiprocessing."""
    name = f"libpython{sys.version_info[0]}.{sys.version_info[1]}.so.1.0"
    for folder in (sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib"):
        if folder and (Path(folder) / name).exists():
            return Path(folder)
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    for folder in (f"/usr/lib/{multiarch}", "/usr/lib64", "/usr/local/lib"):
        if sys.base_prefix in ("/usr", "/usr/local") and (Path(folder) / name).exists():
            return Path(folder)
    return None


@dataclass
class Server:
    """A running tritonserver: the port of each of its services on loopback, its process and its log."""

    http: int
    grpc: int
    metrics: int
    process: subprocess.Popen[bytes]
    log: Path
    seconds: float = 0.0

    def at(self, service: str) -> str:
        """`host:port` of "http", "grpc" or "metrics"."""
        return f"127.0.0.1:{getattr(self, service)}"

    def stop(self) -> None:
        """Let requests in flight finish; kill what then still runs."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(EXIT_SECONDS + 10)
        with contextlib.suppress(ProcessLookupError):  # the stubs of a server that crashed outlive it
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for left in Path("/dev/shm").glob(f"{region(self.http)}*"):
            left.unlink(missing_ok=True)

    def last_words(self, lines: int = 12) -> str:
        """The end of the log without the table of options, errors first where there are any."""
        text = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in text if line.startswith("E") or "error:" in line.lower()]
        return "\n".join((errors or text)[-lines:])


def region(port: int) -> str:
    """The prefix of the shared memory of one server."""
    return f"grc_{os.getpid()}_{port}_"


@contextlib.contextmanager
def serving(
    repository: str | os.PathLike[str],
    *options: str,
    python: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = READY_SECONDS,
) -> Iterator[Server]:
    """A tritonserver on loopback, ready, and stopped at the end, or when this thread ends in any other way. `options` are
    passed on to it.

    `python` is the interpreter whose packages the models see, this one by default. Raises GrcError where there is no
    server, or it does not become ready; the message then holds the end of its log.
    """
    reason = missing()
    found = find()
    if reason or found is None:
        raise GrcError(reason or "no tritonserver", HINT)
    with tempfile.TemporaryDirectory(prefix="grc-triton-") as work:
        server = start(found, Path(repository), Path(work), options, python, env or {}, timeout)
        try:
            yield server
        finally:
            server.stop()


def start(
    found: Installation,
    repository: Path,
    work: Path,
    options: Sequence[str],
    python: str | os.PathLike[str] | None,
    env: Mapping[str, str],
    timeout: float,
) -> Server:
    for _ in range(3):  # a port can be lost between picking and binding it, and the server refuses port 0
        ports = free_ports()
        command = command_line(found, backends(found, work), repository, ports)
        began = time.monotonic()
        with open(work / "server.log", "wb") as log:
            process = subprocess.Popen(
                [*command, *options],
                env={**environment(found, python), **env},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=ending_with_parent(),
            )
        server = Server(*ports, process, work / "server.log")
        try:
            if ready(server, began + timeout):
                server.seconds = time.monotonic() - began
                return server
        except BaseException:
            server.stop()
            raise
        ended = process.poll()
        server.stop()
        if "in use" not in server.last_words(100).lower():
            break
    how = f"did not become ready in {timeout:.0f} s" if ended is None else f"ended with {ended}"
    raise GrcError(f"tritonserver {how}:\n{server.last_words()}", f"see its whole log: {kept(server.log)}")


def ending_with_parent() -> Callable[[], None]:
    """What a child does before it becomes a program that gets SIGTERM when its parent's thread ends, however that comes."""
    parent, prctl = os.getpid(), ctypes.CDLL(None).prctl  # found here: a child of threads should do as little as it can

    def ask() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler of ours would swallow it until the program is there
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM.value)
        if os.getppid() != parent:  # it ended sooner than it was asked
            os.kill(os.getpid(), signal.SIGTERM)

    return ask


def kept(log: Path) -> str:
    """A copy of the log that outlives the server's folder."""
    number, path = tempfile.mkstemp(prefix="grc-tritonserver-", suffix=".log")
    with open(number, "wb") as copy:
        copy.write(log.read_bytes())
    return path


def ready(server: Server, deadline: float) -> bool:
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{server.at('http')}/v2/health/ready", timeout=2) as answer:
                if answer.status == 200:
                    return True
        except OSError:
            time.sleep(0.05)
    return False


def free_ports() -> tuple[int, int, int]:
    with socket.socket() as a, socket.socket() as b, socket.socket() as c:
        for each in (a, b, c):
            each.bind(("127.0.0.1", 0))
        return a.getsockname()[1], b.getsockname()[1], c.getsockname()[1]


def backends(found: Installation, work: Path) -> Path:
    """The folder of backends; for the wheel one of our own, with the stub of this Python beside the Python backend."""
    if found.stubs is None:
        return found.backends
    folder = work / "backends"
    if not folder.exists():
        shutil.copytree(found.backends / "python", folder / "python")
        stub = found.stubs / f"{sys.version_info[0]}.{sys.version_info[1]}" / "triton_python_backend_stub"
        shutil.copy(stub, folder / "python")
        (folder / "python/triton_python_backend_stub").chmod(0o755)
    return folder


def environment(found: Installation, python: str | os.PathLike[str] | None) -> dict[str, str]:
    """The stub embeds Python and takes the packages of the `python` that comes first on PATH."""
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", "1")
    env["PATH"] = f"{Path(python or sys.executable).parent}:{env.get('PATH', '')}"
    env.pop("PYTHONHOME", None)
    env.pop("PYTHONPATH", None)  # a model runs on the runtime in its own folder, not on ours
    if found.libraries is not None:
        env["LD_LIBRARY_PATH"] = f"{library_folder()}:{found.libraries}"
    return env


def command_line(found: Installation, folder: Path, repository: Path, ports: Sequence[int]) -> list[str]:
    names = ("http", "grpc", "metrics")
    return [
        str(found.binary),
        f"--model-repository={repository}",
        f"--backend-directory={folder}",
        f"--cache-directory={found.caches}",
        "--disable-auto-complete-config",  # it would import every model twice
        *(f"--{name}-address=127.0.0.1" for name in names),
        *(f"--{name}-port={port}" for name, port in zip(names, ports, strict=True)),
        f"--exit-timeout-secs={EXIT_SECONDS}",
        f"--backend-config=python,shm-region-prefix-name={region(ports[0])}",
    ]
