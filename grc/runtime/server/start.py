"""Start: load and prove the models, listen, and end when told to, with every request answered."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import uvloop

from grc.runtime.server.health import Health
from grc.runtime.server.http_app import Http
from grc.runtime.server.listener import Listener
from grc.runtime.server.logs import Log, forward
from grc.runtime.server.models import Models
from grc.runtime.server.ports import free_port, listen
from grc.runtime.server.service import Service
from grc.runtime.server.settings import Settings
from grc.runtime.server.source import Source
from grc.runtime.server.version import Version

# Seconds that a thread may keep the interpreter while another waits for it. With the default of 5 ms, a batch that was
# computed waits behind a busy event loop; much less than 1 ms, and both spend their time on taking turns.
SWITCH = 1e-3
LAST = 0.2  # seconds that threads get to end after the time to drain


@dataclass(frozen=True)
class Listening:
    """Where the server can be reached, once it can."""

    host: str
    http: int
    grpc: int | None


def serve(
    sources: list[Source],
    settings: Settings,
    loaded: Callable[[Version], None] = lambda version: None,
    listening: Callable[[Listening], None] = lambda where: None,
    log: Log | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. Raises PortError or ArtifactError before anything listens."""
    log = log or Log()
    forward(log)
    http = listen(settings.host, settings.port, "--port")
    grpc_port = None if settings.grpc_port is None else free_port(settings.host, settings.grpc_port, "--grpc-port")
    # Engines read this when they are loaded. With a thread for every core, the loop and the clients wait for those that spin.
    torch.set_num_threads(settings.threads_of_a_batch())
    models = Models(settings.engine, log)
    for source in sources:
        loaded(models.open(source).version)
    sys.setswitchinterval(SWITCH)
    # What is loaded stays: a full collection that looks at all of torch's objects would stop every request for 100 ms.
    gc.collect()
    gc.freeze()
    uvloop.run(run(models, settings, http, grpc_port, log, listening))


async def run(
    models: Models,
    settings: Settings,
    sock: socket.socket,
    grpc_port: int | None,
    log: Log,
    listening: Callable[[Listening], None],
) -> None:
    loop = asyncio.get_running_loop()
    service = Service(settings, log, loop)
    service.metrics.collect_from(
        models.versions, {"features": service.features.cache, "answers": service.answers}, service.scheduler.waiting
    )
    models.replaced = service.scheduler.forget
    models.loaded = lambda name, ok: service.metrics.reloads.labels(name, "ok" if ok else "refused").inc()
    health = Health(service, models, settings.timeout)
    answering = Http(service, models, health, settings)
    listener = Listener(answering, answering.cut_short, settings, loop)
    told = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, told.set)
    for model in models.all.values():
        await health.probe(model)
    bound, drains = None, [listener.drain]
    if grpc_port is not None:
        from grc.runtime.server import grpc_service

        over_grpc = grpc_service.Grpc(service, models, health, settings)
        grpc_server, bound = await grpc_service.start(over_grpc, grpc_port)
        drains.append(partial(over_grpc.drain, grpc_server))
    tasks = [asyncio.create_task(health.watch(settings.canary))]
    if settings.watch:
        tasks.append(asyncio.create_task(models.watch(settings.watch)))
    await listener.listen(sock)
    listening(Listening(settings.host, sock.getsockname()[1], bound))
    await told.wait()
    end = loop.time() + settings.drain
    log("info", "draining", seconds=settings.drain)
    health.draining = True
    await asyncio.gather(*(drain(settings.drain) for drain in drains))
    for task in tasks:
        task.cancel()
    models.close()
    await loop.run_in_executor(None, service.close, max(LAST, end - loop.time()))
    log("info", "stopped")
