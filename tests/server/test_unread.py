"""A connection whose client does not read its answers: what it sent waits, and in the end it is cut off."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("httptools", reason="needs grc-compiler[serve]")

from grc.runtime.server import connection
from grc.runtime.server.connection import Connection
from grc.runtime.server.listener import Listener
from grc.runtime.server.settings import Settings

LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"


class Unread:
    """A transport whose client reads nothing until it is told to."""

    def __init__(self) -> None:
        self.sent, self.unsent, self.reading, self.aborted, self.shut = 0, 0, True, False, False
        self.protocol: Any = None

    def write(self, data: bytes) -> None:
        self.sent += 1
        self.unsent += len(data)
        self.protocol.pause_writing()

    def read(self, size: int) -> None:
        self.unsent -= size
        if not self.unsent:
            self.protocol.resume_writing()

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def is_closing(self) -> bool:
        return self.aborted or self.shut

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def close(self) -> None:
        self.shut = True

    def abort(self) -> None:
        self.aborted = True


def unread() -> Unread:
    """Within a loop: a connection whose requests are answered at once."""
    transport, limits = Unread(), Settings()
    answer = lambda exchange: exchange.answer(200, b"text/plain", b"", b"id")  # noqa: E731
    listener: Any = Listener(answer, lambda: None, limits, asyncio.get_running_loop())
    transport.protocol = Connection(listener)
    transport.protocol.connection_made(transport)
    return transport


def test_requests_wait_while_their_client_does_not_read() -> None:
    async def story() -> None:
        transport = unread()
        transport.protocol.data_received(3 * LIVE)
        await asyncio.sleep(0.01)
        for sent in (1, 2, 3):
            assert (transport.sent, transport.reading) == (sent, False)
            transport.read(transport.unsent)
            await asyncio.sleep(0)
        assert (transport.sent, transport.reading) == (3, True)

    asyncio.run(story())


@pytest.mark.parametrize("ends", [False, True])
def test_a_client_that_never_reads_is_cut_off(monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    """Also where the connection was closed behind its answer, and waits for it to leave."""
    monkeypatch.setattr(connection, "KEEP_ALIVE", 0.1)

    async def story() -> None:
        transport = unread()
        transport.protocol.data_received(LIVE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") if ends else LIVE)
        for _ in range(8):
            await asyncio.sleep(0.05)
            transport.read(1)
        assert not transport.aborted, "it reads, if slowly"
        assert transport.shut is ends
        await asyncio.sleep(0.4)
        assert transport.aborted

    asyncio.run(story())
