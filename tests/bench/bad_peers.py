"""Peers that answer wrongly, break, or take their process with them."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from typing import Any

import torch

from grc.bench.contender import Contender, as_list, called
from grc.bench.requests import Request
from grc.bench.subject import Subject


def wrong(subject: Subject, example: Request, batch: int) -> Iterator[Contender]:
    module = subject.module
    yield Contender("wrong", "", called, lambda call: module(*call[0]) + 1, lambda answer: [answer])


def broken(subject: Subject, example: Request, batch: int) -> Iterator[Contender]:
    yield from ()
    raise RuntimeError("no kernel for this\nmore words")


def late(subject: Subject, example: Request, batch: int) -> Iterator[Contender]:
    """Its first form answers wrongly, its second rightly."""
    module = subject.module
    yield Contender("late", "first", called, lambda call: module(*call[0]) * 2, lambda answer: [answer])
    yield Contender("late", "second", lambda r: r.leaves, lambda leaves: [module(*leaves)], as_list, torch.no_grad)


def dies_building(subject: Subject, example: Request, batch: int) -> Iterator[Contender]:
    os.kill(os.getpid(), signal.SIGKILL)
    yield from ()


def dies_answering(subject: Subject, example: Request, batch: int) -> Iterator[Contender]:
    yield Contender("dies_answering", "", called, lambda call: os._exit(7), as_list)


def dies_running(subject: Subject, example: Request, batch: int) -> Iterator[Contender]:
    """It answers once, and then reads what is not its own."""
    module, calls = subject.module, [0]

    def run(leaves: list[torch.Tensor]) -> Any:
        calls[0] += 1
        return [module(*leaves)] if calls[0] == 1 else ctypes.string_at(0)

    yield Contender("dies_running", "", lambda request: request.leaves, run, as_list, torch.no_grad)
