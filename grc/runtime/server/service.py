"""The service: a request to a version, by whatever protocol it came, through caches and scheduler to its answer."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import orjson
import torch

from grc.errors import ArtifactError
from grc.runtime import processing
from grc.runtime.server.cache import Cache
from grc.runtime.server.features import Features, User
from grc.runtime.server.logs import Log
from grc.runtime.server.metrics import Metrics
from grc.runtime.server.packed import Packed, tensors_of
from grc.runtime.server.preparing import Preparing
from grc.runtime.server.refusal import Refused, out_of_time, refusal
from grc.runtime.server.scheduler import LOWEST, Scheduler, Waiter, Work
from grc.runtime.server.settings import Settings
from grc.runtime.server.version import Version
from grc.runtime.values import plain

Tensors = list[torch.Tensor]
Answer = Sequence[torch.Tensor]
# Each stage as metrics name it, and as the protocol's statistics do.
STAGES = (
    ("preprocess", "compute_input"),
    ("queue", "queue"),
    ("compute", "compute_infer"),
    ("postprocess", "compute_output"),
)


class Call:
    """One request on its way: who asks for what, since when, until when, and how long each stage took."""

    __slots__ = (
        "arrived",
        "deadline",
        "gone",
        "id",
        "model",
        "preprocess",
        "priority",
        "protocol",
        "stages",
        "version",
    )

    def __init__(self, id: str, protocol: str, timeout: float):
        self.arrived = time.monotonic()
        self.deadline = self.arrived + timeout
        self.id, self.protocol = id, protocol
        self.version: Version | None = None
        self.model = ""
        self.preprocess = 0.0
        self.priority = LOWEST
        self.gone = False  # its client went away
        self.stages: tuple[float, float] | None = None

    def due(self, seconds: float) -> None:
        """A client may shorten the time that a request may take."""
        self.deadline = min(self.deadline, self.arrived + seconds)

    def asks(self, seconds: float | None, priority: int) -> None:
        """What the protocol's parameters say."""
        if seconds is not None:
            self.due(seconds)
        self.priority = priority or LOWEST


