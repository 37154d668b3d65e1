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
    """The model in its place, captured when that is asked for. For peers on a GPU it may be `narrowed` to 16 bits."""

    def __init__(self, place: Place, narrowed: bool = False):
        self.place = place
        self.narrowed = narrowed and place.device == "cuda" and place.precision != "fp32"

    @cached_property
    def model(self) -> Model:
        model = load_model(self.place.model)
        return in_16_bits(model, self.place.precision) if self.narrowed else model

    @cached_property
    def source(self) -> Source:
        return placed(capture(self.model), self.place.device)

    @property
    def module(self) -> nn.Module:
        return self.model.module if self.place.device == "cpu" else self.source.model.module


class Narrowed(nn.Module):
    """A module in a narrower dtype, called as before: numbers are cast on their way in."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.module, self.dtype = module.to(dtype), dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(self.cast, (args, kwargs))
        return self.module(*args, **kwargs)

    def cast(self, x: Any) -> Any:
        return x.to(self.dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def in_16_bits(model: Model, precision: str) -> Model:
    """A model as people run it on a GPU who lower it by hand: bfloat16 where that is asked for, else float16. Its module is
    changed in place. Raises BenchError for a saved program, whose operators name the dtypes it was saved with."""
    if model.program is not None:
        raise BenchError("a saved program keeps the dtypes that it was saved with", "measure the model's Python file")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return replace(model, module=Narrowed(model.module, dtype).eval())


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
