"""The outcome of a search: what became of each table and layer, on what data and how it was come by."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from grc.precision.calibration import Calibration
from grc.precision.formats import BITS
from grc.precision.quality import Limit, Truth
from grc.precision.sites import LAYER
from grc.report.summary import size

Run = Callable[[list[Tensor]], Sequence[Tensor]]
# Choices beside the outcome itself, which engines are built of too: what its layers are in, by label.
FLOAT_LAYERS, HALF_LAYERS = "float-layers", "half-layers"


@dataclass
class Decision:
    """What became of one site. `smallest` is the smallest format that the precision has for its kind, or None where it has
    none, and `loss` what the site alone costs in the smallest that can hold it, as a share of the budget."""

    name: str
    kind: str
    format: str
    smallest: str | None
    bytes: int
    lowered_bytes: int
    loss: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Point:
    """One point of the frontier: bytes of all sites, their work for a row as a share of float32's, and the quality."""

    bytes: int
    work: float
    quality: dict[str, float]
    inside: bool
    chosen: bool = False


@dataclass(frozen=True)
class Step:
    """A trial on the way to the outcome: sites in the formats `tried`, beside those taken before, measured on so many `rows`,
    and the limit that they were `outside` of, or None where they were taken."""

    tried: Mapping[str, str]
    rows: int
    outside: str | None


@dataclass(frozen=True)
class Reference:
    """Calibration data and the float32 answers to them."""

    calibration: Calibration
    truth: Truth

    @torch.no_grad()
    def measure(self, run: Run, limits: Sequence[Limit]) -> dict[str, float]:
        return self.truth.measure([list(run(list(batch))) for batch in self.calibration.batches], limits)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As an artifact carries them."""
        labels = self.calibration.labels
        return {
            f"{i}.{kind}.{j}": tensor
            for i, (batch, answers) in enumerate(zip(self.calibration.batches, self.truth.answers, strict=True))
            for kind, row in (("input", batch), ("output", answers), ("label", labels[i : i + 1] if labels else ()))
            for j, tensor in enumerate(row)
        }


@dataclass
class Lowered:
    """The outcome: a format for each site that went down, why others did not, and the quality measured on `data`: of
    its trial, then of the engines that answer, the worst of them. `kept` is the part of `data` that the artifact carries."""

    precision: str
    limits: tuple[Limit, ...]
    data: Reference
    kept: Reference
    decisions: list[Decision] = field(default_factory=list)
    frontier: list[Point] = field(default_factory=list)
    path: list[Step] = field(default_factory=list)
    quality: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    trials: int = 0

    @property
    def formats(self) -> dict[str, str]:
        return {d.name: d.format for d in self.decisions if d.format != "fp32"}

    @property
    def choices(self) -> dict[str, dict[str, str]]:
        """Formats to build for a CPU: these, and where layers are among them the others alone, since a CPU without
        instructions for 8 bits may lose more by rounding a layer's input than it saves by reading its weight."""
        others = {d.name: d.format for d in self.decisions if d.format != "fp32" and d.kind != LAYER}
        return {"": self.formats} if others == self.formats else {"": self.formats, FLOAT_LAYERS: others}

    def summary(self) -> str:
        """`int8 27, bf16 1, fp32 2; max-error 0.014; 98.1 MB -> 24.6 MB`."""
        counts = Counter(decision.format for decision in self.decisions)
        formats = ", ".join(f"{form} {counts[form]}" for form in BITS if counts[form]) or "nothing to lower"
        quality = ", ".join(f"{name} {value:.2g}" for name, value in self.quality.items())
        before, after = sum(d.bytes for d in self.decisions), sum(d.lowered_bytes for d in self.decisions)
        return f"{formats}; {quality}; {size(before)} -> {size(after)}"

    def judge(self, run: Run) -> tuple[dict[str, float], str | None]:
        """The quality of an engine on all calibration rows, and why it is outside of the budget, or None. It is inside on
        the rows that are kept too: `grc check` measures on those."""
        found = self.data.measure(run, self.limits)
        return found, outside(self.limits, found) or outside(self.limits, self.kept.measure(run, self.limits))

    def json(self) -> dict[str, Any]:
        return {
            "asked": self.precision,
            "budget": [str(limit) for limit in self.limits],
            "quality": self.quality,
            "calibration": {
                "origin": self.data.calibration.origin,
                "rows": self.data.calibration.rows,
                "kept": self.kept.calibration.rows,
                "labels": self.data.calibration.labels is not None,
                "sha256": self.data.calibration.digest,
            },
            "sites": [asdict(replace(decision, loss=finite(decision.loss))) for decision in self.decisions],
            "frontier": [
                {**asdict(point), "quality": {name: finite(value) for name, value in point.quality.items()}}
                for point in self.frontier
            ],
            "path": [asdict(step) for step in self.path],
            "trials": self.trials,
            "notes": self.notes,
        }


def finite(value: float | None) -> float | None:
    """None for what JSON has no number for: a share of a limit of nothing, the error of answers that hold NaN."""
    return value if value is not None and math.isfinite(value) else None


def outside(limits: Sequence[Limit], values: Mapping[str, float], spent: float = 1.0) -> str | None:
    """`max-error 0.031, of max-error=0.02`: the limits that values break, or of which they spend more than this share."""
    broken = [limit for limit in limits if not limit.lost(values[limit.name]) <= spent]
    return ", ".join(f"{limit.name} {values[limit.name]:.2g}, of {limit}" for limit in broken) or None
