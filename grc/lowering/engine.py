"""The engine protocol: why an engine can't be used, how it builds a graph, and what it leaves in the artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import fx


@dataclass(frozen=True)
class Target:
    """The host that an artifact is built for."""

    device: str
    isa: str
    threads: int
    sm: str | None = None


@dataclass
class Built:
    """What an engine made: one file below the artifact's folder, and the constants it reads by name."""

    engine: str
    file: str
    constants: dict[str, torch.Tensor]
    notes: list[str] = field(default_factory=list)
    checks_ids: bool = False  # whether its kernels see every id that has no row: a CPU's refuse it, a GPU's count it
    graphs: bool = False  # on a GPU: whether its runs are captured as CUDA graphs
    bucket: int | None = None  # on a GPU: the one batch size that it was built for
    counts_bad_ids: bool = False  # on a GPU: whether its kernels count ids outside of their tables, where COUNTER says


@dataclass(frozen=True)
class Lowerable:
    """An optimised graph with example inputs and the dynamic dimensions to export it again."""

    graph: fx.GraphModule
    inputs: Sequence[torch.Tensor]
    shapes: tuple[dict[int, object], ...]


class Engine(Protocol):
    name: str

    def missing(self, target: Target) -> str | None:
        """Why this engine can't be used for a target, with the command that would mend it; None when it can."""
        ...

    def build(self, lowerable: Lowerable, target: Target, folder: Path) -> Built:
        """Write the part below `folder`. Raises LoweringError with the reason when the engine refuses the graph."""
        ...
