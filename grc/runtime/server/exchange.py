"""An exchange: a request that came whole, and the one write by which its answer goes back."""

from __future__ import annotations

import http
import time
from collections.abc import Callable, Sequence
from email.utils import formatdate
from typing import TYPE_CHECKING

from grc.runtime.server.refusal import Refused

if TYPE_CHECKING:
    from grc.runtime.server.connection import Connection

Header = tuple[bytes, bytes]
LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}


class Exchange:
    """`fault` is why the request never became whole; `lost` is called when nobody waits for the answer any more."""

    __slots__ = ("body", "connection", "fault", "gone", "headers", "keep_alive", "lost", "method", "url")

    def __init__(
        self,
        connection: Connection,
        method: bytes,
        url: bytes,
        headers: dict[bytes, bytes],
        body: bytes,
        keep_alive: bool,
        fault: Refused | None = None,
    ):
        self.connection, self.method, self.url, self.headers, self.body = connection, method, url, headers, body
        self.keep_alive, self.fault = keep_alive, fault
        self.gone = False
        self.lost: Callable[[Refused], None] | None = None

    def drop(self, reason: Refused) -> None:
        """Nobody waits for the answer any more, its client or the server."""
        if self.lost is not None and not self.gone:
            self.lost(reason)
        self.gone = True

    def answer(self, status: int, kind: bytes, body: bytes, id: bytes, more: Sequence[Header] = ()) -> None:
        """Head and body leave in one system call, so that they wake the client once."""
        if self.gone or self.connection.transport.is_closing():
            return
        # An answer without content has no length, says HTTP, and so no type either.
        about = b"" if status == 204 else b"content-type: %b\r\ncontent-length: %d\r\n" % (kind, len(body))
        parts = [
            LINES[status],
            DATE.line(),
            about,
            b"x-request-id: %b\r\n" % id,
            *(b"%b: %b\r\n" % header for header in more),
            b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n",
        ]
        if self.method != b"HEAD":
            parts.append(body)
        self.connection.answered(self, b"".join(parts))


class Date:
    """The header that tells when an answer was made, written anew once a second."""

    def __init__(self) -> None:
        self.second, self.text = 0, b""

    def line(self) -> bytes:
        now = int(time.time())
        if now != self.second:
            self.second, self.text = now, f"date: {formatdate(now, usegmt=True)}\r\n".encode()
        return self.text


DATE = Date()