class Service:
    def __init__(self, settings: Settings, log: Log, loop: asyncio.AbstractEventLoop):
        self.settings, self.log, self.loop = settings, log, loop
        self.metrics = Metrics()
        self.features = Features(Cache(settings.feature_cache, settings.feature_ttl))
        self.answers = Cache(settings.answer_cache, settings.answer_ttl)
        self.scheduler = Scheduler(loop, settings.workers, settings.max_rows, settings.max_queue, self.computed)
        self.arrived: list[Work] = []
        self.preparing = Preparing(loop, settings.max_queue)
        self.reading = ThreadPoolExecutor(1, thread_name_prefix="grc-reading")  # of large bodies

    async def infer(self, call: Call, version: Version, inputs: Packed) -> Answer:
        """The outputs for one request's inputs. Raises what `refusal` makes an answer of."""
        future = self.loop.create_future()
        self.start(call, version, inputs, future)
        return await future

    def start(self, call: Call, version: Version, inputs: Packed, future: Waiter) -> None:
        """Let `future` have the outputs for one request's inputs, out of the cache where they are there."""
        if not self.answers.on:
            self.submit(call, version, inputs, future)
            return
        key = digest(version, inputs)
        found = self.answers.get(key)
        self.looked_up(version, found)
        if found is None:
            self.submit(call, version, inputs, Keeping(future, self.answers, key))
        else:
            future.set_result(found)

    async def compute(self, call: Call, version: Version, inputs: Tensors) -> Answer:
        future = self.loop.create_future()
        self.submit(call, version, inputs, future)
        return await future

    def submit(self, call: Call, version: Version, inputs: Packed | Tensors, future: Waiter) -> None:
        """Let a request wait. Those that come in one turn of the loop reach the scheduler together, and wake it once."""
        rows = inputs.rows if isinstance(inputs, Packed) else version.program.check.batch(inputs)
        if rows == 0:
            future.set_result(version.program.empty())
            return
        if version.merge.ragged:  # how long its histories are is looked at more than once
            inputs = tensors_of(inputs)
        now = time.monotonic()
        call.preprocess = now - call.arrived
        if not self.arrived:
            self.loop.call_soon(self.hand_over)
        self.arrived.append(Work(version, inputs, rows, call.deadline, future, now, call, call.priority))

    def hand_over(self) -> None:
        arrived, self.arrived = self.arrived, []
        for work, refused in self.scheduler.submit_all(arrived):
            if not work.future.done():
                work.future.set_exception(refused)

    async def recommend(
        self, call: Call, version: Version, body: bytes, request: dict[str, Any], user: User | None
    ) -> bytes:
        """From a request in its users' words, and the body it came as, to its answer as JSON, through the artifact's own
        functions."""
        if not self.answers.on or user is not None:  # a user's features may change while the request stays the same
            return await self.answered(call, version, await self.prepared(call, version, request, user), request)
        key = body_digest(body, f"{version.name}/{version.number}/")
        kept: bytes | None = self.answers.get(key)
        self.looked_up(version, kept)
        if kept is None:
            kept = await self.answered(call, version, await self.prepared(call, version, request, user), request)
            self.answers.put(key, kept, len(kept))
        return kept

    async def answered(self, call: Call, version: Version, inputs: Tensors, request: dict[str, Any]) -> bytes:
        """What preprocess made of a request, computed, and made an answer of."""
        answer = await self.compute(call, version, inputs)

        def post() -> bytes:
            self.preparing.check(call, version.name)
            try:
                return written(version.processing().postprocess(version.program.built(answer), request))
            except ArtifactError as error:
                raise Refused(500, error.message, "postprocess") from error

        found: bytes = await self.preparing.run(post)
        return found

    async def rehearse(self, call: Call, version: Version, request: dict[str, Any]) -> None:
        """Answer a request as `recommend` does, but for caches and the line of those that wait for preprocess."""
        inputs = await self.preparing.run(partial(self.preparing.take, call, version, request))
        await self.answered(call, version, inputs, request)

    @asynccontextmanager
    async def in_time(self, call: Call, version: Version) -> AsyncIterator[None]:
        """Wait until the request's deadline and no longer: what a thread has begun by then is nobody's. Raises Refused."""
        try:
            async with asyncio.timeout(call.deadline - time.monotonic()):
                yield
        except TimeoutError:
            raise out_of_time(version.name, self.preparing.wait(version.name)) from None

    async def prepared(self, call: Call, version: Version, request: dict[str, Any], user: User | None) -> Tensors:
        """The request's features: made by preprocess, or those of the user."""
        if user is None or not self.features.cache.on:
            return await self.preparing.preprocess(call, version, request)
        found = self.features.get(version.name, version.number, user)
        if found is not None:
            return found
        making = self.features.begin(version.name, version.number, user)
        made = None
        try:
            made = await self.preparing.preprocess(call, version, request)
        finally:
            self.features.end(making, made)
        return made

    def looked_up(self, version: Version, found: object) -> None:
        version.statistics.by_stage["cache_miss" if found is None else "cache_hit"].add(0.0)

    def computed(self, batch: list[Work]) -> None:
        """A batch has been computed: rows and times of all that it answered. One that was refused has no answer."""
        answered = [work for work in batch if not isinstance(work.answer, Exception)]
        if not answered:
            return
        version, rows = batch[0].version, sum(work.rows for work in answered)
        version.statistics.batch(rows, batch[0].ended - batch[0].started)
        metrics = self.metrics.of(version.name)
        for work in answered:
            if work.call is not None:
                work.call.stages = work.started - work.queued, work.ended - work.started
        metrics.rows.observe(rows)
        metrics.merged.observe(len(answered))

    def succeeded(self, call: Call) -> None:
        """The answer is written: count its stages."""
        version = call.version
        assert version is not None
        total = time.monotonic() - call.arrived
        metrics, statistics = self.metrics.of(version.name), version.statistics
        if call.stages is not None:
            queue, compute = call.stages
            after = total - call.preprocess - queue - compute
            for (stage, name), seconds in zip(STAGES, (call.preprocess, queue, compute, after), strict=True):
                metrics.stages[stage].observe(seconds)
                statistics.by_stage[name].add(seconds)
        metrics.request.observe(total)
        statistics.succeed(total)
        self.metrics.requests[version.name, call.protocol, "200"] += 1
        if self.settings.access_log:
            self.log("info", "request", id=call.id, model=version.name, status=200, ms=round(total * 1e3, 3))

    def failed(self, call: Call, error: Exception) -> Refused:
        """Count and log a request that gets no answer, and say what its client is told."""
        told = refusal(error)
        total = time.monotonic() - call.arrived
        if call.version is not None:
            call.version.statistics.by_stage["fail"].add(total)
        # Only names of models that are there become labels: a client must not fill the memory with made-up ones.
        model = call.version.name if call.version is not None else ""
        self.metrics.requests[model, call.protocol, str(told.status)] += 1
        self.metrics.refusals.labels(model, told.reason).inc()
        level = "error" if told.status == 500 else "warning"
        self.log(
            level, "refused", id=call.id, model=call.model, status=told.status, reason=told.reason, message=told.message
        )
        return told

    def close(self, seconds: float) -> None:
        """End the threads; one that is busy for longer than `seconds` is left."""
        self.reading.shutdown(wait=False, cancel_futures=True)
        self.preparing.close()
        self.scheduler.close(seconds)


class Keeping:
    """A future that also keeps its answer in the cache."""

    def __init__(self, future: Waiter, answers: Cache, key: bytes):
        self.future, self.answers, self.key = future, answers, key
        self.done, self.cancelled, self.set_exception = future.done, future.cancelled, future.set_exception

    def set_result(self, answer: Answer) -> None:
        own = [tensor.clone() for tensor in answer]  # an answer is a view of its whole batch
        self.answers.put(self.key, own, sum(tensor.nbytes for tensor in own))
        self.future.set_result(answer)


def digest(version: Version, inputs: Packed) -> bytes:
    found = hashlib.blake2b(f"{version.name}/{version.number}{inputs.shapes}".encode(), digest_size=16)
    for data in inputs.data:
        found.update(data)
    return found.digest()


def body_digest(body: bytes, before: str = "") -> bytes:
    found = hashlib.blake2b(before.encode(), digest_size=16)
    found.update(body)
    return found.digest()


def written(value: Any) -> bytes:
    """A recommendation as JSON. Raises ArtifactError where it is none, by the rule that holds everywhere."""
    try:
        return orjson.dumps(value, default=plain, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    except orjson.JSONEncodeError:  # of what is JSON, too: integers of more than 64 bits, say
        return processing.written(value).encode()
