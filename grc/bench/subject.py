"""The subject of a measurement: one model for every contender to build from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from grc.errors import GrcError
from grc.graph.capture import Source, capture
from grc.graph.model_file import Model, load_model
from grc.lowering.move import moved
from grc.runtime.device import DeviceWeights


class BenchError(GrcError):
    """A measurement that can't be made as asked."""


@dataclass(frozen=True)
class Place:
    """Which model to run, on how many threads of which device, which artifact to hold it against, and a folder in which
    contenders keep what they build once for all batch sizes."""

    model: str
    device: str
    threads: int
    folder: Path
    artifact: Path
    precision: str = "fp32"


class Subject:
    """The model in its place, captured when that is asked for."""

    def __init__(self, place: Place):
        self.place = place

    @cached_property
    def model(self) -> Model:
        return load_model(self.place.model)

    @cached_property
    def source(self) -> Source:
        return placed(capture(self.model), self.place.device)

    @property
    def module(self) -> nn.Module:
        return self.model.module if self.place.device == "cpu" else self.source.model.module


def placed(source: Source, device: str) -> Source:
    """The capture where it is measured: on a GPU the peers get the graph with all its constants there.

    A model that makes an index on the CPU in every call would else cost them their CUDA graphs.
    """
    if device == "cpu":
        return source
    gpu = torch.device(device, torch.cuda.current_device())
    weights = DeviceWeights(gpu)
    graph, _ = moved(source.graph, gpu, weights.on_device)
    model = source.model

    def inputs(batch: int) -> Any:
        return pytree.tree_map(lambda x: x.to(gpu) if isinstance(x, torch.Tensor) else x, model.inputs(batch))

    args, kwargs = model.inputs(2)
    flat_call = not kwargs and all(isinstance(arg, torch.Tensor) for arg in args)
    module = graph if flat_call else model.module.to(gpu)
    return replace(source, model=replace(model, module=module, inputs=inputs), graph=graph)
