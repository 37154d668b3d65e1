"""Preprocess on its threads: bounded, refused early, fair, and not begun for a request that nobody waits for any more."""

from __future__ import annotations

import asyncio
import gc
import re
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="needs grc-compiler[serve]")

from grc.runtime.server.preparing import THREADS, Preparing
from grc.runtime.server.refusal import Refused
from grc.runtime.server.service import Call, Service


class Held:
    """A version whose preprocess is held back, and remembers what it was called with."""

    def __init__(self) -> None:
        self.name = "m"
        self.open = threading.Event()
        self.begun: list[Any] = []
        self.program = SimpleNamespace(leaves=lambda args, kwargs: list(args))

    def processing(self) -> Held:
        return self

    def preprocess(self, request: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.begun.append(request)
        self.open.wait(10)
        return (request,), {}


Asking = Callable[..., "asyncio.Task[Any]"]


@pytest.fixture
def held() -> Iterator[Held]:
    found = Held()
    yield found
    found.open.set()


def story(held: Held, told: Callable[[Asking, Preparing], Coroutine[Any, Any, Any]], max_queue: int = 100) -> Any:
    """Both threads are busy; `told` asks for more, with a call of its own where it likes."""

    async def all_of() -> Any:
        preparing = Preparing(asyncio.get_running_loop(), max_queue)

        def ask(request: Any, call: Call | None = None, within: float = 10.0) -> asyncio.Task[Any]:
            call = call or Call("id", "http", within)
            return asyncio.create_task(preparing.preprocess(call, held, {"n": request}))  # type: ignore[arg-type]

        busy = [ask(-n - 1) for n in range(THREADS)]
        while len(held.begun) < THREADS:
            await asyncio.sleep(0.001)
        async with asyncio.timeout(20):
            found = await told(ask, preparing)
            held.open.set()
            await asyncio.gather(*busy)
        preparing.close()
        return found

    return asyncio.run(all_of())


def test_those_that_wait_are_bounded(held: Held) -> None:
    async def told(ask: Asking, preparing: Preparing) -> Any:
        waiting = [ask(n) for n in range(3)]
        preparing.seconds["m"] = 4.0
        refused = await asyncio.gather(ask(3), return_exceptions=True)
        held.open.set()
        found = await asyncio.gather(*waiting)
        return refused[0], found, await ask(4)

    refused, found, later = story(held, told, max_queue=3)
    assert isinstance(refused, Refused)
    assert (refused.status, refused.reason, refused.message) == (503, "queue_full", "model m is busy: 3 requests wait")
    assert refused.retry_after == 6, "three of four seconds, on two threads"
    assert [*found, later] == [[{"n": n}] for n in (0, 1, 2, 4)], "there is room again"


def test_a_request_whose_time_ran_out_is_not_prepared(held: Held) -> None:
    async def told(ask: Asking, preparing: Preparing) -> Any:
        short, long = ask(0, within=0.02), ask(1)
        await asyncio.sleep(0.05)
        held.open.set()
        return await asyncio.gather(short, long, return_exceptions=True)

    refused, answer = story(held, told)
    assert isinstance(refused, Refused) and (refused.status, refused.reason) == (503, "deadline")
    assert refused.message == "model m was too busy: the request's time ran out"
    assert answer == [{"n": 1}] and {"n": 0} not in held.begun


def test_a_request_that_would_come_too_late_is_refused_at_once(held: Held) -> None:
    async def told(ask: Asking, preparing: Preparing) -> Any:
        waiting = [ask(n) for n in range(3)]
        preparing.seconds["m"] = 4.0
        (refused,) = await asyncio.gather(ask(3, within=5.0), return_exceptions=True)
        assert not held.open.is_set()
        held.open.set()
        return refused, await asyncio.gather(*waiting)

    refused, answers = story(held, told)
    assert isinstance(refused, Refused) and (refused.status, refused.reason) == (503, "deadline")
    assert re.fullmatch(
        r"model m can't answer within (4[89]\d\d|5000) ms: it would take about 6000 ms", refused.message
    )
    assert len(answers) == 3


def test_a_busy_model_does_not_starve_a_quiet_one_and_answers_go_first(held: Held) -> None:
    quiet = Held()
    quiet.name, quiet.begun = "quiet", held.begun
    quiet.open.set()

    async def told(ask: Asking, preparing: Preparing) -> Any:
        preparing.seconds |= {"m": 0.01, "quiet": 0.01}
        busy = [ask(n) for n in range(50)]
        await asyncio.sleep(0)
        version: Any = quiet
        late = asyncio.create_task(preparing.preprocess(Call("id", "http", 10.0), version, {"n": "quiet"}))
        after = asyncio.create_task(preparing.run(lambda: held.begun.append("answer")))
        await asyncio.sleep(0)
        held.open.set()
        await asyncio.gather(late, after, *busy)

    story(held, told)
    begun = held.begun[THREADS:]
    assert begun.index("answer") < 2 and begun.index({"n": "quiet"}) < 6, begun[:10]


def test_a_client_that_left_is_not_prepared_for_and_counts_until_it_is_put_away(held: Held) -> None:
    async def told(ask: Asking, preparing: Preparing) -> Any:
        call = Call("id", "http", 10.0)
        leaves, stays = ask(0, call), ask(1)
        await asyncio.sleep(0)
        call.gone = True
        leaves.cancel()
        await asyncio.wait([leaves])
        assert len(preparing.lines["m"]) == 2, "what it sent is still held"
        held.open.set()
        await stays
        return len(preparing.lines["m"])

    assert story(held, told) == 0
    assert {"n": 0} not in held.begun and {"n": 1} in held.begun


def test_the_example_of_a_canary_waits_for_a_thread_and_for_no_others(held: Held) -> None:
    """Or a canary would find a server busy whose preprocess hangs, and never ill."""

    async def told(ask: Asking, preparing: Preparing) -> Any:
        waiting = [ask(n) for n in range(3)]
        await asyncio.sleep(0)
        service: Any = SimpleNamespace(preparing=preparing, answered=lambda *given: asyncio.sleep(0))
        version: Any = held
        canary = asyncio.create_task(Service.rehearse(service, Call("id", "canary", 10.0), version, {"n": "canary"}))
        await asyncio.sleep(0.05)
        assert not canary.done()
        held.open.set()
        await asyncio.gather(canary, *waiting)

    story(held, told, max_queue=3)
    assert {"n": "canary"} in held.begun[THREADS : 2 * THREADS]


class Request(dict[str, Any]):
    """One that can be referred to weakly."""


def test_an_error_does_not_keep_its_request() -> None:
    """Large ones would fill the memory until all of it is searched for cycles."""

    def fail(request: Any) -> Any:
        raise KeyError("dense")

    version: Any = SimpleNamespace(name="m", processing=lambda: SimpleNamespace(preprocess=fail))

    async def ask() -> bool:
        preparing = Preparing(asyncio.get_running_loop(), 1)
        request = Request()
        kept = weakref.ref(request)
        with pytest.raises(KeyError):
            await preparing.preprocess(Call("id", "http", 10.0), version, request)
        del request
        preparing.threads.shutdown()
        await asyncio.sleep(0)
        return kept() is None

    gc.disable()
    try:
        assert asyncio.run(ask())
    finally:
        gc.enable()
