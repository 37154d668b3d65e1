"""A client's connection: HTTP/1.1 as llhttp reads it, whose requests are handed over whole, one after the other.

An ASGI server hands over head and body apart, to a task of its own for every request: for a request as small as one to a
recommender that is as much work as all the rest.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

import httptools

from grc.runtime.server.exchange import Exchange
from grc.runtime.server.refusal import Refused, ended, gone, invalid, too_large

if TYPE_CHECKING:
    from grc.runtime.server.listener import Listener

# Seconds; longer than clients and proxies idle, so that they close and not this side. A client that reads nothing of its
# answers for as long is not there any more.
KEEP_ALIVE = 75.0
HALF_CLOSED = 0.25  # seconds in which a client that ended its side gets its answer: one that left looks the same
LINGER = 2.0  # seconds in which a client may read why it was refused, while what it still sends is dropped


class Connection(asyncio.Protocol):
    """Reads one request at a time; what a client sends before it has its answer waits."""

    transport: asyncio.Transport

    def __init__(self, listener: Listener):
        self.listener, self.limits, self.loop = listener, listener.limits, listener.loop
        self.parser: Any = httptools.HttpRequestParser(self)
        self.exchange: Exchange | None = None  # the one that is being answered
        self.waiting: deque[Exchange] = deque()
        self.closing = False  # nothing more is read
        self.last = False  # what has begun is the last request
        self.paused = False  # the client has not read its answers yet
        self.written = 0  # bytes of answers
        self.stuck: int | None = None  # how many of them had left at the last look, where not all had
        self.slow: asyncio.TimerHandle | None = None
        self.begun = self.headed = False
        self.headless = 0  # bytes of a head that is not complete, but for those that came with what was before it

    # What the loop tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.surplus = len(self.listener.connections) >= self.limits.max_connections
        self.listener.connections.add(self)
        self.used = self.loop.time()
        self.idle = self.loop.call_later(KEEP_ALIVE, self.check_idle)

    def data_received(self, data: bytes) -> None:
        if self.closing:
            return
        head_before = self.begun and not self.headed
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # It was answered as what it also is, plain HTTP; what follows is of no known protocol.
            self.closing = True
        except httptools.HttpParserError as error:
            cause = error.__context__
            self.refuse(cause if isinstance(cause, Refused) else Refused(400, f"this is no HTTP: {error}", "http"))
            return
        if self.begun:
            if head_before and not self.headed:
                self.headless += len(data)
                if self.headless > self.limits.max_head:
                    self.refuse(self.too_long())
                    return
            if self.slow is None:
                self.slow = self.loop.call_later(self.limits.body_timeout, self.too_slow)

    def eof_received(self) -> bool:
        """A client may end its side behind its last request, and wait for the answer."""
        if self.begun:
            self.refuse(self.cut_short())
        newest = self.waiting[-1] if self.waiting else self.exchange
        if newest is None:
            return False
        self.closing, newest.keep_alive = True, False
        self.loop.call_later(HALF_CLOSED, self.leave)
        return True

    def leave(self) -> None:
        if self.paused:  # it reads, if slowly, or `check_idle` will see that it doesn't
            self.loop.call_later(HALF_CLOSED, self.leave)
        elif self.exchange is not None or self.waiting:
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.closing = True
        self.listener.connections.discard(self)
        self.idle.cancel()
        if self.slow is not None:
            self.slow.cancel()
        if self.begun and self.headed:
            self.listener.cut_short()
        self.parser = None  # it holds this object
        for exchange in (self.exchange, *self.waiting):
            if exchange is not None:
                exchange.drop(gone("its answer"))

    def pause_writing(self) -> None:
        """A client that does not read its answers may send no more requests, and those that it sent wait."""
        self.paused = True
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.paused = False
        if self.waiting:
            self.next()
        elif not self.transport.is_closing():
            self.transport.resume_reading()

    # What the parser tells

    def on_message_begin(self) -> None:
        self.begun, self.headed = True, False
        self.url, self.headers = b"", {}  # type: tuple[bytes, dict[bytes, bytes]]
        self.head = self.size = self.headless = 0
        self.parts: list[bytes] = []

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.head += len(name) + len(value)
        if self.head > self.limits.max_head:
            raise self.too_long()
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self.headed = True
        if len(self.url) + self.head > self.limits.max_head:
            raise self.too_long()
        if int(self.headers.get(b"content-length", 0)) > self.limits.max_body:
            raise too_large(self.limits.max_body)
        if self.headers.get(b"expect", b"").lower() == b"100-continue" and self.exchange is None:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self.size += len(body)
        if self.size > self.limits.max_body:
            raise too_large(self.limits.max_body)
        self.parts.append(body)

    def on_message_complete(self) -> None:
        self.begun = False
        if self.slow is not None:
            self.slow.cancel()
            self.slow = None
        parts = self.parts
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        parser = self.parser
        stays = parser.should_keep_alive() and not parser.should_upgrade() and parser.get_http_version() != "1.0"
        stays = stays and not self.last
        self.take(Exchange(self, parser.get_method(), self.url, self.headers, body, stays))

    # Requests and answers, in order

    def take(self, exchange: Exchange) -> None:
        if self.exchange is not None or self.waiting or self.paused:
            self.waiting.append(exchange)
            self.transport.pause_reading()
        else:
            self.begin(exchange)

    def begin(self, exchange: Exchange) -> None:
        if self.surplus and exchange.fault is None:
            exchange.fault = Refused(
                503, f"the server has its {self.limits.max_connections} connections", "connections", 1.0
            )
        if exchange.fault is not None:
            exchange.keep_alive = False
        self.exchange = exchange
        self.listener.handle(exchange)

    def answered(self, exchange: Exchange, data: bytes) -> None:
        self.transport.write(data)
        self.written += len(data)
        self.exchange = None
        self.used = self.loop.time()
        if not exchange.keep_alive:
            self.finish(exchange)
        elif self.waiting:
            self.loop.call_soon(self.next)

    def next(self) -> None:
        if self.paused or self.exchange is not None or not self.waiting or self.transport.is_closing():
            return
        exchange = self.waiting.popleft()
        if exchange.gone:
            return
        self.begin(exchange)
        if not self.waiting and not self.paused and not self.transport.is_closing():
            self.transport.resume_reading()

    def finish(self, exchange: Exchange) -> None:
        self.closing = True
        if exchange.fault is None:
            self.transport.close()
            return
        # Closed now, what the client still sends would be answered by a reset, and the answer be lost with it.
        self.transport.write_eof()
        self.loop.call_later(LINGER, self.transport.close)

    def refuse(self, fault: Refused) -> None:
        """A request that never became whole gets its answer in its turn, and none is read after it."""
        self.closing, self.begun = True, False
        if self.slow is not None:
            self.slow.cancel()
        self.take(Exchange(self, b"", b"", {}, b"", False, fault))

    def too_slow(self) -> None:
        what = "body" if self.headed else "head"
        self.refuse(Refused(408, f"the {what} did not come within {self.limits.body_timeout:g} s", "slow"))

    def cut_short(self) -> Refused:
        """What is told where the client ends its side inside of a request."""
        size = self.headers.get(b"content-length")
        if not self.headed:
            return invalid("the request ends inside of its head", "truncated")
        of = "bytes, inside of its chunks" if size is None else f"of {int(size)} bytes"
        return invalid(f"the body ends after {self.size} {of}", "truncated")

    def too_long(self) -> Refused:
        return Refused(431, f"the head of the request is longer than {self.limits.max_head} bytes", "too_large")

    def check_idle(self) -> None:
        """Close where nothing has come for long; where a client reads nothing either, closing would wait for it."""
        unsent = self.transport.get_write_buffer_size()
        stuck = self.written - unsent if unsent else None
        if stuck is not None and stuck == self.stuck:
            self.transport.abort()
            return
        self.stuck = stuck
        busy = self.exchange or self.begun or unsent
        left = KEEP_ALIVE if busy else self.used + KEEP_ALIVE - self.loop.time()
        if left <= 0:
            self.transport.close()
        else:
            self.idle = self.loop.call_later(left, self.check_idle)

    def shut(self) -> None:
        """Close when what has begun is answered."""
        self.last = True
        newest = self.waiting[-1] if self.waiting else self.exchange
        if self.begun:
            return
        if newest is None:
            self.transport.close()
        else:
            newest.keep_alive = False

    def end(self) -> None:
        """Wait no longer: what is not answered is refused."""
        begun, self.begun, self.closing = self.begun, False, True
        if self.exchange is not None:
            self.exchange.keep_alive = False
        elif begun:
            self.refuse(ended("the request was whole"))
        for exchange in (self.exchange, *self.waiting):
            if exchange is not None:
                exchange.drop(ended("the answer"))
