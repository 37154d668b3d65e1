"""How a command fails: `error: …`, then `hint: …`, and an exit code. A traceback is shown only to those who ask."""

from __future__ import annotations

import errno
import sys
import traceback
from types import TracebackType
from typing import Annotated

import typer

from grc.cli import ending
from grc.errors import GrcError

FAILED = 1
INTERRUPTED = 130


def remember(ctx: typer.Context, wanted: bool) -> bool:
    ctx.meta["traceback"] = wanted or ctx.meta.get("traceback", False)
    return wanted


Traceback = Annotated[
    bool, typer.Option("--traceback", callback=remember, help="Show the Python traceback of an error.")
]


class Failing:
    """Turns what a command raises into words on stderr and an exit code."""

    def __init__(self, ctx: typer.Context):
        self.ctx = ctx

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and isinstance(ending.asked, SystemExit):
            raise ending.asked
        if isinstance(error, KeyboardInterrupt):
            say("interrupted; nothing was written")
            raise typer.Exit(INTERRUPTED) from error
        words = describe(error)
        if words is None:
            return
        if self.ctx.meta.get("traceback"):
            sys.stderr.write("".join(traceback.format_exception(error)))
        message, hint = words
        say(f"error: {message}")
        if hint:
            say(f"hint: {hint}")
        raise typer.Exit(FAILED) from error


def describe(error: BaseException | None) -> tuple[str, str | None] | None:
    """Message and hint, or None where the error is not for grc to tell: a usage error, an exit, a closed pipe."""
    if isinstance(error, GrcError):
        return error.message, error.hint
    if isinstance(error, OSError) and error.errno != errno.EPIPE:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}", "choose another path, or free some space"
    if type(error).__module__.startswith(("typer", "click")) or isinstance(error, OSError) or error is None:
        return None
    if isinstance(error, Exception):
        return f"grc itself failed: {type(error).__name__}: {error}", "this is a fault of grc; see it with --traceback"
    return None


def say(text: str) -> None:
    """Words for people, on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
