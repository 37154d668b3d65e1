"""The scheduler by itself: merged by rows, urgent first, refused early, bounded, fair, and never stuck."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grc.errors import EngineError, InputError
from grc.runtime.inputs import InputCheck
from grc.runtime.server.estimate import Estimate
from grc.runtime.server.merge import Merge
from grc.runtime.server.refusal import Refused
from grc.runtime.server.scheduler import FAIR, LOWEST, Scheduler, Work

SLOW = """\
        wide = self.wide(both)
        for _ in range(30):
            wide = torch.tanh(self.deep(wide))
        both = both + 0.01 * self.narrow(wide)
"""
MATRICES = """\
        wide = self.deep.weight + 1e-30 * self.wide(both).mean()
        for _ in range(4):
            wide = torch.tanh(wide @ self.deep.weight)
        both = both + 0.01 * self.narrow(wide).mean(0)
"""


def slow(text: str, on_gpu: bool = False) -> str:
    """A model whose batches all take tens of milliseconds, whatever their rows. A GPU needs products of matrices for that."""
    width, loop = (4000, MATRICES) if on_gpu else (1200, SLOW)
    top = "\n        self.top = nn.Linear(19, 1)"
    layers = f"\n        self.wide, self.narrow = nn.Linear(19, {width}), nn.Linear({width}, 19)"
    text = text.replace(top, f"{top}{layers}\n        self.deep = nn.Linear({width}, {width})")
    return text.replace("        return torch.sig", loop + "        return torch.sig")


MANIFEST = {
    "inputs": [{"name": "ids", "dtype": "int64", "sizes": ["batch", 1]}],
    "outputs": [{"dtype": "int64", "sizes": ["batch", 1]}],
    "batch": {"min": 1, "max": 32, "capped": False, "dynamic": True},
    "ids": [{"input": 0, "start": 0, "stop": None, "rows": 100, "table": "t", "padding": None}],
    "segments": [],
    "on_bad_id": "error",
    "target": {"device": "cpu"},
    "parts": [{"engine": "eager"}],
    "measured": [{"engine": "eager", "batch": 1, "p50_us": 100.0}, {"engine": "eager", "batch": 11, "p50_us": 1100.0}],
}


class Doubling:
    """A version whose program doubles ids, remembers its batches, and can be held back."""

    def __init__(self, name: str = "m", seconds: float = 0.0, **manifest: Any):
        self.name, self.number = name, "1"
        manifest = {**MANIFEST, **manifest}
        self.estimate, self.merge = Estimate(manifest), Merge(manifest)
        self.max_rows = self.merge.max_batch
        self.program = SimpleNamespace(check=InputCheck(manifest), run_flat=self.run)
        self.seconds, self.batches, self.order = seconds, [], []
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self.fault: Callable[[torch.Tensor], Exception | None] = lambda ids: None

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        self.entered.set()
        self.open.wait(30)
        self.program.check.ids(inputs)
        error = self.fault(inputs[0])
        if error is not None:
            raise error
        self.batches.append(len(inputs[0]))
        self.order += inputs[0][:, 0].tolist()
        time.sleep(self.seconds)
        return [inputs[0] * 2]


class Bench:
    """A scheduler on a loop, and how to ask it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, **limits: int):
        self.loop = loop
        self.scheduler = Scheduler(
            loop, **{"workers": 1, "max_rows": 8, "max_queue": 100, **limits}, finished=self.note
        )
        self.finished: list[list[Work]] = []

    def note(self, batch: list[Work]) -> None:
        self.finished.append(batch)

    def ask(
        self, version: Any, *ids: int, within: float = 10.0, priority: int = LOWEST
    ) -> asyncio.Future[list[torch.Tensor]]:
        now = time.monotonic()
        inputs = [torch.tensor([[i] for i in ids])]
        work = Work(version, inputs, len(ids), now + within, self.loop.create_future(), now, priority=priority)
        self.scheduler.submit(work)
        return work.future

    def hold(self, version: Doubling, *ids: int) -> asyncio.Future[list[torch.Tensor]]:
        """Let a first request occupy the worker until the version is opened."""
        version.open.clear()
        version.entered.clear()
        first = self.ask(version, *(ids or (0,)))
        assert version.entered.wait(10)
        return first

    def settle(self, *futures: asyncio.Future[Any]) -> list[Any]:
        async def all_of() -> list[Any]:
            return await asyncio.wait_for(asyncio.gather(*futures, return_exceptions=True), 20)

        return self.loop.run_until_complete(all_of())


@pytest.fixture
def bench(loop: asyncio.AbstractEventLoop) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**limits: int) -> Bench:
        made.append(Bench(loop, **limits))
        return made[-1]

    yield make
    for one in made:
        one.scheduler.close()


