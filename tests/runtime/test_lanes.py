"""Lanes on the CPU, their CUDA graphs played from a tape: what goes in, what comes out, and what is refused."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grc.errors import ArtifactError
from grc.runtime import bucket, buckets
from grc.runtime.buckets import Buckets, Lane
from grc.runtime.plan import Plan
from tests.runtime.tape import install

INPUTS = [
    {"name": "dense", "dtype": "float32", "sizes": ["batch", 3]},
    {"name": "ids", "dtype": "int64", "sizes": [2, "batch"]},
    {"name": "bias", "dtype": "float32", "sizes": [3]},
]
OUTPUTS = [{"dtype": "float32", "sizes": ["batch", 3]}, {"dtype": "int64", "sizes": ["batch"]}]
ROWS = 10


@pytest.fixture(autouse=True)
def tape(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def model(calls: list[int], told: Tensor) -> Callable[[list[Tensor]], list[Tensor]]:
    """Two answers; ids outside of a table of ten rows are counted where it is told."""
    address, complement = told[:2].tolist()
    assert address == ~complement
    counter = torch.from_numpy(np.ctypeslib.as_array(ctypes.c_int64.from_address(address)))

    def run(inputs: list[Tensor]) -> list[Tensor]:
        calls.append(len(inputs[0]))
        counter.add_(((inputs[1] < 0) | (inputs[1] >= ROWS)).sum())
        return expected(inputs)

    return run


def request(batch: int) -> list[Tensor]:
    return [torch.rand(batch, 3), torch.randint(0, ROWS, (2, batch)), torch.rand(3)]


def expected(inputs: list[Tensor]) -> list[Tensor]:
    dense, ids, bias = inputs
    return [dense * 2 + bias, ids.sum(0)]


def plan(sizes: tuple[int, ...] = (1, 4, 16), **more: Any) -> Plan:
    return Plan.of(INPUTS, OUTPUTS, sizes, **more)


def lane_of(run: Buckets) -> Lane:
    """Its one lane, which stays free."""
    lane = run.free.get()
    run.free.put(lane)
    return lane


def test_replays_answer_every_size_and_run_the_model_no_more() -> None:
    calls: list[int] = []
    run = Buckets(lambda told: model(calls, told), plan(), counts=True)
    assert calls == [16] * 4 + [4] * 4 + [1] * 4, "three runs to warm up and one to capture, the largest bucket first"
    for batch in (1, 2, 4, 5, 16, 17, 50, 3, 1):
        inputs = request(batch)
        found = run(inputs)
        assert all(map(torch.equal, found, expected(inputs))) and len(found) == 2
    assert len(calls) == 12


@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_of_both_graphs_is_kept(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels that begin early, and without; a bucket's other graphs are as the one that was kept."""
    begun: list[bool] = []

    def instantiate(graph: Any, early: bool) -> int:
        begun.append(early)
        return 2 if early else 0

    monkeypatch.setattr(buckets, "instantiate", instantiate)
    monkeypatch.setattr(buckets, "faster", lambda early, plain: faster)
    run = Buckets(lambda told: model([], told), plan((1, 4)), counts=True)
    lane = lane_of(run)
    assert begun == [True, False] * 2
    for one in lane.buckets.values():
        assert one.early == faster
        assert {lane.recorded(one, taken, True).early for taken in (True, False)} == {2 if faster else 0}
    inputs = request(3)
    assert all(map(torch.equal, run(inputs), expected(inputs)))


def test_answers_stay_when_other_requests_follow() -> None:
    run = Buckets(lambda told: model([], told), plan(), counts=True)
    inputs = request(3)
    found, wanted = run(inputs), expected(inputs)
    for batch in (1, 4, 16):
        run(request(batch))
    assert all(map(torch.equal, found, wanted))


def test_a_large_request_in_pinned_memory_is_copied_from_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    monkeypatch.setattr(bucket, "LARGE", 64)
    run = Buckets(lambda told: model([], told), plan(), counts=True)
    lane = lane_of(run)
    assert [lane.buckets[batch].large for batch in (1, 4, 16)] == [False, False, True]
    lane.host_in.fill_(77)
    for batch in (5, 16):
        inputs = request(batch)
        assert all(map(torch.equal, run(inputs), expected(inputs)))
    assert bool((lane.host_in == 77).all()), "nothing went through the bucket's own memory"
    inputs = request(7)
    inputs[1][1, 6] = -4
    with pytest.raises(IndexError):
        run(inputs)


