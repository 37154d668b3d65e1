"""The subject of a measurement: one model, captured, for every contender to build from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grc.errors import GrcError
from grc.graph.capture import Source


class BenchError(GrcError):
    """A measurement that can't be made as asked."""


@dataclass
class Subject:
    """The model's capture, where and on how many threads to run it, and a folder that contenders may write in.

    `built` keeps what a peer builds once for all batch sizes.
    """

    source: Source
    device: str
    threads: int
    folder: Path
    precision: str = "fp32"
    built: dict[str, Any] = field(default_factory=dict)
