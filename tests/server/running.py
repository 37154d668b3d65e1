"""A server as its users run it: a process of its own, on free ports."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


def needs_extra() -> None:
    """Skip where one of the packages that a server needs is missing."""
    for name in ("httptools", "orjson", "uvloop"):
        pytest.importorskip(name, reason="needs grc-compiler[serve]")


PATIENCE = 60.0  # seconds: a shared machine may be slow to start a process


@dataclass
class Running:
    process: subprocess.Popen[str]
    words: Path
    http: int = 0
    grpc: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    def said(self) -> str:
        return self.words.read_text()

    def events(self) -> list[dict[str, Any]]:
        """The lines of its log."""
        return [json.loads(line) for line in self.said().splitlines() if line.startswith("{")]

    def wait_for(self, event: str) -> dict[str, Any]:
        """The first line of the log that tells of an event."""
        for _ in until(f"the event {event!r}"):
            for found in self.events():
                if found["event"] == event:
                    return found
            assert self.process.poll() is None, self.said()
        raise AssertionError

    def wait_for_end(self) -> list[str]:
        """The events of its whole log, once it has ended."""
        self.process.wait(PATIENCE)
        return [event["event"] for event in self.events()]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def ask(
        self, path: str, body: bytes | None = None, method: str | None = None, **headers: str
    ) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers of an answer, whatever the status."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, body, sent, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, answer.read(), dict(answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(), dict(error.headers)

    def error(self, path: str, body: bytes | None = None, method: str | None = None, **headers: str) -> tuple[int, str]:
        """Status and words of a refusal."""
        status, text, _ = self.ask(path, body, method, **headers)
        return status, json.loads(text)["error"]

    def metric(self, series: str) -> float:
        """The value of a series as Prometheus reads it: `name{label="value"}`; 0 where it is not there yet."""
        text = self.ask("/metrics")[1].decode()
        found = re.search(rf"^{re.escape(series)} (\S+)$", text, re.M)
        return float(found[1]) if found else 0.0


def until(what: str, patience: float = PATIENCE) -> Iterator[None]:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        yield
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come within {patience} s")


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "grc", "serve", *map(str, words)]


@contextmanager
def running(folder: Path, *words: object) -> Iterator[Running]:
    """`grc serve WORDS` on free ports, stopped at the end if it still runs."""
    said = folder / f"server-{time.monotonic_ns()}.log"
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with said.open("w") as log:
        process = subprocess.Popen(
            command(*words, "--port", 0, "--grpc-port", 0, "--server", "own"), stderr=log, env=environment, text=True
        )
    server = Running(process, said)
    try:
        for _ in until("the server"):
            assert process.poll() is None, server.said()
            found = re.search(r"http://127\.0\.0\.1:(\d+).*\n\s+grpc\s+127\.0\.0\.1:(\d+)\n", server.said())
            if found:
                server.http, server.grpc = int(found[1]), int(found[2])
                break
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