def test_what_waits_is_merged_by_rows_not_by_requests(bench: Callable[..., Bench]) -> None:
    b, version = bench(), Doubling()
    first = b.hold(version)
    waiting = [b.ask(version, *range(n, n + 3)) for n in range(0, 15, 3)]
    version.open.set()
    found = b.settle(first, *waiting)
    assert version.batches == [1, 6, 6, 3], "batches of at most 8 rows, and no request is torn apart"
    assert [f[0][:, 0].tolist() for f in found[1:]] == [[2 * i for i in range(n, n + 3)] for n in range(0, 15, 3)]


def test_a_request_larger_than_a_batch_runs_by_itself(bench: Callable[..., Bench]) -> None:
    b, version = bench(), Doubling()
    first = b.hold(version)
    large = b.ask(version, *range(20))
    small = b.ask(version, 1)
    version.open.set()
    b.settle(first, large, small)
    assert version.batches == [1, 20, 1]


def test_the_most_urgent_goes_first(bench: Callable[..., Bench]) -> None:
    b, version = bench(max_rows=1), Doubling()
    first = b.hold(version)
    waiting = [b.ask(version, i, within=within) for i, within in ((1, 9.0), (2, 3.0), (3, 6.0))]
    version.open.set()
    b.settle(first, *waiting)
    assert version.order == [0, 2, 3, 1]


def test_priority_goes_before_what_is_due(bench: Callable[..., Bench]) -> None:
    b, version = bench(max_rows=1), Doubling()
    first = b.hold(version)
    asked = ((1, 3.0, LOWEST), (2, 9.0, 1), (3, 6.0, 2), (4, 5.0, 1))
    waiting = [b.ask(version, i, within=within, priority=priority) for i, within, priority in asked]
    version.open.set()
    b.settle(first, *waiting)
    assert version.order == [0, 4, 2, 1, 3], "the fourth batch begins with what is due first"


def test_priority_starves_nobody(bench: Callable[..., Bench]) -> None:
    b, version = bench(max_rows=1), Doubling()
    first = b.hold(version)
    waiting = [b.ask(version, 99)] + [b.ask(version, i, priority=1) for i in range(1, 20)]
    version.open.set()
    b.settle(first, *waiting)
    assert version.order.index(99) <= FAIR
    assert version.order[-1] == 19


def test_a_request_of_priority_waits_for_no_others(bench: Callable[..., Bench]) -> None:
    b, version = bench(), Doubling()
    version.estimate.factor = 1000.0  # 0.1 s a row
    first = b.hold(version)
    waiting = [b.ask(version, i) for i in range(8)]
    with pytest.raises(Refused):
        b.ask(version, 9, within=0.5)
    waiting.append(b.ask(version, 9, within=0.5, priority=1))
    version.open.set()
    b.settle(first, *waiting)
    (line,) = b.scheduler.lines.values()
    assert (line.count, line.rows, line.levels) == (0, 0, {})


def test_a_batch_stops_growing_where_its_most_urgent_request_would_be_late(bench: Callable[..., Bench]) -> None:
    b, version = bench(max_rows=32), Doubling()
    version.estimate.learn = lambda rows, seconds: None  # type: ignore[method-assign]
    version.estimate.factor = 1000.0  # 0.1 s a row
    first = b.hold(version)
    urgent = b.ask(version, 1, within=1.0)
    others = [b.ask(version, i, within=30.0) for i in range(2, 22)]
    version.open.set()
    b.settle(first, urgent, *others)
    assert 1 <= version.batches[1] <= 10 and sum(version.batches) == 22


def test_a_request_that_would_be_late_is_refused_at_once(bench: Callable[..., Bench]) -> None:
    b, version = bench(), Doubling()
    version.estimate.factor = 1000.0  # 0.1 s a row
    first = b.hold(version)
    waiting = [b.ask(version, i) for i in range(8)]
    began = time.monotonic()
    with pytest.raises(Refused) as caught:
        b.ask(version, 9, within=0.5)
    assert time.monotonic() - began < 0.1, "refused early, not when its time has run out"
    assert (caught.value.status, caught.value.reason, caught.value.retry_after) == (503, "deadline", 1)
    assert caught.value.message.startswith("model m can't answer within 500 ms: it would take about ")
    version.open.set()
    assert not any(isinstance(found, Exception) for found in b.settle(first, *waiting))


def test_what_waits_is_priced_in_batches_that_the_artifact_takes(bench: Callable[..., Bench]) -> None:
    b, version = bench(max_rows=256), Doubling(batch={"min": 1, "max": 4, "capped": False, "dynamic": True})
    version.estimate.factor = 1000.0  # 0.1 s a row
    first = b.hold(version)
    waiting = [b.ask(version, i, within=2.0) for i in range(8)]  # 0.8 s, and the batch that runs
    version.open.set()
    b.settle(first, *waiting)
    assert version.batches == [1, 4, 4]


