"""Preparing: artifacts' own functions, on threads of their own. How many requests may wait for one is bounded, those that
can't make their deadline are refused at once, and what nobody waits for any more is not begun. Answers go before requests, and
models take turns by the time they used, as the scheduler has them do.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from grc.runtime.server.refusal import Refused, gone, out_of_time, too_late
from grc.runtime.server.version import Version

if TYPE_CHECKING:
    from grc.runtime.server.service import Call

Tensors = list[torch.Tensor]
THREADS = 2  # the functions hold the interpreter's lock: more would only take turns
LEARNING = 0.2  # the weight of the newest request in how long preprocess takes


class Job:
    """A call that waits for a thread, and the future that gets what it returns or raises."""

    __slots__ = ("call", "future")

    def __init__(self, call: Callable[[], Any]):
        self.call = call
        self.future: Future[Any] = Future()

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():  # the server has ended
            return
        try:
            self.future.set_result(self.call())
        except Exception as error:  # it belongs to who waits for it
            self.future.set_exception(error)
            del self  # or it would be held by the error's own frames

    async def done(self) -> Any:
        """What the call gave. It counts until a thread has put it away, hence the shield, also when its client left before."""
        future = asyncio.wrap_future(self.future)
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to ask
        try:
            return await asyncio.shield(future)
        finally:
            del self, future  # as above


class Preparing:
    """`max_queue` bounds the requests of one model that wait for preprocess."""

    def __init__(self, loop: asyncio.AbstractEventLoop, max_queue: int):
        self.loop, self.max_queue = loop, max_queue
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="grc-processing")
        self.lock = threading.Lock()
        self.computed: deque[Job] = deque()  # answers that wait for postprocess, and canaries
        self.lines: dict[str, deque[Job]] = {}  # requests that wait for preprocess, by their model
        self.used: dict[str, float] = {}  # seconds of a thread; a model that had nothing to do does not save them up
        self.clock = 0.0  # those of the model that was served last
        self.seconds: dict[str, float] = {}  # that preprocess of a model takes

    async def preprocess(self, call: Call, version: Version, request: dict[str, Any]) -> Tensors:
        """Raises Refused when too many wait, when it would come too late, and when its client or its time is gone before its
        turn comes.
        """
        name, job = version.name, Job(partial(self.take, call, version, request))
        with self.lock:
            line = self.lines.setdefault(name, deque())
            wait, left = self.wait(name), call.deadline - time.monotonic()
            if len(line) >= self.max_queue:
                raise Refused(503, f"model {name} is busy: {len(line)} requests wait", "queue_full", wait)
            if left <= 0:
                raise out_of_time(name, wait)
            if wait > left:
                raise too_late(name, wait, left)
            if not line:
                self.used[name] = max(self.used.get(name, 0.0), self.clock)
            line.append(job)
        self.threads.submit(self.turn)
        done = job.done()
        del job  # as above
        found: Tensors = await done
        return found

    async def run(self, function: Callable[[], Any]) -> Any:
        """What is done to an answer, or for a canary; it waits for nothing but others of its kind."""
        job = Job(function)
        with self.lock:
            self.computed.append(job)
        self.threads.submit(self.turn)
        done = job.done()
        del job  # as above
        return await done

    def turn(self) -> None:
        """On a thread: do what is most due. There are as many turns as jobs."""
        self.most_due().run()

    def most_due(self) -> Job:
        with self.lock:
            if self.computed:
                return self.computed.popleft()
            name = min((name for name, line in self.lines.items() if line), key=lambda name: self.used[name])
            self.clock = self.used[name]
            self.used[name] += self.seconds.get(name, 0.0)
            return self.lines[name].popleft()

    def take(self, call: Call, version: Version, request: dict[str, Any]) -> Tensors:
        """On a thread: the request's turn has come."""
        name, began = version.name, time.monotonic()
        self.check(call, name)
        args, kwargs = version.processing().preprocess(request)
        found = version.program.leaves(args, kwargs)
        took = time.monotonic() - began
        before = self.seconds.get(name, took)
        self.seconds[name] = before + LEARNING * (took - before)
        return found

    def check(self, call: Call, name: str) -> None:
        """Raises Refused where nobody waits for the request any more."""
        if call.gone:
            raise gone("its answer")
        if time.monotonic() > call.deadline:
            raise out_of_time(name, self.wait(name))

    def wait(self, name: str) -> float:
        """Seconds until those of a model that wait are prepared: its own line, and as much of the others."""
        own = self.line_seconds(name)
        return (own + sum(min(self.line_seconds(other), own) for other in list(self.lines) if other != name)) / THREADS

    def line_seconds(self, name: str) -> float:
        return len(self.lines.get(name, ())) * self.seconds.get(name, 0.0)

    def close(self) -> None:
        """Drop what waits. A thread that is busy is not waited for."""
        self.threads.shutdown(wait=False, cancel_futures=True)
