"""Which engines win, and what is said when none takes a graph."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from grc.errors import BudgetError, LoweringError
from grc.lowering.choose import Candidate, Requests, build_all, choose
from grc.lowering.engine import Built, Lowerable, Target

TARGET = Target("cpu", "default", 1)
NO_REQUESTS = Requests((), (), (), {})


class Refusing:
    """An engine that is never built: because of the host, or of the graph."""

    def __init__(self, name: str, lacks: str | None, fault: Exception | None = None):
        self.name, self.lacks, self.fault = name, lacks, fault

    def missing(self, target: Target) -> str | None:
        return self.lacks

    def build(self, lowerable: Lowerable, target: Target, folder: Path) -> Built:
        assert self.fault is not None
        raise self.fault


def built(engines: list[Refusing], only: str | None, folder: Path) -> None:
    graph = Lowerable(fx.GraphModule({}, fx.Graph()), (), ())
    build_all([(engine, graph) for engine in engines], TARGET, folder, NO_REQUESTS, only, lambda _: None)


ENGINES = [
    Refusing("first", "it is not installed"),
    Refusing("second", None, LoweringError("it has no kernel for sort")),
    Refusing("third", None, ValueError("bad shape\nat length")),
]


def test_every_engine_says_why_it_is_not_used(tmp_path: Path) -> None:
    with pytest.raises(LoweringError) as caught:
        built(ENGINES, None, tmp_path)
    assert caught.value.message.splitlines() == [
        "no engine can be used",
        "  first: it is not installed",
        "  second: it has no kernel for sort",
        "  third: ValueError: bad shape",
    ]
    assert caught.value.hint == "see grc doctor"


def test_a_full_disk_is_no_reason_for_another_engine(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        built([Refusing("first", None, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))), *ENGINES], None, tmp_path)


def test_the_engine_that_was_asked_for_says_why(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"^engine second can't be used: it has no kernel for sort$") as caught:
        built(ENGINES, "second", tmp_path)
    assert not isinstance(caught.value, BudgetError) and "--engine auto" in str(caught.value.hint)


class Answering(Refusing):
    """An engine that is built, and answers one number."""

    def build(self, lowerable: Lowerable, target: Target, folder: Path) -> Built:
        return Built(self.name, self.name, {})


@pytest.mark.parametrize(
    ("answer", "judge", "error"),
    [
        (math.inf, lambda run: ({"max-error": 0.0}, None), BudgetError),
        (1.0, lambda run: ({"max-error": 0.5}, "max-error 0.5"), BudgetError),
        (math.inf, None, LoweringError),
    ],
    ids=["overflows in fewer bits", "outside of the budget", "overflows in float32"],
)
def test_what_fewer_bits_have_no_number_for_is_outside_of_the_budget(
    answer: float, judge: Callable[..., Any] | None, error: type[Exception], tmp_path: Path
) -> None:
    """So that it is tried with more bits."""
    requests = Requests([[torch.ones(1)]], [[torch.ones(1)]], [0.0], {}, judge)
    graph = Lowerable(fx.GraphModule({}, fx.Graph()), (), ())
    with pytest.raises(LoweringError) as caught:
        build_all(
            [(Answering("first", None), graph)], TARGET, tmp_path, requests, None, lambda _: None,
            lambda built, folder: lambda inputs: [torch.full((1,), answer)],
        )  # fmt: skip
    assert type(caught.value) is error


def test_an_unknown_engine_is_told_beside_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="there is no engine fourth") as caught:
        built(ENGINES, "fourth", tmp_path)
    assert str(caught.value.hint).endswith("first, second, third")


@pytest.mark.parametrize(
    ("times", "winners"),
    [
        ({"a": (100, 100), "b": (96, 96)}, "aa"),  # a tie
        ({"a": (100, 100), "b": (94, 94)}, "bb"),
        ({"a": (100, 100), "b": (50, 96)}, "bb"),  # two parts for a tie
        ({"a": (100, 100), "b": (50, 104)}, "bb"),
        ({"a": (100, 100), "b": (50, 106)}, "ba"),
        ({"a": (100, 106), "b": (50, 104), "c": (80, 98)}, "bc"),  # as fast as what won, and not as the fastest
        ({"a": (100, 100, 100), "b": (50, 96, 200), "c": (80, 101, 80)}, "bbc"),
        ({"a": (100, 100, 100), "b": (50, 106, 200), "c": (80, 104, 80)}, "bcc"),
    ],
)
def test_ties_go_to_earlier_engines_and_to_few_parts(times: dict[str, tuple[float, ...]], winners: str) -> None:
    found = [Candidate(Built(name, name, {}), lambda inputs: [], 0.0) for name in times]
    for candidate in found:
        candidate.times = {1 << i: [seconds] for i, seconds in enumerate(times[candidate.built.engine])}
    choice = choose(found, {}, dict.fromkeys(found[0].times, 1000.0))
    assert "".join(candidate.built.engine for _, candidate in choice.winners) == winners
