"""Logs: one JSON object a line on stderr, each with the id of the request it is about."""

from __future__ import annotations

import datetime
import os
import sys
from typing import Any, TextIO

import orjson


class Log:
    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr

    def __call__(self, level: str, event: str, **fields: Any) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = orjson.dumps({"time": now, "level": level, "event": event, **fields}, default=str)
        self.stream.write(line.decode() + "\n")
        self.stream.flush()


def request_id() -> str:
    return os.urandom(8).hex()
