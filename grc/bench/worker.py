"""Workers: each contender builds and runs in a process of its own, so that no engine's memory, threads, global settings or
crash reach another, and all of it goes when the process ends.

A worker is asked by name for what `Stage` has, one question at a time, over a pipe.
"""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

import torch

from grc.bench import cuda
from grc.bench.contender import Contender, Form
from grc.bench.requests import Request
from grc.bench.subject import BenchError, Place, Subject
from grc.errors import GrcError, first_line
from grc.lowering.timing import Turn
from grc.options import Options

WARM_UP = 3


class WorkerError(BenchError):
    """What a worker was asked for failed, or its process is gone: the message is what a row says of it."""


class Worker:
    """A process to ask. Close it, also after an error."""

    def __init__(self, place: Place, environment: Mapping[str, str]):
        self.connection, theirs = multiprocessing.Pipe()
        path = os.pathsep.join([*sys.path, environment.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "grc.bench.worker", str(theirs.fileno())],
            env={**environment, "PYTHONPATH": path},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the parent's is for rows
        )
        theirs.close()
        self.connection.send_bytes(packed(place))

    def ask(self, question: str, *arguments: Any) -> Any:
        """The answer. Raises the GrcError that the worker raised, and WorkerError for any other fault."""
        try:
            self.connection.send_bytes(packed((question, arguments)))
            answer = unpacked(self.connection.recv_bytes())
        except (EOFError, OSError):
            raise WorkerError(ended(self.process.wait())) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


def ended(code: int) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed: out of memory?"
    return f"its process died: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"


def packed(value: Any) -> bytes:
    """Tensors as their bytes: torch's own way between processes needs a /dev/shm as large as they are."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


@dataclass
class Stage:
    """What a worker holds: the model, the forms of one contender for one batch size, and the requests that go round."""

    subject: Subject
    contenders: list[Contender] = field(default_factory=list)
    pool: Sequence[Request] = ()
    turns: dict[int, Turn] = field(default_factory=dict)

    def compile(self, model: str, options: Options) -> None:
        from grc.compiler import compile  # it takes long to import, and only one worker compiles

        compile(model, options=options)

    def build(self, builder: str, example: Request, batch: int) -> tuple[list[Form], str | None]:
        """What `module:function` could build of a contender for a batch size, and why it could not build the rest. What
        was built for another size is dropped.
        """
        self.contenders, self.turns = [], {}
        gc.enable()
        gc.collect()
        module, _, function = builder.partition(":")
        fault = None
        try:
            for contender in getattr(import_module(module), function)(self.subject, example, batch):
                self.contenders.append(contender)
        except Exception as error:  # an engine may raise anything; its row then says why it has no time
            fault = first_line(error)
        return [contender.described() for contender in self.contenders], fault

    def serve(self, pool: Sequence[Request]) -> None:
        """Requests that go round from now on."""
        self.pool, self.turns = pool, {}

    def answer(self, index: int) -> list[torch.Tensor]:
        """A form's flat answer to the first request."""
        return self.contenders[index].answer(self.pool[0])

    def burst(self, index: int, cursor: int, *lengths: float) -> tuple[list[float], list[float], int]:
        """Seconds of a form's recorded calls from `cursor` on, those of the device's clock, and where it stopped."""
        if index not in self.turns:
            self.turns[index] = self.ready(self.contenders[index])
            gc.collect()
            gc.disable()
        turn = self.turns[index]
        turn.seconds, turn.device_seconds, turn.cursor = [], [], cursor
        turn.burst(len(self.pool), *lengths)
        return turn.seconds, turn.device_seconds, turn.cursor

    def ready(self, contender: Contender) -> Turn:
        """A turn of warmed-up calls on requests prepared outside of the clock."""
        with contender.scope():
            prepared = [contender.prepare(request) for request in self.pool]
            for index in range(WARM_UP):
                contender.run(prepared[index % len(prepared)])
        replay = contender.replay or contender.run
        on_device = (
            (lambda index: cuda.device_seconds(replay, prepared[index]))
            if self.subject.place.device == "cuda"
            else None
        )
        return Turn(lambda index: contender.run(prepared[index]), contender.scope, on_device)


class RemoteTurn(Turn):
    """The turn of a form in its worker."""

    def __init__(self, worker: Worker, index: int):
        super().__init__(lambda index: None)
        self.worker, self.index = worker, index
        self.fault: str | None = None

    def wants(self, seconds: float, most: float) -> bool:
        return self.fault is None and super().wants(seconds, most)

    def burst(self, pool: int, burst: float, lead_in: float, settle: float) -> None:
        try:
            seconds, device, self.cursor = self.worker.ask("burst", self.index, self.cursor, burst, lead_in, settle)
        except WorkerError as error:
            self.fault = error.message
        else:
            self.seconds += seconds
            self.device_seconds += device


def main() -> None:
    """Answer until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    with suppress(EOFError, BrokenPipeError):
        serve(Connection(int(sys.argv[1])))


def serve(connection: Connection) -> None:
    stage = Stage(Subject(unpacked(connection.recv_bytes()), narrowed=True))
    torch.set_num_threads(stage.subject.place.threads)
    while True:
        question, arguments = unpacked(connection.recv_bytes())
        answer: Any
        try:
            answer = getattr(stage, question)(*arguments)
        except GrcError as error:
            answer = error
        except Exception as error:
            answer = WorkerError(first_line(error))
        connection.send_bytes(packed(answer))


if __name__ == "__main__":
    main()
