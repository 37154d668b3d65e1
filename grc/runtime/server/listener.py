"""The listener: takes connections, and sees them off when the server ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from grc.runtime.server.connection import Connection
from grc.runtime.server.exchange import Exchange
from grc.runtime.server.settings import Settings

BACKLOG = 2048


class Listener:
    """`handle` gets every request that is whole, or has a fault; `cut_short` is told of clients that left in one."""

    def __init__(
        self,
        handle: Callable[[Exchange], None],
        cut_short: Callable[[], None],
        limits: Settings,
        loop: asyncio.AbstractEventLoop,
    ):
        self.handle, self.cut_short, self.limits, self.loop = handle, cut_short, limits, loop
        self.connections: set[Connection] = set()
        self.server: asyncio.Server | None = None

    async def listen(self, sock: socket.socket) -> None:
        self.server = await self.loop.create_server(lambda: Connection(self), sock=sock, backlog=BACKLOG)

    async def drain(self, seconds: float) -> None:
        """Take no new connection, close those that idle, and wait for the others' answers."""
        assert self.server is not None
        self.server.close()
        for connection in list(self.connections):
            connection.shut()
        end = self.loop.time() + seconds
        while self.connections and self.loop.time() < end:
            await asyncio.sleep(0.02)
        for connection in list(self.connections):
            connection.transport.abort()
