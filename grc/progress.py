"""Progress: what the compiler is doing, told to whoever wants to know."""

from __future__ import annotations

import time
from typing import Any, Protocol


class Progress(Protocol):
    """Told what the compiler is doing: a stage begins, goes on with a detail, and ends with a summary."""

    def begin(self, stage: str) -> None: ...
    def detail(self, text: str) -> None: ...
    def end(self, summary: str) -> None: ...


class Silent:
    """Progress for programs."""

    def begin(self, stage: str) -> None: ...
    def detail(self, text: str) -> None: ...
    def end(self, summary: str) -> None: ...


class Timed:
    """Progress that also keeps every stage with its summary and seconds, for the manifest."""

    def __init__(self, told: Progress):
        self.told = told
        self.stages: list[dict[str, Any]] = []

    def begin(self, stage: str) -> None:
        self.stages.append({"name": stage, "summary": "", "seconds": 0.0})
        self.start = time.perf_counter()
        self.told.begin(stage)

    def detail(self, text: str) -> None:
        self.told.detail(text)

    def end(self, summary: str) -> None:
        self.stages[-1] |= {"summary": summary, "seconds": round(time.perf_counter() - self.start, 3)}
        self.told.end(summary)
