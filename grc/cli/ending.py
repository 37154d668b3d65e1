"""SIGINT and SIGTERM end a command as an exception does, so that a half-written artifact is removed."""

from __future__ import annotations

import signal

CODE = 128 + signal.SIGTERM
asked: BaseException | None = None


def end(number: int, frame: object) -> None:
    """The signals' handler. What rises in a callback of C code or a destructor is lost: `check` repeats it."""
    global asked
    asked = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(CODE)
    raise asked


def check() -> None:
    """Leave if a signal asked for it; called wherever a command tells its progress."""
    if asked is not None:
        raise asked
