"""What an artifact's own functions return and raise, as every command and server tells it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import date, datetime
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from grc.errors import ArtifactError
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
]


@pytest.mark.parametrize(("answer", "expected"), ANSWERS)
def test_an_answer_is_the_same_json_everywhere(answer: Any, expected: Any) -> None:
    assert json.loads(written(answer)) == expected
    pytest.importorskip("orjson")
    pytest.importorskip("httptools")
    from grc.runtime.server import http_app

    assert json.loads(http_app.written(answer)) == expected


@pytest.mark.parametrize(
    ("answer", "reason"),
    [({"films": {1, 2}}, "postprocess returns a set, which is no JSON"), ({(1, 2): 3}, "keys must be str, int, ")],
)
def test_what_is_no_json_is_refused(answer: Any, reason: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        written(answer)
    assert caught.value.message.startswith(reason)


@pytest.mark.parametrize(("error", "told"), [(ValueError("no films left"), "no films left"), (KeyError(), "KeyError")])
def test_a_postprocess_that_raises_is_told_in_its_own_words(error: Exception, told: str) -> None:
    def fail(outputs: Any) -> Any:
        raise error

    processing = Processing.__new__(Processing)
    processing.functions = {"postprocess": fail}
    with pytest.raises(ArtifactError) as caught:
        processing.postprocess(torch.ones(1), {})
    assert caught.value.message == f"postprocess: {told}"
