"""What an artifact's own functions return and raise, as every command and server tells it."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, datetime
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from grc.errors import ArtifactError, InputError
from grc.runtime.processing import Processing, written

NAN = float("nan")


class Kind(Enum):
    FILM = "film"


class Pair(NamedTuple):
    best: int
    score: torch.Tensor


@dataclass
class Item:
    score: Any
    kind: Kind


ANSWERS = [
    ({"best": np.int64(3), "score": np.float64(0.5)}, {"best": 3, "score": 0.5}),
    (np.array([[0.5, NAN]], dtype="float32"), [[0.5, None]]),
    (torch.tensor([1.5, -torch.inf]), [1.5, None]),
    ([NAN, 1.0, True, None, "films"], [None, 1.0, True, None, "films"]),
    (Item(torch.tensor([2.0]), Kind.FILM), {"score": [2.0], "kind": "film"}),
    (Pair(2, torch.tensor([1.0])), [2, [1.0]]),
    ({1: date(2026, 1, 2), "at": datetime(2026, 1, 2, 3)}, {"1": "2026-01-02", "at": "2026-01-02T03:00:00"}),
    ([2**70, "\ud800"], [2**70, "\ud800"]),
]


@pytest.mark.parametrize(("answer", "expected"), ANSWERS)
def test_an_answer_is_the_same_json_everywhere(answer: Any, expected: Any) -> None:
    assert json.loads(written(answer)) == expected
    pytest.importorskip("prometheus_client")
    from grc.runtime.server import service

    assert json.loads(service.written(answer)) == expected


def endless() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


NO_JSON = [
    ({"films": {1, 2}}, "postprocess returns a set, which is no JSON"),
    ({"films": b"one"}, "postprocess returns a bytes, which is no JSON"),
    ({(1, 2): 3}, "keys must be str, int, "),
    (endless(), "maximum recursion depth exceeded"),
]


@pytest.mark.parametrize(("answer", "reason"), NO_JSON)
def test_what_is_no_json_is_refused_everywhere(answer: Any, reason: str) -> None:
    pytest.importorskip("prometheus_client")
    from grc.runtime.server import service

    for write in (written, service.written):
        with pytest.raises(ArtifactError) as caught:
            write(answer)
        assert caught.value.message.startswith(reason)


def failing(error: BaseException) -> Processing:
    """Functions that raise it."""

    def fail(given: Any) -> Any:
        raise error

    processing = Processing.__new__(Processing)
    processing.functions = {"preprocess": fail, "postprocess": fail}
    return processing


RAISED = [
    (ValueError("no films left"), "no films left"),
    (KeyError(), "KeyError"),
    (StopIteration("x"), "x"),
    (SystemExit(3), "SystemExit(3)"),
    (asyncio.CancelledError(), "CancelledError()"),
]


@pytest.mark.parametrize(("error", "told"), RAISED)
def test_a_function_that_raises_or_exits_is_told_in_its_own_words(error: BaseException, told: str) -> None:
    processing = failing(error)
    with pytest.raises(ArtifactError) as after:
        processing.postprocess(torch.ones(1), {})
    assert after.value.message == f"postprocess: {told}"
    with pytest.raises(InputError) as before:
        processing.preprocess({})
    assert before.value.message == f"preprocess: {told}"


def test_an_interrupt_ends_the_process_and_is_an_error_on_a_thread() -> None:
    """Signals reach the main thread alone: on any other, the function itself has raised it."""
    processing = failing(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        processing.preprocess({})
    with ThreadPoolExecutor(1) as pool, pytest.raises(InputError, match=r"preprocess: KeyboardInterrupt\(\)"):
        pool.submit(processing.preprocess, {}).result()
