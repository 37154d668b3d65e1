"""Timing: engines take turns in short bursts, so that noise falls on all alike while each runs as it would alone."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BURST = 0.1  # seconds: long beside a call, short beside the drift of a shared machine
# Threads of the engine before spin on after their last call and would be charged to this one: after ONNX Runtime's, a
# 6-layer Transformer on two cores took twice its time for up to 40 ms (seen on Zen 4).
SETTLE = 0.06
LEAD_IN = 0.005  # the engine's own weights come back to the caches meanwhile
FEWEST = 5
CROWDED = 0.25  # the share of our threads' processors that others may take: what runs in turns loses that much alike


@dataclass(frozen=True)
class Timing:
    """Microseconds over all recorded calls. `spread` is the middle half's width over the median."""

    p50: float
    p99: float
    least: float
    spread: float
    calls: int


def summarise(seconds: Sequence[float]) -> Timing:
    """Raises ValueError for no calls at all."""
    if not seconds:
        raise ValueError("nothing was timed")
    ordered = sorted(seconds)
    median = statistics.median(ordered)
    width = quantile(ordered, 0.75) - quantile(ordered, 0.25)
    return Timing(median * 1e6, quantile(ordered, 0.99) * 1e6, ordered[0] * 1e6, width / median, len(ordered))


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed, so that a p99 is a time that was really seen."""
    rank = -int(-share * len(ordered) // 1)
    return ordered[max(rank, 1) - 1]


@dataclass
class Turn:
    """One engine of a run: a call on the request of a given index, and the times it recorded, in seconds.

    A call that answers with a float has measured its own seconds.

    `device` times the same call by the device's own clock; it runs after the wall clock has stopped.
    """

    call: Callable[[int], Any]
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    device: Callable[[int], float] | None = None
    offset: int = 0

    def __post_init__(self) -> None:
        self.seconds: list[float] = []
        self.device_seconds: list[float] = []
        self.cursor = self.offset

    def spent(self) -> float:
        return sum(self.seconds) + sum(self.device_seconds)

    def wants(self, seconds: float, most: float) -> bool:
        """Whether there are fewer than `seconds` of recorded calls, or fewer than five and than `most` seconds of them."""
        spent = self.spent()
        return spent < seconds or (len(self.seconds) < FEWEST and spent < most)

    def burst(self, pool: int, burst: float, lead_in: float, settle: float) -> None:
        time.sleep(settle)
        with self.scope():
            begin = time.perf_counter()
            while True:
                self.call(self.advance(pool))
                if time.perf_counter() - begin >= lead_in:
                    break
            begin = time.perf_counter()
            for recorded in range(1 << 30):
                if recorded >= 2 and time.perf_counter() - begin >= burst:
                    return
                index = self.advance(pool)
                start = time.perf_counter()
                answer = self.call(index)
                seconds = time.perf_counter() - start
                self.seconds.append(answer if isinstance(answer, float) else seconds)
                if self.device is not None:
                    self.device_seconds.append(self.device(index))

    def advance(self, pool: int) -> int:
        self.cursor = (self.cursor + 1) % pool
        return self.cursor


def interleave(
    turns: Sequence[Turn],
    pool: int,
    seconds: float,
    burst: float = BURST,
    lead_in: float = LEAD_IN,
    settle: float = SETTLE,
    most: float = math.inf,
) -> None:
    """Give every engine `seconds` of recorded calls, and five calls at least, or two where those take `most` seconds and
    more, burst by burst in turns.

    Each starts at another place in the pool of requests: none finds the rows that the one before it has just read.
    """
    for number, turn in enumerate(turns):
        turn.cursor = turn.offset = number * pool // len(turns)
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        waiting = list(turns)
        while waiting:
            for turn in waiting:
                turn.burst(pool, burst, lead_in, settle)
            waiting = [turn for turn in waiting if turn.wants(seconds, most)]
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class Processors:
    """Seconds that this host's processors worked, those that this process and its workers had of them, and the clock."""

    busy: float
    own: float
    clock: float

    @classmethod
    def now(cls, workers: Iterable[int] = (), proc: Path = Path("/proc")) -> Processors | None:
        """None where the host does not tell, which only Linux does. `workers` are numbers of processes."""
        second = os.sysconf("SC_CLK_TCK")
        try:
            user, nice, system, _, _, *others = map(int, (proc / "stat").read_text().split("\n")[0].split()[1:9])
            theirs = [
                (proc / str(worker) / "stat").read_text().rpartition(")")[2].split()[11:13] for worker in {*workers}
            ]
        except (OSError, ValueError):
            return None
        own = time.process_time() + sum(int(ticks) for times in theirs for ticks in times) / second
        return cls((user + nice + system + sum(others)) / second, own, time.perf_counter())

    def crowded(self, later: Processors, threads: int, cores: int) -> str | None:
        """What is to be told where others took processors that `threads` of ours were waiting for."""
        others = (later.busy - self.busy - later.own + self.own) / max(later.clock - self.clock, 1e-9)
        if others + threads - cores <= CROWDED * threads:
            return None
        return (
            f"other programs took {others:.1f} of {cores} cores while the engines were measured: times, and which of them is "
            "the fastest, may be wrong; measure again when the host is idle"
        )


@contextmanager
def crowding(threads: int, workers: Sequence[int] = ()) -> Iterator[list[str]]:
    """A list that holds at the end what is to be told about other programs meanwhile."""
    notes: list[str] = []
    before = Processors.now(workers)
    yield notes
    after = Processors.now(workers)
    if before and after and (note := before.crowded(after, threads, os.cpu_count() or 1)):
        notes.append(note)
