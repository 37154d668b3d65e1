"""The search: measure each table and layer alone, lower them from the cheapest loss on, and stay inside the budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from grc.errors import GrcError, message_of
from grc.precision.calibration import KEPT, LEAST, ROWS, Calibration, check_labels
from grc.precision.formats import BITS, FORMATS
from grc.precision.quality import AUC, Limit, Truth, inside, lost
from grc.precision.sites import LAYER, TABLE, Site
from grc.precision.trial import Rounded, Trial
from grc.report.summary import size

Progress = Callable[[str], None]
Run = Callable[[list[Tensor]], Sequence[Tensor]]
# How much of the budget a trial may spend. An engine sums in another order, so that values near the middle of two steps go
# the other way: seen to move the largest error of a 6-layer Transformer by 15%, and once by 27%. Where an engine lands
# outside all the same, the next smaller share is tried.
SPENT = (0.8, 0.6, 0.4)
# Choices beside the outcome itself, which engines are built of too: what its layers are in, by label.
FLOAT_LAYERS, HALF_LAYERS = "float-layers", "half-layers"
OTHER_LAYERS = {FLOAT_LAYERS: "fp32", HALF_LAYERS: "fp16"}
FRONTIER = 6  # points of the frontier between nothing lowered and everything


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
    """The outcome: a format for each site that went down, why others did not, and the quality measured on `data`. `kept` is
    the part of it that the artifact carries."""

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


class Search:
    """One search over a graph. Trials run on some rows of the data, the outcome is verified on all of them."""

    def __init__(
        self,
        graph: fx.GraphModule,
        sites: Sequence[Site],
        calibration: Calibration,
        limits: tuple[Limit, ...],
        precision: str,
        progress: Progress,
        device: str = "cpu",
    ):
        self.device = device
        self.graph, self.sites, self.limits, self.precision, self.progress = graph, sites, limits, precision, progress
        check_labels(calibration, limits)
        self.weights = Rounded(graph)
        self.trials = 0
        self.path: list[Step] = []
        self.losses: dict[str, float] = {}
        both = any(limit.metric == AUC for limit in limits)
        self.all = self.answered(calibration)
        self.some = self.answered(calibration.sample(ROWS, both))
        rows, count = self.some.calibration.rows, sum(tensor.nbytes for tensor in self.some.tensors.values())
        fit = int(KEPT * sum(site.bytes for site in sites) * rows / max(count, 1))
        self.kept = self.answered(self.some.calibration.sample(max(fit - fit % LEAST, LEAST), both))

    @torch.no_grad()
    def answered(self, calibration: Calibration) -> Reference:
        try:
            answers = [list(self.graph.forward(*batch)) for batch in calibration.batches]
        except (IndexError, RuntimeError) as error:  # an id outside of its table, say
            told = f"the model fails on the calibration data ({calibration.origin}): {message_of(error)}"
            raise GrcError(told, "give requests that the model answers") from error
        return Reference(calibration, Truth(answers, calibration.labels))

    def run(self, spent: float = SPENT[0]) -> Lowered:
        """The outcome of trials that may spend this share of the budget."""
        self.spent = spent
        notes = list(self.all.calibration.notes)
        outcome = Lowered(self.precision, self.limits, self.all, self.kept, notes=notes)
        able = [site for site in self.sites if site.reason is None and self.options(site)]
        losses = self.losses = self.losses or self.sensitivities(able)
        # What computes an answer goes last: an error there is not averaged over anything.
        order = sorted(able, key=lambda site: (site.head, losses[site.name] / max(site.work, 1)))
        formats, reasons = self.lower(order)
        if self.device == "cuda":
            self.one_format_an_arena(formats, reasons)
        while formats and (why := self.verified(formats, outcome)) is not None:
            self.step_back(formats, reasons, why)
            if self.device == "cuda":
                self.one_format_an_arena(formats, reasons)
        if not formats:
            outcome.quality = self.all.truth.measure(self.all.truth.answers, self.limits)
        outcome.frontier = self.frontier(order, formats)
        for site in self.sites:
            form = formats.get(site.name, "fp32")
            smallest = next(iter(self.every(site)), None)
            reason = None
            if form != smallest:
                reason = site.reason or reasons.get(site.name) or site.unscaled
            if form == "fp32":
                reason = reason or self.nothing(site)
            lowered = site.lowered_bytes(form)
            loss = losses.get(site.name)
            outcome.decisions.append(Decision(site.name, site.kind, form, smallest, site.bytes, lowered, loss, reason))
        outcome.trials, outcome.path = self.trials, list(self.path)
        return outcome

    def settle(self, outcome: Lowered, engines: Mapping[int, str]) -> None:
        """Let an outcome say what the engines that answer at each batch size make of it."""
        for label, form in OTHER_LAYERS.items():
            batches = [batch for batch, engine in engines.items() if label in engine]
            lowered = [d for d in outcome.decisions if d.kind == LAYER and BITS[d.format] < BITS[form]]
            if len(batches) == len(engines):
                for decision in lowered:
                    decision.reason = f"{decision.format}: the engine chosen keeps layers in {form}"
                    decision.format = form
                for site, decision in zip(self.sites, outcome.decisions, strict=True):
                    decision.lowered_bytes = site.lowered_bytes(decision.format)
                outcome.quality = self.measure(outcome.formats, self.all)
                others = [point for point in outcome.frontier if not point.chosen]
                chosen = replace(self.point(outcome.formats), chosen=True)
                outcome.frontier = sorted([*others, chosen], key=lambda point: -point.bytes)
            elif batches:
                sizes = ", ".join(map(str, batches))
                outcome.notes.append(
                    f"at batch {sizes} the engine chosen keeps layers in {form}: they are stored twice"
                )

    def every(self, site: Site) -> tuple[str, ...]:
        """What the precision has for a site's kind, the smallest first."""
        return FORMATS[site.kind][self.device].get(self.precision, ())

    def options(self, site: Site) -> tuple[str, ...]:
        """And what of it can hold the site. A table that float16 can't scale has bfloat16 left, but on a GPU, where an arena
        has one format."""
        every = self.every(site)
        if site.unscaled is None or not every:
            return every
        return ("bf16",) if self.device == "cpu" or every == ("bf16",) else ()

    def nothing(self, site: Site) -> str:
        return f"{self.precision} has no format for {site.kind}s on a {'CPU' if self.device == 'cpu' else 'GPU'}"

    def sensitivities(self, sites: Sequence[Site]) -> dict[str, float]:
        """What each site alone costs in its smallest format, as a share of the budget."""
        losses = {}
        for i, site in enumerate(sites):
            self.progress(f"sensitivity {i + 1} of {len(sites)}")
            losses[site.name] = lost(self.limits, self.measure({site.name: self.options(site)[0]}))
        return losses

    def lower(self, order: Sequence[Site]) -> tuple[dict[str, str], dict[str, str]]:
        """Lower in order as far as the budget allows: in blocks, halved where one is too much, a site in its next format
        where its smallest is too small."""
        formats: dict[str, str] = {}
        reasons: dict[str, str] = {}

        def take(block: Sequence[Site], step: int) -> None:
            wanted = {site.name: self.options(site)[step] for site in block if step < len(self.options(site))}
            if not wanted:
                return
            self.progress(f"{len(formats)} of {len(order)} lowered")
            why = outside(self.limits, self.measure({**formats, **wanted}), self.spent)
            self.path.append(Step(wanted, self.some.calibration.rows, why))
            if why is None:
                formats.update(wanted)
            elif len(block) > 1:
                take(block[: len(block) // 2], step)
                take(block[len(block) // 2 :], step)
            else:
                reasons.setdefault(block[0].name, f"{next(iter(wanted.values()))}: {why}")

        for step in range(max((len(self.options(site)) for site in order), default=0)):
            waiting = [site for site in order if site.name not in formats]
            if waiting:
                take(waiting, step)
        return formats, reasons

    def step_back(self, formats: dict[str, str], reasons: dict[str, str], why: str) -> None:
        """Give a site its next format, or none where it has no other: the costliest of those that stepped back least."""

        def steps(site: Site) -> int:
            own = self.options(site)
            return own.index(formats[site.name]) if formats[site.name] in own else len(own)

        able = [site for site in self.sites if site.name in formats]
        site = max(able, key=lambda site: (-steps(site), self.losses.get(site.name, 0.0)))
        later = self.options(site)[steps(site) + 1 :]
        reasons[site.name] = f"{formats[site.name]} on all rows: {why}"
        if later:
            formats[site.name] = later[0]
        else:
            del formats[site.name]

    def one_format_an_arena(self, formats: dict[str, str], reasons: dict[str, str]) -> None:
        """On a GPU the kernels read all rows of an arena alike: its tables take the widest of their formats."""
        arenas: dict[str, list[Site]] = {}
        for site in self.sites:
            if site.kind == TABLE:
                arenas.setdefault(site.arena, []).append(site)
        for own in arenas.values():
            widest = max((formats.get(site.name, "fp32") for site in own), key=lambda form: BITS[form])
            for site in own:
                if widest != "fp32":
                    if formats[site.name] != widest:
                        reasons.setdefault(site.name, f"another table of its arena is kept in {widest}")
                    formats[site.name] = widest
                elif formats.pop(site.name, None) is not None:
                    reasons[site.name] = "another table of its arena stays in float32"

    def verified(self, formats: Mapping[str, str], outcome: Lowered) -> str | None:
        """Why the outcome is outside of the budget on all rows or on those kept, or None; its quality is recorded."""
        self.progress("verify on all rows")
        outcome.quality = self.measure(formats, self.all)
        kept = self.measure(formats, self.kept)
        why = outside(self.limits, outcome.quality, self.spent) or outside(self.limits, kept, self.spent)
        self.path.append(Step(dict(formats), self.all.calibration.rows, why))
        return why

    def measure(self, formats: Mapping[str, str], data: Reference | None = None) -> dict[str, float]:
        """Of a trial on some rows, or on those of `data`."""
        self.trials += 1
        trial = Trial(self.graph, self.sites, formats, self.weights)
        return (data or self.some).measure(trial.answers, self.limits)

    def frontier(self, order: Sequence[Site], formats: Mapping[str, str]) -> list[Point]:
        """Quality against bytes: nothing lowered, more and more of the order in its smallest formats, and the outcome."""
        points = []
        for i in range(FRONTIER + 1):
            part = order[: round(len(order) * i / FRONTIER)]
            points.append(self.point({site.name: self.options(site)[0] for site in part}))
        points = [point for point in points if point.bytes != self.point_bytes(formats)]
        points.append(replace(self.point(formats), chosen=True))
        return sorted(points, key=lambda point: -point.bytes)

    def point_bytes(self, formats: Mapping[str, str]) -> int:
        return sum(site.lowered_bytes(formats.get(site.name, "fp32")) for site in self.sites)

    def point(self, formats: Mapping[str, str]) -> Point:
        values = self.measure(formats)
        count = self.point_bytes(formats)
        work = sum(site.work * BITS[formats.get(site.name, "fp32")] for site in self.sites)
        share = work / max(sum(site.work * BITS["fp32"] for site in self.sites), 1)
        return Point(count, round(share, 4), values, inside(self.limits, values))
