"""A contender: one engine in one form, ready to answer the requests of a pool."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree

from grc.bench.requests import Request
from grc.bench.subject import Subject
from grc.graph.capture import flat_tensors
from grc.runtime.program import load


@dataclass
class Form:
    """One of the settings in which an engine runs: seconds to build and to load it, and its bytes on disk."""

    name: str
    form: str
    build_s: float | None = field(default=None, kw_only=True)
    load_s: float | None = field(default=None, kw_only=True)
    bytes: int | None = field(default=None, kw_only=True)


@dataclass
class Contender(Form):
    """`prepare` turns a request into what `run` takes, outside of the clock; `tensors` flattens what `run` gives back.

    On CUDA, `run` goes from pinned host input to pinned host output, and `replay` runs once more on what is already on
    the device, to be timed by CUDA events.
    """

    prepare: Callable[[Request], Any]
    run: Callable[[Any], Any]
    tensors: Callable[[Any], list[torch.Tensor]]
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    replay: Callable[[Any], Any] | None = None

    def described(self) -> Form:
        """What can be sent to another process."""
        return Form(self.name, self.form, build_s=self.build_s, load_s=self.load_s, bytes=self.bytes)

    def answer(self, request: Request) -> list[torch.Tensor]:
        """The flat answer to one request, in memory of its own."""
        with self.scope():
            answer = self.tensors(self.run(self.prepare(request)))
        return [tensor.detach().to("cpu", copy=True) for tensor in answer]


def flat(answer: Any) -> list[torch.Tensor]:
    return flat_tensors(answer)[0]


def as_list(answer: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return list(answer)


def called(request: Request) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return request.args, request.kwargs


def in_pinned_memory(request: Request) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return pytree.tree_map(lambda x: x.pin_memory() if isinstance(x, torch.Tensor) else x, called(request))


def build_grc(subject: Subject, example: Request, batch: int) -> Iterator[Contender]:
    """The artifact as a user calls it: `program(*args, **kwargs)`, checks of the request and of the answer included.

    On CUDA its requests lie in pinned memory, as those of its peers do.
    """
    clock = Stopwatch()
    program = load(subject.place.artifact)
    load_s = clock.read()

    def run(prepared: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        return program(*prepared[0], **prepared[1])

    yield Contender(
        "grc",
        program.engine_at(batch),
        in_pinned_memory if subject.place.device == "cuda" else called,
        run,
        flat,
        replay=program.replayer(batch),
        load_s=load_s,
        bytes=program.artifact.bytes,
    )


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def read(self) -> float:
        return time.perf_counter() - self.start
