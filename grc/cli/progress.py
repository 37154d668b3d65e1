"""Progress of a compilation on stderr: a live line on a terminal, one plain line a stage elsewhere."""

from __future__ import annotations

import sys
import time
import warnings
from functools import partial
from typing import Any

from rich.console import Console
from rich.status import Status

from grc.cli.ending import check
from grc.cli.errors import say
from grc.errors import CalibrationWarning

WIDTH = 96  # columns of a line before its seconds


def stage_line(stage: str, summary: str, seconds: float) -> str:
    return f"  {stage:<10} {summary:<{WIDTH - 14}} {seconds:7.1f} s"


class Lines:
    """One line as each stage ends."""

    def begin(self, stage: str) -> None:
        check()
        self.stage, self.start = stage, time.perf_counter()

    def detail(self, text: str) -> None:
        check()

    def end(self, summary: str) -> None:
        check()
        say(stage_line(self.stage, summary, time.perf_counter() - self.start))


class Live(Lines):
    """The same lines, with a spinner that tells what is being done meanwhile."""

    def __init__(self, console: Console):
        self.console = console
        self.status: Status | None = None

    def begin(self, stage: str) -> None:
        super().begin(stage)
        self.status = self.console.status(stage)
        self.status.start()

    def detail(self, text: str) -> None:
        super().detail(text)
        if self.status is not None:
            self.status.update(f"{self.stage}: {text}")

    def end(self, summary: str) -> None:
        self.close()
        super().end(summary)

    def close(self) -> None:
        if self.status is not None:
            self.status.stop()
            self.status = None


def tell_warning(others: Any, message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
    if issubclass(category, CalibrationWarning):
        say(f"warning: {message}")
    else:
        others(message, category, *rest, **more)


class Reporting:
    """`with Reporting() as progress:` leaves the terminal as it was, whatever happens. grc's own warnings are lines of it."""

    def __enter__(self) -> Lines:
        self.warnings = warnings.catch_warnings()
        self.warnings.__enter__()
        warnings.simplefilter("always", CalibrationWarning)
        warnings.showwarning = partial(tell_warning, warnings.showwarning)
        # The stream as it is now: while torch.export runs, sys.stderr is redirected, and these lines must not be.
        self.progress = Live(Console(file=sys.stderr)) if sys.stderr.isatty() else Lines()
        return self.progress

    def __exit__(self, *_: object) -> None:
        self.warnings.__exit__(None, None, None)
        if isinstance(self.progress, Live):
            self.progress.close()
