"""Stages as things to build: what each takes at any batch size, how its tensors' sizes follow the batch, and what won."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import Dim

from grc.graph.capture import SAMPLES, Source
from grc.graph.cut import Stage
from grc.graph.sizes import Size, described, find_sizes
from grc.lowering.choose import Choice
from grc.lowering.engine import Lowerable

Values = dict[str, torch.Tensor]


class Line:
    """The stages one after another, fed with the model's own inputs."""

    def __init__(self, source: Source, stages: list[Stage]):
        self.source = source
        self.stages = stages
        self.known: dict[int, Values] = {}
        samples = {batch: self.at(batch) for batch in SAMPLES}
        self.names = list(samples[SAMPLES[0]])
        found = find_sizes({b: list(values.values()) for b, values in samples.items()}, self.names)
        self.sizes: dict[str, tuple[Size, ...]] = dict(zip(self.names, found, strict=True))

    @torch.no_grad()
    def at(self, batch: int) -> Values:
        """Every tensor between the stages, by name."""
        if batch not in self.known:
            values = dict(zip(self.source.names, self.source.inputs(batch), strict=True))
            for stage in self.stages:
                made = stage.graph(*(values[name] for name in stage.inputs))
                values |= zip(stage.outputs, made, strict=True)
            self.known[batch] = values
        return self.known[batch]

    def inputs(self, stage: Stage, batch: int) -> list[torch.Tensor]:
        return [self.at(batch)[name] for name in stage.inputs]

    def described(self, names: list[str]) -> list[dict[str, Any]]:
        """Tensors as the manifest has them."""
        values, own = self.at(SAMPLES[0]), dict(zip(self.source.names, self.source.bounds, strict=True))
        return [{"name": n, **described(values[n].dtype, self.sizes[n], own.get(n, ()))} for n in names]

    def lowerable(self, stage: Stage, graph: fx.GraphModule, batch: int) -> Lowerable:
        shapes = tuple(
            {i: Dim.DYNAMIC for i, size in enumerate(self.sizes[name]) if not size.constant} for name in stage.inputs
        )
        return Lowerable(graph, self.inputs(stage, batch), shapes)


@dataclass(frozen=True)
class BuiltStage:
    """A stage with the parts that won."""

    name: str
    graph: fx.GraphModule
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    choice: Choice
