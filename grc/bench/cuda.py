"""CUDA: from pinned host input to pinned host output, and the device's own time by events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from grc.bench.contender import Contender, as_list
from grc.bench.requests import Request

Device = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]
WARM_UP = 3  # cubins load lazily, and not inside a capture


class PinnedPath:
    """Copies a request to fixed device buffers, runs a function of them, and copies its answers to pinned memory.

    `function` takes and gives flat lists of device tensors.
    """

    def __init__(self, function: Device, example: Request):
        self.function = function
        self.inputs = [torch.empty_like(leaf, device="cuda") for leaf in example.leaves]
        self.outputs: list[torch.Tensor] | None = None
        self.load(example.leaves)
        torch.cuda.synchronize()

    def load(self, leaves: Sequence[torch.Tensor]) -> None:
        for buffer, leaf in zip(self.inputs, leaves, strict=True):
            buffer.copy_(leaf, non_blocking=True)

    def __call__(self, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self.load(leaves)
        answers = self.function(self.inputs)
        if self.outputs is None:
            self.outputs = [torch.empty_like(a, device="cpu", pin_memory=True) for a in answers]
        for host, answer in zip(self.outputs, answers, strict=True):
            host.copy_(answer, non_blocking=True)
        torch.cuda.synchronize()
        return self.outputs

    def replay(self, prepared: Any) -> Any:
        return self.function(self.inputs)


def captured(function: Device, example: Request) -> Device:
    """The function as a CUDA graph over fixed inputs: it may only be called with the buffers of its PinnedPath.

    Raises RuntimeError when the function can't be captured.
    """
    buffers: list[list[torch.Tensor]] = []
    graph = torch.cuda.CUDAGraph()
    answers: list[Sequence[torch.Tensor]] = []

    def run(inputs: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        if not buffers:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    function(list(inputs))
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=side):
                answers.append(function(list(inputs)))
            buffers.append(inputs)
        if inputs is not buffers[0]:
            raise RuntimeError("a captured graph answers only from the buffers that it was captured with")
        graph.replay()
        return answers[0]

    return run


def pinned(request: Request) -> list[torch.Tensor]:
    return [leaf.pin_memory() for leaf in request.leaves]


def device_seconds(replay: Callable[[Any], Any], prepared: Any) -> float:
    """Seconds of one run between two events, with the device idle before it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    replay(prepared)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def on_cuda(name: str, form: str, function: Device, example: Request) -> Contender:
    path = PinnedPath(function, example)
    return Contender(name, form, pinned, path, as_list, scope=torch.inference_mode, replay=path.replay)
