"""The scheduler: what waits is merged by rows, the most urgent first; models share the workers fairly.

Urgent is what has the higher priority, 1 being the highest, and of one priority what is due first. Where priorities differ,
every fourth batch begins with what is due first of all, so that none is starved.

A request is refused at once when it can't make its deadline behind those that wait, so that no work is spent on answers
that come too late. Fairness between models is start-time fair queueing (Goyal et al. 1996): the model that used the least
time goes next, and one that slept does not save up time.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from grc.runtime.server.execute import execute
from grc.runtime.server.packed import Packed
from grc.runtime.server.refusal import Refused, out_of_time, too_late
from grc.runtime.server.version import Version

Tensors = list[torch.Tensor]
LOWEST = 1 << 64  # the priority of requests that name none
FAIR = 4  # batches, one of which begins with what is due first


class Waiter(Protocol):
    """Who gets an answer: a future, or what behaves like one. Used on the event loop, but for `cancelled`."""

    def done(self) -> bool: ...
    def cancelled(self) -> bool: ...
    def set_result(self, answer: Sequence[torch.Tensor], /) -> None: ...
    def set_exception(self, error: Exception, /) -> None: ...


@dataclass(slots=True, eq=False)
class Work:
    """A request that waits for its answer, or has it."""

    version: Version
    inputs: Packed | Tensors
    rows: int
    deadline: float
    future: Waiter
    queued: float
    call: Any = None
    priority: int = LOWEST
    started: float = 0.0
    ended: float = 0.0
    batch: int = 0
    answer: Sequence[torch.Tensor] | Exception | None = None

    def settle(self) -> None:
        if self.future.done():  # the client went away
            return
        if isinstance(self.answer, Exception):
            self.future.set_exception(self.answer)
        else:
            assert self.answer is not None
            self.future.set_result(self.answer)


@dataclass(eq=False)
class Line:
    """The requests of one version that wait, by the key under which they can be merged."""

    version: Version
    used: float = 0.0
    count: int = 0
    rows: int = 0
    taken: int = 0
    groups: dict[tuple[int, ...], list[tuple[int, float, int, Work]]] = field(default_factory=dict)
    levels: dict[int, tuple[int, int]] = field(default_factory=dict)  # by priority: how many wait, and their rows

    def add(self, work: Work, ticket: int) -> None:
        key = self.version.merge.group(work.inputs, work.rows)
        key = (-1, ticket) if key is None else key
        heapq.heappush(self.groups.setdefault(key, []), (work.priority, work.deadline, ticket, work))
        self.add_up(work.priority, 1, work.rows)

    def add_up(self, priority: int, count: int, rows: int) -> None:
        """Count requests that come to wait, or leave."""
        self.count += count
        self.rows += rows
        before = self.levels.pop(priority, (0, 0))
        if before[0] + count:
            self.levels[priority] = before[0] + count, before[1] + rows

    def ahead(self, priority: int) -> tuple[int, int]:
        """How many go before a request of this priority, and their rows."""
        if priority == LOWEST:
            return self.count, self.rows
        before = [about for level, about in self.levels.items() if level <= priority]
        return sum(count for count, _ in before), sum(rows for _, rows in before)

    def lift(self) -> None:
        """Let what is due first go first, whatever its priority."""
        heap, entry = min(((heap, entry) for heap in self.groups.values() for entry in heap), key=lambda e: e[1][1:3])
        heap.remove(entry)
        heapq.heapify(heap)
        heapq.heappush(heap, (0, *entry[1:]))

    def take(self, max_rows: int) -> list[Work]:
        """The most urgent request, and those of its key that fit beside it without making it late."""
        self.taken += 1
        if len(self.levels) > 1 and self.taken % FAIR == 0:
            self.lift()
        key = min(self.groups, key=lambda k: self.groups[k][0])
        heap = self.groups[key]
        limit = min(max_rows, self.version.max_rows)
        batch: list[Work] = []
        rows, due, now = 0, heap[0][1], time.monotonic()
        while heap:
            more = heap[0][3].rows
            if batch and (rows + more > limit or now + self.version.estimate.seconds(rows + more) > due):
                break
            work = heapq.heappop(heap)[3]
            batch.append(work)
            rows += work.rows
            self.add_up(work.priority, -1, -work.rows)
        if not heap:
            del self.groups[key]
        return batch

    def seconds(self, count: int, rows: int, max_rows: int) -> float:
        """Time to answer `rows` of `count` requests, in batches as they would be merged."""
        estimate = self.version.estimate
        if self.version.merge.reason is not None:
            return count * estimate.seconds(max(1, rows // max(count, 1)))
        limit = min(max_rows, self.version.max_rows)
        full, rest = divmod(rows, limit)
        return full * estimate.seconds(limit) + (estimate.seconds(rest) if rest else 0.0)


class Scheduler:
    """Lines of waiting requests and the threads that answer them."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        workers: int,
        max_rows: int,
        max_queue: int,
        finished: Callable[[list[Work]], None],
    ):
        self.loop, self.max_rows, self.max_queue, self.finished = loop, max_rows, max_queue, finished
        self.changed = threading.Condition()
        self.lines: dict[Version, Line] = {}
        self.active: dict[Version, Line] = {}  # those with requests that wait
        self.forgotten: weakref.WeakSet[Version] = weakref.WeakSet()
        self.tickets = itertools.count()
        self.clock = 0.0  # the time used by the line that was served last
        self.running: dict[int, float] = {}  # when each busy worker should be free again
        self.closed = False
        self.threads = [
            threading.Thread(target=self.work, name=f"grc-compute-{i}", daemon=True) for i in range(workers)
        ]
        for thread in self.threads:
            thread.start()

    def submit(self, work: Work) -> None:
        """Let a request wait. Raises Refused when too many do, or when it would be answered too late."""
        with self.changed:
            line = self.line_of(work.version)
            if line.count >= self.max_queue:
                wait = line.seconds(line.count, line.rows, self.max_rows)
                raise Refused(503, f"model {work.version.name} is busy: {line.count} requests wait", "queue_full", wait)
            wait = self.wait(line, work)
            left = work.deadline - work.queued
            if left <= 0:
                raise out_of_time(work.version.name, wait)
            if wait > left:
                raise too_late(work.version.name, wait, left)
            if line.count == 0:
                line.used = max(line.used, self.clock)
                self.active[work.version] = line
            line.add(work, next(self.tickets))
            self.changed.notify()

    def line_of(self, version: Version) -> Line:
        """The one line of a version. One that was forgotten has a line as long as requests wait in it."""
        line = self.lines.get(version) or self.active.get(version) or Line(version)
        if version not in self.forgotten:
            self.lines[version] = line
        return line

    def submit_all(self, works: list[Work]) -> list[tuple[Work, Refused]]:
        """`submit` for all of them before any thread can take one. Those that were refused, and why."""
        refused = []
        with self.changed:
            for work in works:
                try:
                    self.submit(work)
                except Refused as error:
                    refused.append((work, error))
        return refused

    def wait(self, line: Line, work: Work) -> float:
        """Seconds until a request that comes now is answered: what runs, its own line, and as much of the others."""
        now = time.monotonic()
        workers = len(self.threads)
        free = min(self.running.values(), default=now) if len(self.running) == workers else now
        count, rows = line.ahead(work.priority)
        own = line.seconds(count, rows + work.rows, self.max_rows)
        others = sum(
            min(other.seconds(other.count, other.rows, self.max_rows), own)
            for other in self.active.values()
            if other is not line
        )
        return max(0.0, free - now) + (own + others) / workers

    def forget(self, version: Version) -> None:
        """No more requests are found for a version. Those that wait are still answered, and those on their way here."""
        with self.changed:
            self.forgotten.add(version)
            self.lines.pop(version, None)

    def waiting(self, version: Version) -> int:
        line = self.lines.get(version) or self.active.get(version)
        return line.count if line else 0

    def work(self) -> None:
        me = threading.get_ident()
        torch.set_num_threads(torch.get_num_threads())  # OpenMP keeps this number for each thread
        while True:
            with self.changed:
                while not self.active:
                    if self.closed:
                        return
                    self.changed.wait()
                line = min(self.active.values(), key=lambda candidate: candidate.used)
                batch = line.take(self.max_rows)
                rows = sum(work.rows for work in batch)
                now = time.monotonic()
                predicted = line.version.estimate.seconds(rows)
                self.clock = line.used
                line.used += predicted
                self.running[me] = now + predicted
                if line.count == 0:
                    del self.active[line.version]
            late = [work for work in batch if work.deadline < now or work.future.cancelled()]
            for work in late:
                work.answer = out_of_time(work.version.name, predicted)
            ready = [work for work in batch if work not in late] if late else batch
            try:
                execute(ready)
            except Exception as error:  # a worker outlives whatever a batch does to it
                for work in ready:
                    work.answer = work.answer or error
            done = time.monotonic()
            with self.changed:
                self.running.pop(me, None)
                if ready:
                    line.used += done - now - predicted
            for work in batch:
                work.started, work.ended, work.batch = now, done, rows
            self.loop.call_soon_threadsafe(self.settle, batch, ready, done - now)

    def settle(self, batch: list[Work], ready: list[Work], seconds: float) -> None:
        """On the event loop: hand out the answers, and learn from the time they took."""
        if ready:
            ready[0].version.estimate.learn(sum(work.rows for work in ready), seconds)
            self.finished(ready)
        for work in batch:
            work.settle()

    def close(self, seconds: float | None = None) -> None:
        """Answer what waits, then end the threads. One that is busy for longer than `seconds` is left."""
        end = None if seconds is None else time.monotonic() + seconds
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        for thread in self.threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
