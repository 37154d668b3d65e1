"""grc serve: artifacts behind the Open Inference Protocol, over HTTP and gRPC."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import Annotated, Any, Literal

import typer

from grc.cli import parameters as p
from grc.cli.errors import Traceback, say

NAME = "serve"
EXAMPLES = (
    "grc serve model.grc",
    "grc serve dlrm.grc films=movielens.grc --port 8080 --no-grpc",
    "grc serve versions/dlrm                          a folder of versions: versions/dlrm/1, versions/dlrm/2, …",
    "curl -d @request.json localhost:8000/v2/models/films/recommend",
)
KB, MB = 1 << 10, 1 << 20


def command(
    ctx: typer.Context,
    artifacts: Annotated[
        list[str], typer.Argument(metavar="[NAME=]PATH…", help="Artifacts, or folders of versions named 1, 2, ….")
    ],
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; only this host by default.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="Port of HTTP; 0 takes a free one.")] = 8000,
    grpc_port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Port of gRPC; 0 takes a free one.")
    ] = 8001,
    grpc: Annotated[bool, typer.Option("--grpc/--no-grpc", help="Whether to listen for gRPC.")] = True,
    server: Annotated[
        Literal["auto", "own", "triton"],
        typer.Option(help="grc's own server, or a tritonserver of this host on an exported repository."),
    ] = "auto",
    engine: Annotated[str | None, typer.Option(metavar="NAME", help="Answer with one of the artifact's parts.")] = None,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Batches that are computed at once.")] = 1,
    threads: Annotated[
        int, typer.Option(metavar="N", min=0, help="Threads that compute a batch; 0 takes all cores but one.")
    ] = 0,
    max_rows: Annotated[int, typer.Option(metavar="N", min=1, help="Rows of a merged batch.")] = 256,
    max_queue: Annotated[int, typer.Option(metavar="N", min=1, help="Requests of a model that may wait.")] = 1024,
    timeout: Annotated[
        float, typer.Option(metavar="S", min=0.001, help="Seconds for a request that names no time of its own.")
    ] = 10.0,
    max_body: Annotated[int, typer.Option(metavar="MB", min=1, help="Size of a request.")] = 64,
    max_head: Annotated[int, typer.Option(metavar="KB", min=1, help="Size of a request's line and headers.")] = 64,
    max_connections: Annotated[
        int, typer.Option(metavar="N", min=1, help="Connections over HTTP, and calls at once over gRPC.")
    ] = 4096,
    max_depth: Annotated[
        int, typer.Option(metavar="N", min=1, help="How deep the JSON of a request for recommendations may nest.")
    ] = 32,
    body_timeout: Annotated[
        float, typer.Option(metavar="S", min=0.1, help="Seconds in which a request must have come.")
    ] = 10.0,
    feature_cache: Annotated[
        int, typer.Option(metavar="MB", min=0, help="Keep users' features, for requests that name user and version.")
    ] = 0,
    feature_ttl: Annotated[float, typer.Option(metavar="S", min=0, help="How long features are used for.")] = 60.0,
    answer_cache: Annotated[
        int, typer.Option(metavar="MB", min=0, help="Keep answers, for requests that are the same.")
    ] = 0,
    answer_ttl: Annotated[float, typer.Option(metavar="S", min=0, help="How long an answer is given again.")] = 60.0,
    watch: Annotated[
        float, typer.Option(metavar="S", min=0, help="Seconds between looks for new versions; 0 never looks.")
    ] = 2.0,
    canary: Annotated[
        float, typer.Option(metavar="S", min=0.1, help="Seconds between golden requests that prove readiness.")
    ] = 10.0,
    drain: Annotated[
        float, typer.Option(metavar="S", min=1, help="Seconds that requests in flight get after SIGTERM.")
    ] = 30.0,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log every request, not only failures.")] = False,
    traceback: Traceback = False,
) -> None:
    """Serve artifacts over HTTP and gRPC: tensors to tensors, and behaviours to recommendations.

    Each artifact's checksums and golden requests are checked before it takes traffic, and a new version that appears on
    disk replaces the one before it in the same way, with no request lost. SIGTERM ends the server when all are answered.
    """
    from grc.cli import triton_server

    check_ports(port, grpc_port if grpc else None)
    given = p.given(ctx)
    chosen, why = triton_server.choose(server, triton_server.unknown(given), artifacts)
    if chosen == "own":
        sleeping_threads()
    say(f"server: {chosen}, {why}")
    if chosen == "triton":
        settings_of_triton = triton_server.settings({name: ctx.params[name] for name in given})
        raise typer.Exit(
            triton_server.run(
                artifacts, triton_server.Told(host, port, grpc_port if grpc else None, drain), settings_of_triton
            )
        )
    serving = serving_part()
    settings = serving.Settings(
        host=host,
        port=port,
        grpc_port=grpc_port if grpc else None,
        engine=engine,
        workers=workers,
        threads=threads,
        max_rows=max_rows,
        max_queue=max_queue,
        timeout=timeout,
        max_body=max_body * MB,
        max_head=max_head * KB,
        max_connections=max_connections,
        max_depth=max_depth,
        body_timeout=body_timeout,
        feature_cache=feature_cache * MB,
        feature_ttl=feature_ttl,
        answer_cache=answer_cache * MB,
        answer_ttl=answer_ttl,
        watch=watch,
        canary=canary,
        drain=drain,
        access_log=access_log,
    )
    serving.serve(serving.sources(artifacts), settings, tell_loaded, tell_listening)
    leave()


def leave() -> None:
    """End the process where a thread is still busy, with an artifact's own functions say: Python would wait for it."""
    if any(thread.name.startswith("grc-") for thread in threading.enumerate()):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def check_ports(port: int, grpc_port: int | None) -> None:
    """Refuse one port for both protocols before any work is done; 0 takes two free ones."""
    from grc.errors import GrcError

    if port and port == grpc_port:
        raise GrcError(f"--port and --grpc-port are both {port}", "choose another for one of them, or --no-grpc")


def serving_part() -> Any:
    """The server's modules. Raises GrcError where its packages are missing."""
    from types import SimpleNamespace

    from grc import GrcError

    try:
        from grc.runtime.server.settings import Settings
        from grc.runtime.server.source import sources
        from grc.runtime.server.start import serve
    except ImportError as error:
        raise GrcError(f"grc serve needs {error.name}", "pip install 'grc-compiler[serve]'") from None
    return SimpleNamespace(Settings=Settings, sources=sources, serve=serve)


def sleeping_threads() -> None:
    """Start over with OpenMP's threads told to sleep when they wait, unless the environment says something else.

    They spin otherwise, on the cores that the event loop and the clients need. OpenMP reads this when it is loaded. The words
    are those that Python was started with: others, such as -m, would look for modules in other folders.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})


def tell_loaded(version: Any) -> None:
    batch = version.manifest["batch"]
    alone = version.merge.reason
    how = f"requests merge by rows up to batch {batch['max']}" if alone is None else f"requests run alone: {alone}"
    say(
        f"  {version.name:<12} version {version.number}, {version.engines()}; {how}; proven in {version.load_seconds:.1f} s"
    )


def tell_listening(where: Any) -> None:
    host = f"[{where.host}]" if ":" in where.host else where.host
    say(f"  http         http://{host}:{where.http}/v2, docs at /docs, metrics at /metrics")
    if where.grpc is not None:
        say(f"  grpc         {host}:{where.grpc}")