def test_large_answers_are_the_callers_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "APART", 100)
    run = Buckets(lambda told: model([], told), plan(), counts=True)
    lane = lane_of(run)
    assert [lane.buckets[batch].apart for batch in (1, 4, 16)] == [[], [], [0, 1]]
    lane.host_out.fill_(77)
    requests = [request(batch) for batch in (5, 16, 9)]
    found = [run(inputs) for inputs in requests]
    assert all(all(map(torch.equal, f, expected(i))) for f, i in zip(found, requests, strict=True))
    assert bool((lane.host_out == 77).all()), "nothing went through the bucket's own memory"
    bad = request(7)
    bad[1][1, 6] = -4
    with pytest.raises(IndexError):
        run(bad)


def test_callers_that_hold_many_large_answers_get_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "APART", 40)
    monkeypatch.setattr(bucket, "LENT", 1)
    run = Buckets(lambda told: model([], told), plan(), counts=True)
    lane = lane_of(run)
    assert lane.buckets[4].apart == [0], "the other answer is small"
    held: list[Tensor] = []

    def through_the_bucket() -> bool:
        lane.buckets[4].answers[0].fill_(77)
        inputs = request(4)
        found = run(inputs)
        assert all(map(torch.equal, found, expected(inputs)))
        held.append(found[0][1])  # one row of an answer keeps all of its memory
        return not bool((lane.buckets[4].answers[0] == 77).all())

    assert [through_the_bucket() for _ in range(4)] == [False, False, True, True]
    held.clear()
    assert not through_the_bucket()


@pytest.mark.parametrize("on_host", [0, 1 << 15], ids=["on the device", "on the host"])
@pytest.mark.parametrize("pinned", [False, True])
def test_nan_is_found_wherever_it_is_looked_for(monkeypatch: pytest.MonkeyPatch, on_host: int, pinned: bool) -> None:
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: pinned)
    monkeypatch.setattr(bucket, "LARGE", 1)
    monkeypatch.setattr(bucket, "ON_HOST", on_host)
    run = Buckets(lambda told: model([], told), plan(), counts=True)
    for batch in (1, 3, 16, 20):
        inputs = request(batch)
        assert not run(inputs).nan
        inputs[0][batch - 1, 1] = float("nan")
        assert run(inputs).nan
        inputs[0][batch - 1, 1] = float("inf")
        assert not run(inputs).nan
        lane = lane_of(run)
        inputs = [inputs[0][:1], inputs[1][:, :1], inputs[2]]
        assert not lane.from_device(inputs, 1, None).nan
        inputs[2][2] = float("nan")
        assert lane.from_device(inputs, 1, None).nan


@pytest.mark.parametrize("place", [(0, 0), (1, 4)])
def test_a_bad_id_is_refused_and_the_next_request_is_answered(place: tuple[int, int]) -> None:
    run = Buckets(lambda told: model([], told), plan(), counts=True)
    bad = request(5)
    bad[1][place] = ROWS
    with pytest.raises(IndexError, match="outside of their tables"):
        run(bad)
    good = request(5)
    assert all(map(torch.equal, run(good), expected(good)))


def test_without_buckets_every_request_runs_the_model() -> None:
    calls: list[int] = []
    run = Buckets(lambda told: model(calls, told), plan(reason="jagged"), counts=True)
    inputs = request(7)
    assert all(map(torch.equal, run(inputs), expected(inputs))) and calls == [7]
    inputs[1][0, 0] = -1
    with pytest.raises(IndexError):
        run(inputs)


def test_many_threads_on_two_lanes() -> None:
    run = Buckets(lambda told: model([], told), plan(streams=2), counts=True)
    requests = [request(batch) for batch in (1, 3, 9, 20)]
    wanted = [expected(inputs) for inputs in requests]

    def ask(turn: int) -> bool:
        return all(map(torch.equal, run(requests[turn % 4]), wanted[turn % 4]))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(200)))


def test_answers_of_another_shape_than_the_manifest_says_are_refused() -> None:
    with pytest.raises(ArtifactError, match="the manifest says"):
        Buckets(lambda told: lambda inputs: [inputs[0][:, :2], inputs[1].sum(0)], plan(), counts=False)


def test_from_the_device_without_copies_through_the_host() -> None:
    run = Buckets(lambda told: model([], told), plan(), counts=True)
    lane = run.free.get()
    for batch in (3, 16, 3):
        inputs = request(batch)
        found = lane.from_device(inputs, batch, None)
        assert all(map(torch.equal, found, expected(inputs)))
    inputs[1][1, 2] = -4
    with pytest.raises(IndexError):
        lane.from_device(inputs, 3, None)
    run.free.put(lane)
    good = request(2)
    assert all(map(torch.equal, run(good), expected(good)))
