"""The arithmetic of times: quantiles that were really seen, and turns that share a run fairly."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grc.lowering.timing import FEWEST, Turn, interleave, quantile, summarise


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
