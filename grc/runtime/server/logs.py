"""Logs: one JSON object a line on stderr, each with the id of the request it is about."""

from __future__ import annotations

import datetime
import itertools
import logging
import os
import re
import sys
from typing import Any, TextIO

import orjson

LONGEST_ID = 128  # characters of a client's request id that are kept
UNSAFE = re.compile(r"[^!-~]")


class Log:
    def __init__(self, stream: TextIO | None = None):
        self.stream = stream or sys.stderr

    def __call__(self, level: str, event: str, **fields: Any) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = orjson.dumps({"time": now, "level": level, "event": event, **fields}, default=str)
        self.stream.write(line.decode() + "\n")
        self.stream.flush()


class Forwarded(logging.Handler):
    """What the libraries below say by Python's logging, in the same form."""

    def __init__(self, log: Log):
        super().__init__(logging.WARNING)
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        more = {"error": f"{type(error).__name__}: {error}"} if error is not None else {}
        self.log(record.levelname.lower(), "library", logger=record.name, message=record.getMessage(), **more)


def forward(log: Log) -> None:
    """Also Python's warnings, which artifacts' own functions may raise."""
    logging.captureWarnings(True)
    for name in ("grpc", "asyncio", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers = [Forwarded(log)]
        logger.propagate = False


BEGUN = os.urandom(4).hex()  # tells this process' requests from those of others
COUNT = itertools.count()


def request_id() -> str:
    return f"{BEGUN}{next(COUNT):08x}"


def clean_id(text: str) -> str:
    """A client's own id as it may stand in a header and in a line of log: a line break in it would begin another one."""
    return UNSAFE.sub("_", text[:LONGEST_ID])
