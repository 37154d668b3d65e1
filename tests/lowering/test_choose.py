"""What is said when no engine takes a graph."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import fx

from grc.errors import BudgetError, LoweringError
from grc.lowering.choose import Requests, build_all
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


def test_the_engine_that_was_asked_for_says_why(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"^engine second can't be used: it has no kernel for sort$") as caught:
        built(ENGINES, "second", tmp_path)
    assert not isinstance(caught.value, BudgetError) and "--engine auto" in str(caught.value.hint)


def test_an_unknown_engine_is_told_beside_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="there is no engine fourth") as caught:
        built(ENGINES, "fourth", tmp_path)
    assert str(caught.value.hint).endswith("first, second, third")
