"""Readiness by canary: busy is not ill, silent is."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="needs grc-compiler[serve]")

from grc.errors import EngineError, InputError
from grc.runtime.server.health import Health
from grc.runtime.server.metrics import Metrics
from grc.runtime.server.refusal import Refused


class Answering:
    """A service whose answer to the canary is scripted: an error, silence, or whether the answer is right."""

    def __init__(self) -> None:
        self.answer: Any = True
        self.metrics = Metrics()
        self.said: list[tuple[str, str | None]] = []

    def log(self, level: str, event: str, **fields: Any) -> None:
        self.said.append((event, fields["message"]))

    async def compute(self, call: Any, version: Any, inputs: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer is None:
            await asyncio.sleep(60)
        return self.answer

    async def rehearse(self, call: Any, version: Any, request: Any) -> None:
        if request["error"] is None:
            await asyncio.sleep(60)
        raise request["error"]


@pytest.fixture
def service() -> Answering:
    return Answering()


@pytest.fixture
def health(service: Answering) -> Health:
    version = SimpleNamespace(canary=SimpleNamespace(inputs=[]), answers_rightly=bool, number="1", example=None)
    model = SimpleNamespace(name="m", version=version, healthy=True)
    return Health(service, SimpleNamespace(all={"m": model}), 0.1)  # type: ignore[arg-type]


BUSY = Refused(503, "model m is busy: 9 requests wait", "queue_full", 1.0)
CASES = [
    (True, True, None),
    (False, False, "it answers wrongly"),
    (None, False, "it did not answer within 0.1 s"),
    (BUSY, True, None),
    (EngineError("eager failed: out of memory"), False, "eager failed: out of memory"),
]


@pytest.mark.parametrize(("answer", "ready", "why"), CASES, ids=str)
def test_one_canary(service: Answering, health: Health, answer: Any, ready: bool, why: str | None) -> None:
    service.answer = answer
    asyncio.run(health.probe(health.models.all["m"]))
    assert health.ready() is health.model_ready("m") is ready
    assert service.said == ([] if why is None else [("canary failed", why)])


FUNCTIONS = [
    (None, "it did not answer within 0.1 s"),
    (InputError("preprocess: no table"), "preprocess: no table"),
    (Refused(500, "postprocess: no table", "postprocess"), "postprocess: no table"),
]


@pytest.mark.parametrize(("error", "why"), FUNCTIONS, ids=str)
def test_functions_that_fail_their_example_or_never_end(
    service: Answering, health: Health, error: Exception | None, why: str
) -> None:
    health.models.all["m"].version.example = {"error": error}
    asyncio.run(health.probe(health.models.all["m"]))
    assert not health.ready() and service.said == [("canary failed", why)]


def test_busy_does_not_mend_what_was_ill(service: Answering, health: Health) -> None:
    async def story() -> list[bool]:
        found = []
        for answer in (False, BUSY, True):
            service.answer = answer
            await health.probe(health.models.all["m"])
            found.append(health.ready())
        return found

    assert asyncio.run(story()) == [False, False, True]
    assert service.said == [("canary failed", "it answers wrongly"), ("canary answered", None)]


def test_draining_is_not_ready(health: Health) -> None:
    health.draining = True
    assert not health.ready() and not health.model_ready("m")
