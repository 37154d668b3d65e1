"""Replay golden requests against a real server: over HTTP and gRPC, one at a time and many at once, which Triton merges."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grc.errors import ArtifactError, GrcError, InputError
from grc.runtime.artifact import read_manifest
from grc.runtime.closeness import QUALITY, largest_error, within
from grc.runtime.golden import Golden, read_golden
from grc.runtime.processing import read_request, written
from grc.runtime.program import EXAMPLE, Program, load
from grc.runtime.triton_repository import config
from grc.runtime.triton_repository.client import PROTOCOLS, Client, Unavailable
from grc.runtime.triton_repository.launcher import Server, has_backend, serving
from grc.runtime.triton_repository.repository import Repository
from grc.runtime.triton_repository.requests import tensor_of
from grc.runtime.triton_repository.rows import single_rows
from grc.runtime.triton_repository.tensors import Interface, Tensor, interface
from grc.runtime.values import json_lines

AT_ONCE = 16  # clients
SLOWLY = 100_000  # microseconds for which requests wait for each other, where none was merged otherwise
LOADABLE = ("--model-control-mode=explicit", "--load-model=*")  # a server that loads a model again when it is told to
PATIENCE = 60.0  # seconds for which a request that gets a 503 is sent again
REQUEST = Tensor("request", "uint8", (-1,), ("n",))
ANSWER = Tensor("answer", "uint8", (-1,), ("n",))


@dataclass
class Replayed:
    """What was asked and how the answers were. `alone` says why no request may be merged, `warning` what was not asked."""

    tensors: int = 0
    requests: int = 0
    merged: int = 0
    alone: str | None = None
    warning: str | None = None
    error: float = 0.0
    server: str = ""
    ready_seconds: float = 0.0


def verify(repository: Repository, artifact_path: str | os.PathLike[str], requests: Sequence[Any] = ()) -> Replayed:
    """Start the real server on a repository and replay the artifact's golden requests, and as JSON its example and `requests`.

    Raises ArtifactError for an answer that is not the model's and where requests that may be merged are not, InputError where
    the model refuses its example or one of `requests`, GrcError where no server is found or it does not start.
    """
    backend = repository.record["backend"]
    if not has_backend(backend):
        raise GrcError(f"the tritonserver of this host has no {backend} backend", "export with --backend python")
    program = load(artifact_path)
    check_requests(program, requests)
    asked = [*requests, *examples(program)]
    try:
        with serving(repository.path, *repository.options, *LOADABLE) as server:
            return Replay(repository, program, server).run(asked)
    finally:
        forget_bytecode(repository.path)


def forget_bytecode(folder: Path) -> None:
    """Leave a repository as it was written: the server's Python keeps what it compiles, whatever the environment says."""
    for kept in list(folder.rglob("__pycache__")):
        shutil.rmtree(kept)


def check_requests(program: Program, requests: Sequence[Any]) -> None:
    """Raises InputError where the artifact itself refuses some of the requests, which would prove nothing, and ArtifactError
    where it takes none in its users' words.
    """
    refusals = []
    for request in requests:
        try:
            program.recommend(request)
        except InputError as error:
            refusals.append(error.message)
    if refusals:
        how = "was" if len(refusals) == 1 else "were"
        raise InputError(
            f"{len(refusals)} of {len(requests)} of your requests {how} refused: {refusals[0]}",
            "mend or remove them; grc run ARTIFACT --request answers one",
        )


def examples(program: Program) -> list[Any]:
    """The request among the artifact's assets, where it has one. Raises InputError where the artifact itself refuses it."""
    if "preprocess" not in (program.artifact.manifest["processing"] or {}):
        return []
    file = program.processing.folder / EXAMPLE
    if not file.is_file():
        return []
    try:
        request = read_request(file.read_text())
        program.recommend(request)
    except InputError as error:
        raise InputError(
            f"{EXAMPLE} among the assets was refused: {error.message}", "mend it, and compile the model again"
        ) from error
    return [request]


