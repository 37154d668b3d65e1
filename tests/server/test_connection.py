"""An answer's head and body leave in one system call, in order, and before the connection closes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("httptools", reason="needs grc-compiler[serve]")

from grc.runtime.server.connection import Joined


class Transport:
    """Remembers what reached it, call by call."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.closing = False

    def writelines(self, parts: list[bytes]) -> None:
        self.calls.append(b"".join(parts))

    def close(self) -> None:
        self.calls.append("close")
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def get_extra_info(self, name: str) -> str:
        return f"the {name}"


def test_what_is_written_in_one_turn_is_sent_at_once() -> None:
    sent = Transport()

    async def story() -> None:
        joined = Joined(sent, asyncio.get_running_loop())
        joined.write(b"head ")
        joined.write(b"body")
        assert sent.calls == []
        await asyncio.sleep(0)
        joined.write(b"next")
        await asyncio.sleep(0)
        assert joined.get_extra_info("peername") == "the peername"

    asyncio.run(story())
    assert sent.calls == [b"head body", b"next"]


def test_closing_sends_what_is_held_and_nothing_after() -> None:
    sent = Transport()

    async def story() -> None:
        joined = Joined(sent, asyncio.get_running_loop())
        joined.write(b"last words")
        joined.close()
        joined.write(b"too late")
        await asyncio.sleep(0)

    asyncio.run(story())
    assert sent.calls == [b"last words", "close"]