def test_a_request_whose_time_ran_out_before_it_could_wait_is_told_so(bench: Callable[..., Bench]) -> None:
    with pytest.raises(Refused) as caught:
        bench().ask(Doubling(), 1, within=-1.0)
    assert (caught.value.reason, caught.value.message) == (
        "deadline",
        "model m was too busy: the request's time ran out",
    )


def test_a_request_whose_time_runs_out_while_it_waits_is_not_computed(bench: Callable[..., Bench]) -> None:
    b, version = bench(), Doubling()
    first = b.hold(version)
    short, long = b.ask(version, 1, within=0.2), b.ask(version, 2)
    time.sleep(0.3)
    version.open.set()
    _, refused, answer = b.settle(first, short, long)
    assert isinstance(refused, Refused) and refused.status == 503 and refused.retry_after == 1
    assert refused.message == "model m was too busy: the request's time ran out"
    assert answer[0].tolist() == [[4]] and version.order == [0, 2]


def test_queues_are_bounded(bench: Callable[..., Bench]) -> None:
    b, version = bench(max_queue=3), Doubling()
    first = b.hold(version)
    waiting = [b.ask(version, i) for i in range(3)]
    with pytest.raises(Refused) as caught:
        b.ask(version, 4)
    assert (caught.value.status, caught.value.reason) == (503, "queue_full")
    assert caught.value.message == "model m is busy: 3 requests wait"
    assert caught.value.retry_after == 1
    version.open.set()
    b.settle(first, *waiting)
    assert b.settle(b.ask(version, 5))[0][0].tolist() == [[10]], "there is room again"


def test_models_share_the_worker_fairly(bench: Callable[..., Bench]) -> None:
    """One model with a long line of slow batches does not keep a light one waiting behind all of it."""
    b = bench(max_rows=1)
    heavy, light = Doubling("heavy", seconds=0.02), Doubling("light")
    first = b.hold(heavy)
    line = [b.ask(heavy, i) for i in range(1, 20)]
    ended: dict[str, int] = {}
    later = [b.ask(light, i) for i in range(5)]
    later[-1].add_done_callback(lambda _: ended.setdefault("heavy", len(heavy.batches)))
    heavy.open.set()
    b.settle(first, *line, *later)
    assert ended["heavy"] <= 4, "five light requests were answered after at most a few heavy ones"


def test_one_that_slept_does_not_save_up_time(bench: Callable[..., Bench]) -> None:
    b = bench(max_rows=1)
    busy, sleepy = Doubling("busy", seconds=0.005), Doubling("sleepy", seconds=0.005)
    for i in range(20):
        b.settle(b.ask(busy, i))
    first = b.hold(busy)
    waiting = [b.ask(busy, i) for i in range(10)] + [b.ask(sleepy, i) for i in range(10)]
    done: list[str] = []
    for work, name in zip(waiting, ["busy"] * 10 + ["sleepy"] * 10, strict=True):
        work.add_done_callback(lambda _, name=name: done.append(name))
    busy.open.set()
    b.settle(first, *waiting)
    assert 3 <= done[:10].count("sleepy") <= 7


def test_only_requests_of_one_length_share_a_batch(bench: Callable[..., Bench]) -> None:
    manifest = {"inputs": [{"name": "history", "dtype": "int64", "sizes": ["batch", "n0"]}], "ids": []}
    b, version = bench(), Doubling(**manifest)
    version.run = lambda inputs: (version.batches.append(tuple(inputs[0].shape)), [inputs[0][:, :1] * 2])[1]  # type: ignore[method-assign]
    version.program.run_flat = lambda inputs: (version.entered.set(), version.open.wait(30), version.run(inputs))[2]

    def ask(rows: int, length: int) -> asyncio.Future[list[torch.Tensor]]:
        now = time.monotonic()
        work = Work(version, [torch.ones(rows, length)], rows, now + 10, b.loop.create_future(), now)  # type: ignore[arg-type]
        b.scheduler.submit(work)
        return work.future

    version.open.clear()
    first = ask(1, 1)
    assert version.entered.wait(10)
    waiting = [ask(1, 5), ask(2, 9), ask(2, 5), ask(1, 9)]
    version.open.set()
    b.settle(first, *waiting)
    assert version.batches == [(1, 1), (3, 5), (3, 9)]