def read_requests(path: Path | None) -> list[Any]:
    """A JSON list, a single request, or a JSON request a line. Raises InputError where it is none of them."""
    if path is None:
        return []
    try:
        data = path.read_bytes()
        try:
            whole = json.loads(data)
        except ValueError:  # one a line, or no JSON at all
            if data.lstrip().startswith(b"["):
                raise
            return json_lines(data)
        return whole if isinstance(whole, list) else [whole]
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} holds no JSON requests: {error}", "write one request, a JSON list, or one request a line"
        ) from error


class Replay:
    """One repository, behind one server."""

    def __init__(self, repository: Repository, program: Program, server: Server):
        self.repository = repository
        self.program = program
        self.server = server
        settings = repository.record["settings"]
        self.whole = interface(
            {**program.artifact.manifest, "rows": not repository.record["alone"]}, settings["max_batch"]
        )
        self.budget = max(program.artifact.manifest["quality"].values(), default=0.0)
        if repository.layout == "fused":
            self.stages = [(repository.programs[0], self.whole)]
        else:
            self.stages = [(name, interface(read_manifest(repository.place(name)))) for name in repository.programs]
        self.entry = repository.entry
        self.done = Replayed(ready_seconds=server.seconds)

    def run(self, requests: list[Any]) -> Replayed:
        golden = [part for request in read_golden(self.program.artifact) for part in self.fitting(request)]
        for protocol in PROTOCOLS:
            client = Client(protocol, self.server.at(protocol))
            try:
                self.done.server = server_version(client)
                for index, request in enumerate(golden):
                    self.tensors(client, f"golden request {index}", request)
                    self.done.tensors += 1
                self.at_once(client, golden, AT_ONCE)
                if self.repository.preprocesses:
                    self.texts(client, requests)
            finally:
                client.close()
        self.done.alone = self.alone()
        if self.done.alone is None and not self.done.merged:
            self.slowly(golden)
        if self.repository.preprocesses and not requests:
            self.done.warning = "no example request went through preprocess: only tensors and {} were sent"
        return self.done

    # Requests as tensors

    def tensors(self, client: Client, what: str, request: Golden) -> None:
        """Ask the ensemble where it takes tensors, and else each program in turn."""
        answers = patiently(self.ask, client, request.inputs)
        error = largest_error(answers, request.outputs)
        self.done.error = max(self.done.error, error)
        if not within(error, self.budget, QUALITY):
            raise ArtifactError(
                f"{self.asked()} answers {what} over {client.protocol} {error:.1e} away from the model",
                "the repository was not written; check the artifact with grc check",
            )

    def ask(self, client: Client, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if not self.repository.preprocesses:
            return call(client, self.entry, self.whole, inputs)
        values = {entry.name: tensor for entry, tensor in zip(self.whole.inputs, inputs, strict=True)}
        for name, shapes in self.stages:
            made = call(client, name, shapes, [values[entry.name] for entry in shapes.inputs])
            values |= {entry.name: tensor for entry, tensor in zip(shapes.outputs, made, strict=True)}
        return [values[entry.name] for entry in self.whole.outputs]

    def asked(self) -> str:
        return " and ".join(self.repository.programs) if self.repository.preprocesses else self.entry

    def fitting(self, request: Golden) -> list[Golden]:
        """The request, or its rows where Triton would not take so many at once."""
        too_large = self.whole.merges and len(self.whole.inputs[0].to_rows(request.inputs[0])) > self.whole.max_batch
        return single_rows(self.whole, request) if too_large else [request]

    def rows(self, request: Golden) -> list[Golden]:
        """Each row as a request of its own, where rows can be told apart."""
        return single_rows(self.whole, request) if self.whole.merges else [request]

    def at_once(self, client: Client, golden: list[Golden], clients: int) -> None:
        """The rows of all requests from many clients; how many of them were merged is counted."""
        first = self.stages[0][0]
        rows = [row for request in golden for row in self.rows(request)]
        before = client.statistics(first)
        with ThreadPoolExecutor(clients) as pool:
            asked = [pool.submit(self.tensors, client, "a row of a golden request", row) for row in rows * 2]
            for each in asked:
                each.result()
        after = client.statistics(first)
        self.done.tensors += len(asked)
        self.done.merged += (after[0] - before[0]) - (after[1] - before[1])

    def alone(self) -> str | None:
        """Why no request may be merged, or None."""
        if self.repository.record["alone"]:
            return self.repository.record["alone"]
        name = self.stages[0][0]
        found = self.configuration(name)
        if not found.HasField("dynamic_batching"):
            return f"{name} has no dynamic_batching"
        if found.max_batch_size == 1:
            return f"the largest batch of {name} is 1"
        queue = found.dynamic_batching.default_queue_policy.max_queue_size
        return f"only one request may wait for {name}" if queue == 1 else None

    def slowly(self, golden: list[Golden]) -> None:
        """All rows once more, from more clients, for a server told to keep requests waiting for others and no answers.

        Raises ArtifactError where none is merged even then.
        """
        first = self.stages[0][0]
        client = Client("grpc", self.server.at("grpc"))
        try:
            for name in dict.fromkeys((first, self.entry)):
                found = self.configuration(name)
                found.response_cache.enable = False
                if name == first:
                    found.dynamic_batching.max_queue_delay_microseconds = SLOWLY
                    found.dynamic_batching.ClearField("default_queue_policy")
                client.load(name, found)
            self.at_once(client, golden, 4 * AT_ONCE)
        finally:
            client.close()
        if not self.done.merged:
            raise ArtifactError(
                f"no requests to {first} were merged, though its configuration asks for it",
                f"the repository was not written; export it with --max-batch 1 to serve {first} without merging",
            )

    def configuration(self, model: str) -> Any:
        return config.read(self.repository.path / model / "config.pbtxt")

    # Requests as text

    def texts(self, client: Client, requests: list[Any]) -> None:
        """The artifact's own answers to the same JSON. {} stands for what preprocess may refuse, in its words then."""
        for request in [*requests, {}]:
            found = expected = None
            try:
                expected = self.program.recommend(request)
            except InputError as error:
                refusal = error.message
            try:
                found = patiently(self.answer, client, request)
            except InputError as error:
                if expected is None and refusal in error.message:
                    continue
                raise
            if expected is None:
                raise ArtifactError(f"{self.entry} answers a request over {client.protocol} that preprocess refuses")
            if not self.right(found, expected) and self.right(
                json.loads(written(self.program.recommend(request))), expected
            ):
                raise ArtifactError(
                    f"{self.entry} answers a request over {client.protocol} otherwise than the artifact does",
                    "the repository was not written; compare with grc run ARTIFACT --request",
                )
            self.done.requests += 1

    def right(self, found: Any, expected: Any) -> bool:
        return alike(found, json.loads(written(expected)), max(2 * self.budget, QUALITY))

    def answer(self, client: Client, request: Any) -> Any:
        given = [(REQUEST, tensor_of(json.dumps(request)))]
        if self.repository.postprocesses:
            return json.loads(bytes(client.infer(self.entry, given, [ANSWER])[0].tolist()))
        outputs = client.infer(self.entry, given, self.whole.outputs)
        answers = [entry.to_model(tensor) for entry, tensor in zip(self.whole.outputs, outputs, strict=True)]
        build = self.program.build
        return json.loads(written(answers[0] if self.program.single else build(answers)))


def patiently(ask: Callable[..., Any], *args: Any) -> Any:
    """Ask until there is room in the queue and time: a refusal for want of either is no wrong answer."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return ask(*args)
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(random.uniform(0.005, 0.02))  # never in step with the server's delay


def call(client: Client, model: str, shapes: Interface, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One request in the model's shapes."""
    given = [(entry, entry.to_rows(tensor)) for entry, tensor in zip(shapes.inputs, inputs, strict=True)]
    made = client.infer(model, given, shapes.outputs)
    return [entry.to_model(tensor) for entry, tensor in zip(shapes.outputs, made, strict=True)]


def server_version(client: Client) -> str:
    found = client.connection.get_server_metadata()
    return found["version"] if client.protocol == "http" else found.version


def alike(a: Any, b: Any, tolerance: float) -> bool:
    """Equal JSON, with numbers within a relative tolerance."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key], tolerance) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(alike(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)) and isinstance(a, bool) is isinstance(b, bool):
        return abs(a - b) <= tolerance * max(1.0, abs(b))
    return a == b
