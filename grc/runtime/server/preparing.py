"""Preparing: artifacts' own functions, on threads of their own. How many requests may wait for one is bounded, and what nobody
waits for any more is not begun."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from grc.runtime.server.refusal import Refused, gone, out_of_time
from grc.runtime.server.version import Version

if TYPE_CHECKING:
    from grc.runtime.server.service import Call

Tensors = list[torch.Tensor]
THREADS = 2  # the functions hold the interpreter's lock: more would only take turns
LEARNING = 0.2  # the weight of the newest request in how long preprocess takes


class Preparing:
    """`max_queue` bounds the requests of one model that wait for preprocess."""

    def __init__(self, loop: asyncio.AbstractEventLoop, max_queue: int):
        self.loop, self.max_queue = loop, max_queue
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="grc-processing")
        self.lock = threading.Lock()
        self.waiting: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}  # that preprocess of a model takes

    async def preprocess(self, call: Call, version: Version, request: dict[str, Any]) -> Tensors:
        """Raises Refused when too many wait, and when its client or its time is gone before its turn comes."""
        name = version.name
        with self.lock:
            if self.waiting[name] >= self.max_queue:
                told = f"model {name} is busy: {self.waiting[name]} requests wait"
                raise Refused(503, told, "queue_full", self.wait(name))
            self.waiting[name] += 1
        # Shielded, because a request counts until a thread has put it away, also when its client left long before.
        return await asyncio.shield(self.loop.run_in_executor(self.threads, self.take, call, version, request))

    def take(self, call: Call, version: Version, request: dict[str, Any]) -> Tensors:
        """On a thread: the request's turn has come."""
        name, began = version.name, time.monotonic()
        with self.lock:
            self.waiting[name] -= 1
        if call.gone:
            raise gone("its answer")
        if began > call.deadline:
            raise out_of_time(name, self.wait(name))
        args, kwargs = version.processing().preprocess(request)
        found = version.program.leaves(args, kwargs)
        took = time.monotonic() - began
        before = self.seconds.get(name, took)
        self.seconds[name] = before + LEARNING * (took - before)
        return found

    def wait(self, name: str) -> float:
        """Seconds until those that wait are prepared."""
        return self.waiting[name] * self.seconds.get(name, 0.0) / THREADS

    async def run(self, function: Callable[[], Any]) -> Any:
        return await self.loop.run_in_executor(self.threads, function)

    def close(self) -> None:
        """Drop what waits. A thread that is busy is not waited for."""
        self.threads.shutdown(wait=False, cancel_futures=True)