def test_an_artifact_that_can_not_merge_runs_requests_alone(bench: Callable[..., Bench]) -> None:
    b, version = bench(), Doubling(batch={"min": 1, "max": 32, "capped": False, "dynamic": False})
    first = b.hold(version)
    waiting = [b.ask(version, i) for i in range(5)]
    version.open.set()
    b.settle(first, *waiting)
    assert version.batches == [1] * 6 and version.merge.reason == "the model's sizes are fixed"


def test_bad_requests_get_their_own_errors_and_the_others_their_answers(bench: Callable[..., Bench]) -> None:
    b, version = bench(), Doubling()
    first = b.hold(version)
    waiting = [b.ask(version, *ids) for ids in ((1,), (2, 300), (3,), (-4,))]
    version.open.set()
    _, one, two, three, four = b.settle(first, *waiting)
    assert (one[0].tolist(), three[0].tolist()) == ([[2]], [[6]])
    assert isinstance(two, InputError) and isinstance(four, InputError)
    assert two.message == 'input "ids" has id 300 at row 1, column 0; table t has 100 rows'
    assert four.message == 'input "ids" has id -4 at row 0, column 0; table t has 100 rows'
    assert version.batches == [1, 2], "the good ones share a batch all the same"


def test_a_failure_that_no_check_explains_is_found_by_running_alone(bench: Callable[..., Bench]) -> None:
    b, version = bench(), Doubling()
    version.fault = lambda ids: EngineError("eager failed: 13") if bool((ids == 13).any()) else None
    first = b.hold(version)
    waiting = [b.ask(version, i) for i in (1, 13, 3)]
    version.open.set()
    _, one, bad, three = b.settle(first, *waiting)
    assert (one[0].tolist(), three[0].tolist()) == ([[2]], [[6]])
    assert isinstance(bad, EngineError) and bad.message == "eager failed: 13"


def test_a_worker_outlives_what_a_batch_does_to_it(bench: Callable[..., Bench]) -> None:
    b, version = bench(), Doubling()
    first = b.hold(version)
    waiting = [b.ask(version, i) for i in (1, 2)]
    version.merge.cut = lambda answers, rows: []  # type: ignore[method-assign]
    version.open.set()
    found = b.settle(first, *waiting)
    assert [type(f) for f in found] == [list, ValueError, ValueError]
    assert b.settle(b.ask(version, 5))[0][0].tolist() == [[10]]


def test_a_client_that_went_away_costs_no_computing(bench: Callable[..., Bench]) -> None:
    b, version = bench(), Doubling()
    first = b.hold(version)
    gone, stays = b.ask(version, 1), b.ask(version, 2)
    gone.cancel()
    version.open.set()
    b.settle(first, stays)
    assert version.order == [0, 2]


def test_requests_on_their_way_to_a_version_that_is_forgotten_are_answered(bench: Callable[..., Bench]) -> None:
    b, version = bench(), Doubling()
    first = b.hold(version)
    waiting = b.ask(version, 1)
    b.scheduler.forget(version)
    late = b.ask(version, 2)
    assert b.scheduler.waiting(version) == 2
    version.open.set()
    assert [answer[0].tolist() for answer in b.settle(first, waiting, late)] == [[[0]], [[2]], [[4]]]
    (last,) = b.settle(b.ask(version, 3))
    assert last[0].tolist() == [[6]]
    assert not b.scheduler.lines and not b.scheduler.active, "a version that was replaced is not kept"


def test_closing_answers_what_waits(bench: Callable[..., Bench]) -> None:
    b, version = bench(max_rows=1), Doubling(seconds=0.005)
    waiting = [b.ask(version, i) for i in range(10)]
    b.scheduler.close()
    assert [found[0].tolist() for found in b.settle(*waiting)] == [[[2 * i]] for i in range(10)]


def test_several_workers_answer_at_once(bench: Callable[..., Bench]) -> None:
    b = bench(workers=2)
    held, free = Doubling("held"), Doubling("free")
    first = b.hold(held)
    assert b.settle(b.ask(free, 3))[0][0].tolist() == [[6]], "the second worker is free"
    held.open.set()
    b.settle(first)


def test_times_are_read_from_what_was_measured_and_learned() -> None:
    estimate = Estimate(MANIFEST)
    assert [estimate.seconds(rows) for rows in (1, 6, 11, 22)] == pytest.approx([1e-4, 6e-4, 1.1e-3, 2.2e-3])
    for _ in range(50):
        estimate.learn(1, 2e-4)
    assert estimate.seconds(6) == pytest.approx(1.2e-3, rel=0.01), "twice as slow at one size is twice as slow at all"
    estimate.learn(1, 60.0)
    assert estimate.seconds(1) < 1e-3, "one stall is not believed"
    assert Estimate({**MANIFEST, "measured": []}).seconds(4) > 0
