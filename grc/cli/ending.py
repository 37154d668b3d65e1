"""SIGTERM ends a command as an exit does, so that a half-written artifact is removed."""

from __future__ import annotations

import signal
import sys

CODE = 128 + signal.SIGTERM
asked = False


def end(number: int, frame: object) -> None:
    """The signal's handler. An exit that rises in a callback of C code or a destructor is lost: `check` repeats it."""
    global asked
    asked = True
    sys.exit(CODE)


def check() -> None:
    """Leave if a signal asked for it; called wherever a command tells its progress."""
    if asked:
        sys.exit(CODE)
