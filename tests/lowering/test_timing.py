"""The arithmetic of times: quantiles that were really seen, and turns that share a run fairly."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grc.lowering.timing import FEWEST, Processors, Turn, interleave, quantile, summarise


def test_a_summary_is_in_microseconds():
    timing = summarise([0.003, 0.001, 0.002, 0.004, 0.010])
    assert timing.p50 == pytest.approx(3000)
    assert timing.least == pytest.approx(1000)
    assert timing.p99 == pytest.approx(10000)
    assert timing.spread == pytest.approx((4 - 2) / 3)
    assert timing.calls == 5


def test_p99_leaves_out_one_call_in_a_hundred():
    assert summarise([1.0] * 99 + [9.0]).p99 == pytest.approx(1e6)
    assert summarise([1.0] * 98 + [9.0] * 2).p99 == pytest.approx(9e6)


def test_nothing_timed_is_no_time():
    with pytest.raises(ValueError, match="nothing was timed"):
        summarise([])


@given(st.lists(st.floats(1e-7, 10), min_size=1), st.floats(0.01, 1))
def test_a_quantile_was_measured_and_covers_its_share(seconds: list[float], share: float):
    ordered = sorted(seconds)
    value = quantile(ordered, share)
    assert value in ordered
    covered = sum(second <= value for second in ordered)
    assert covered >= share * len(ordered) - 1e-9 * len(ordered)


def test_engines_take_turns_and_start_apart():
    seen: list[tuple[str, int]] = []
    first = Turn(lambda index: seen.append(("a", index)))
    second = Turn(lambda index: seen.append(("b", index)))
    interleave([first, second], 8, 0.02, burst=0.002, lead_in=0.0, settle=0.0)
    names = [name for name, _ in seen]
    switches = sum(a != b for a, b in pairwise(names))
    assert switches >= 4
    assert {index for _, index in seen} == set(range(8))
    begins = {name: next(index for n, index in seen if n == name) for name in "ab"}
    assert (begins["b"] - begins["a"]) % 8 == 4


@pytest.mark.parametrize(("each", "calls"), [(0.1, 5), (0.3, 5), (0.9, 4), (4.0, 2)])
def test_slow_calls_are_two_and_quick_ones_five(each: float, calls: int):
    turn = Turn(lambda index: each)
    interleave([turn], 2, 0.4, burst=0.0, lead_in=0.0, settle=0.0, most=2.0)
    assert len(turn.seconds) == calls + calls % 2  # two in a burst


def test_calls_of_the_lead_in_are_not_recorded():
    calls: list[int] = []
    turn = Turn(calls.append)
    interleave([turn], 3, 0.001, burst=0.001, lead_in=0.005, settle=0.0)
    assert len(turn.seconds) < len(calls)


def test_a_slow_engine_is_called_often_enough_and_inside_its_scope():
    depth = 0

    @contextlib.contextmanager
    def scope() -> Iterator[None]:
        nonlocal depth
        depth += 1
        yield
        depth -= 1

    def call(index: int) -> None:
        assert depth == 1
        time.sleep(0.002)

    turn = Turn(call, scope)
    interleave([turn], 2, 0.0, burst=0.0, lead_in=0.0, settle=0.0)
    assert len(turn.seconds) >= FEWEST
    assert min(turn.seconds) >= 0.002
    assert depth == 0


def test_a_device_keeps_its_own_clock():
    turn = Turn(lambda index: None, device=lambda index: 0.5)
    interleave([turn], 2, 0.1, burst=0.0, lead_in=0.0, settle=0.0)
    assert set(turn.device_seconds) == {0.5}
    assert len(turn.device_seconds) == len(turn.seconds)


@pytest.mark.parametrize(
    ("busy", "own", "threads", "cores", "told"),
    [
        (20.0, 19.0, 2, 2, None),  # seconds in ten: the host's own housekeeping
        (160.0, 140.0, 16, 16, None),  # one of sixteen
        (25.0, 18.0, 2, 2, "other programs took 0.7 of 2 cores"),
        (25.0, 18.0, 1, 2, None),  # there was a core for each
        (90.0, 10.0, 4, 64, None),
        (640.0, 10.0, 4, 64, "other programs took 63.0 of 64 cores"),
    ],
)
def test_others_are_told_where_they_took_what_was_waited_for(
    busy: float, own: float, threads: int, cores: int, told: str | None
):
    found = Processors(100.0, 7.0, 50.0).crowded(Processors(100.0 + busy, 7.0 + own, 60.0), threads, cores)
    assert found is None if told is None else (found or "").startswith(f"{told} while the engines were measured")


def test_what_processors_did_is_read_from_the_host(tmp_path: Path):
    (tmp_path / "stat").write_text("cpu  100 20 30 5000 60 7 8 9 0 0\ncpu0 1 1 1 1\n")
    alone = Processors.now(proc=tmp_path)
    second = os.sysconf("SC_CLK_TCK")
    assert alone is not None and alone.busy * second == 100 + 20 + 30 + 7 + 8 + 9
    (tmp_path / "71").mkdir()
    (tmp_path / "71" / "stat").write_text("71 (a (b) c) S 1 71 71 0 -1 4194560 500 0 0 0 100000 20000 0 0 20 0 2\n")
    with_a_worker = Processors.now([71, 71], tmp_path)  # of two forms of one peer
    assert with_a_worker is not None and with_a_worker.own - alone.own == pytest.approx(120000 / second, abs=5)
    assert Processors.now([72], tmp_path) is None and Processors.now(proc=tmp_path / "none") is None
