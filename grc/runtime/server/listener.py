"""The listener: takes connections, and sees them off when the server ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from grc.runtime.server.connection import Connection
from grc.runtime.server.exchange import Exchange
from grc.runtime.server.settings import Settings

BACKLOG = 2048
FAREWELL = 0.2  # seconds in which the last refusals leave


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
        """Take no new connection, close those that idle, wait for the others' answers, and refuse what is left."""
        assert self.server is not None
        self.server.close()
        for connection in list(self.connections):
            connection.shut()
        await self.until_closed(seconds)
        for connection in list(self.connections):
            connection.end()
        await self.until_closed(FAREWELL)
        for connection in list(self.connections):
            connection.transport.abort()

    async def until_closed(self, seconds: float) -> None:
        end = self.loop.time() + seconds
        while self.connections and self.loop.time() < end:
            await asyncio.sleep(0.02)
