"""The search: measure each table and layer alone, lower them from the cheapest loss on, and stay inside the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from grc.errors import GrcError, message_of
from grc.kernels.lookup.row_formats import FLOATS
from grc.precision.calibration import KEPT, LEAST, ROWS, Calibration, check_labels
from grc.precision.formats import BITS, FORMATS
from grc.precision.outcome import FLOAT_LAYERS, HALF_LAYERS, Decision, Lowered, Point, Reference, Step, outside
from grc.precision.quality import AUC, Limit, Truth, inside, lost
from grc.precision.sites import LAYER, RANKING, TABLE, Site
from grc.precision.trial import Trial

Progress = Callable[[str], None]
Move = tuple[Site, str]  # a site and the format that it goes down to
# How much of the budget a trial may spend. An engine sums in another order, so that values near the middle of two steps go
# the other way: seen to move the largest error of a 6-layer Transformer by 15%, and once by 27%. Where an engine lands
# outside all the same, the next smaller share is tried.
SPENT = (0.8, 0.6, 0.4)
OTHER_LAYERS = {FLOAT_LAYERS: "fp32", HALF_LAYERS: "fp16"}
TABLES = (TABLE, RANKING)  # lowered for their bytes
LEAST_SHARE = 1e-12  # of what all sites save, where one saves nothing
FRONTIER = 6  # points of the frontier between nothing lowered and everything
NOTHING = "nothing could be lowered within the budget"


@dataclass(frozen=True)
class Attempt:
    """How far it went with formats of `bits` or more: those that each site could take, the moves in order, the formats that
    sites took, and why not smaller ones."""

    bits: int
    choices: dict[str, Sequence[str]]
    moves: Sequence[Move]
    formats: Mapping[str, str]
    reasons: dict[str, str]


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
        self.trials = 0
        self.path: list[Step] = []
        self.losses: dict[tuple[str, str], float] = {}
        self.measured: dict[tuple[int, frozenset[tuple[str, str]]], dict[str, float]] = {}
        self.able = [site for site in sites if site.reason is None and self.options(site)]
        self.choices: dict[str, Sequence[str]] = {site.name: self.options(site) for site in self.able}
        both = any(limit.metric == AUC for limit in limits)
        self.all = self.answered(calibration)
        some = calibration.sample(ROWS, both)
        self.some = self.all if some is calibration else self.answered(some)
        rows, count = self.some.calibration.rows, sum(tensor.nbytes for tensor in self.some.tensors.values())
        fit = int(KEPT * sum(site.bytes for site in sites) * rows / max(count, 1))
        self.kept = self.answered(self.some.calibration.sample(max(fit - fit % LEAST, LEAST), both))

    @torch.no_grad()
    def answered(self, calibration: Calibration) -> Reference:
        try:
            answers = [Trial(self.graph, self.sites, {}).answers(batch) for batch in calibration.batches]
        except (IndexError, RuntimeError) as error:  # an id outside of its table, say
            told = f"the model fails on the calibration data ({calibration.origin}): {message_of(error)}"
            raise GrcError(told, "give requests that the model answers") from error
        return Reference(calibration, Truth(answers, calibration.labels))

    def run(self, spent: float = SPENT[0]) -> Lowered:
        """The outcome of trials that may spend this share of the budget. Small formats of some sites may cost so much that
        others, which would save more, stay large, or keep a table from being stored once for two readers: then nothing
        below so many bits may give the smaller outcome."""
        self.spent = spent
        outcome = self.begun()
        first = best = self.attempt(outcome)
        for bits in sorted({BITS[form] for site in self.able for form in self.options(site)})[1:]:
            if self.least(bits) < self.point_bytes(best.formats):
                found = self.attempt(outcome, bits, best)
                best = min(best, found, key=lambda attempt: self.point_bytes(attempt.formats))
        for site in self.able:
            if BITS[smallest := self.options(site)[0]] < best.bits:
                why = first.reasons.get(site.name, f"{smallest}: all are smaller together without it")
                best.reasons.setdefault(site.name, why)
        if best.formats:
            outcome.quality = self.measure(best.formats, self.all)
        elif self.able:
            outcome.notes.append(NOTHING)
        return self.decided(outcome, best.moves, best.formats, best.reasons)

    def attempt(self, outcome: Lowered, bits: int = 0, other: Attempt | None = None) -> Attempt:
        """Lower as far as the budget allows, to no format of fewer bits, unless the `other` attempt had the same choices."""
        reasons = self.choose(bits)
        if other is not None and self.choices == other.choices:
            return other
        formats, moves = self.lower(reasons)
        if self.device == "cuda":
            self.one_format_an_arena(formats, reasons)
        while formats and (why := self.verified(formats, outcome)) is not None:
            self.step_back(formats, reasons, why)
            if self.device == "cuda":
                self.one_format_an_arena(formats, reasons)
        return Attempt(bits, self.choices, moves, formats, reasons)

    def least(self, bits: int) -> int:
        """The fewest bytes that formats of so many bits can come to."""
        smallest = {site.name: [form for form in self.options(site) if BITS[form] >= bits][:1] for site in self.able}
        return self.point_bytes({name: forms[0] for name, forms in smallest.items() if forms})

    def unlowered(self, last: Lowered, why: str) -> Lowered:
        """The outcome where trials were inside of the budget and no engine was, not even that of the `last` outcome."""
        outcome = self.begun()
        outcome.notes.append(f"{NOTHING}: {'; '.join(line.strip() for line in why.splitlines())}")
        reasons = {
            d.name: d.reason or "" if d.format == "fp32" else f"{d.format}: no engine is inside the budget"
            for d in last.decisions
        }
        moves = self.moves([site for site in self.able if site.name in self.choices], 1)
        return self.decided(outcome, moves, {}, reasons)

    def begun(self) -> Lowered:
        notes = [*self.all.calibration.notes, *self.all.truth.unbounded(self.limits)]
        return Lowered(self.precision, self.limits, self.all, self.kept, notes=notes)

    def choose(self, bits: int = 0) -> dict[str, str]:
        """The choices of every site, of so many bits or more, and why some have fewer: a format that alone is outside of the
        budget is none, and must not keep a site waiting while others spend it."""
        reasons: dict[str, str] = {}
        self.choices = {}
        for i, site in enumerate(self.able):
            self.progress(f"sensitivity {i + 1} of {len(self.able)}")
            forms = [form for form in self.options(site) if BITS[form] >= bits]
            while forms and (why := outside(self.limits, self.measure({site.name: forms[0]}), self.spent)):
                reasons.setdefault(site.name, f"{forms.pop(0)}: {why}")
            if forms:
                self.choices[site.name] = forms
        return reasons

    def moves(self, sites: Sequence[Site], count: int | None = None) -> list[Move]:
        """The steps down that sites make, to their smallest `count` formats or to all, what costs least for what it saves
        first: of each site the corners of the convex hull of what is lost over what is saved."""
        saved, found = self.savings(sites), []
        for site in sites:
            left, lost, share = self.choices[site.name][:count], 0.0, 0.0
            while left:
                more = {form: max(saved[site.name, form] - share, LEAST_SHARE) for form in left}
                cost = {form: (self.loss(site, form) - lost) / more[form] for form in left}
                form = min(left, key=lambda form: cost[form])  # of equal ones the smallest
                found.append((cost[form], site, form))
                left, lost, share = left[: left.index(form)], self.loss(site, form), saved[site.name, form]
        return [(site, form) for _, site, form in sorted(found, key=lambda entry: entry[0])]

    def savings(self, sites: Sequence[Site]) -> dict[tuple[str, str], float]:
        """What each site saves in each format: bytes of a table and of ranked items, work of any other, as a share of what all
        of them save in their smallest."""
        saved: dict[tuple[str, str], float] = {}
        for kinds in ([s for s in sites if s.kind in TABLES], [s for s in sites if s.kind not in TABLES]):
            own = {(site.name, form): self.saving(site, form) for site in kinds for form in self.choices[site.name]}
            total = sum(own[site.name, self.choices[site.name][0]] for site in kinds)
            saved |= {key: value / max(total, 1) for key, value in own.items()}
        return saved

    def saving(self, site: Site, form: str) -> int:
        return site.bytes - self.bytes(site, form) if site.kind in TABLES else max(site.work, 1) * (32 - BITS[form])

    def loss(self, site: Site, form: str) -> float:
        """What a site alone costs in a format, as a share of the budget."""
        if (site.name, form) not in self.losses:
            self.losses[site.name, form] = lost(self.limits, self.measure({site.name: form}))
        return self.losses[site.name, form]

    def decided(
        self, outcome: Lowered, moves: Sequence[Move], formats: Mapping[str, str], reasons: Mapping[str, str]
    ) -> Lowered:
        if not formats:
            outcome.quality = self.all.truth.measure(self.all.truth.answers, self.limits)
        outcome.frontier = self.frontier(moves, formats)
        able = {site.name for site in self.able}
        for site in self.sites:
            form = formats.get(site.name, "fp32")
            smallest = next(iter(self.every(site)), None)
            loss = self.loss(site, self.options(site)[0]) if site.name in able else None
            reason = None
            if form != smallest:
                reason = site.reason or reasons.get(site.name) or self.unable(site, smallest)
            if form == "fp32":
                reason = reason or self.nothing(site)
            outcome.decisions.append(
                Decision(site.name, site.kind, form, smallest, site.bytes, self.bytes(site, form), loss, reason)
            )
        outcome.trials, outcome.path = self.trials, list(self.path)
        return outcome

    def settle(self, outcome: Lowered, engines: Mapping[int, str]) -> None:
        """Let an outcome say what the engines that answer at each batch size make of it."""
        others = [
            (label, form, [d for d in outcome.decisions if d.kind == LAYER and BITS[d.format] < BITS[form]])
            for label, form in OTHER_LAYERS.items()
        ]
        layers = [d for d in outcome.decisions if d.kind in (LAYER, RANKING)]
        # The quantiser of onnxruntime has int8 alone.
        others.append(("onnxruntime", "fp32", [d for d in layers if d.format not in ("int8", "fp32")]))
        for label, form, lowered in others:
            batches = [batch for batch, engine in engines.items() if label in engine]
            if not lowered:
                continue
            if len(batches) == len(engines):
                for decision in lowered:
                    decision.reason = f"{decision.format}: the engine chosen keeps layers in {form}"
                    decision.format = form
                for site, decision in zip(self.sites, outcome.decisions, strict=True):
                    decision.lowered_bytes = self.bytes(site, decision.format)
                points = [point for point in outcome.frontier if not point.chosen]
                chosen = replace(self.point(outcome.formats), chosen=True)
                outcome.frontier = sorted([*points, chosen], key=lambda point: -point.bytes)
            elif batches:
                sizes = ", ".join(map(str, batches))
                outcome.notes.append(
                    f"at batch {sizes} the engine chosen keeps layers in {form}: they are stored twice"
                )

    def every(self, site: Site) -> tuple[str, ...]:
        """What the precision has for a site's kind, the smallest first."""
        return FORMATS[site.kind][self.device].get(self.precision, ())

    def options(self, site: Site) -> tuple[str, ...]:
        """And what of it can hold the site and makes it smaller. A table that float16 can't scale has bfloat16 left, but on
        a GPU, where an arena has one format."""
        every = self.every(site)
        if site.kind != TABLE or not every:
            return every
        if site.unscaled is not None:
            every = ("bf16",) if self.device == "cpu" or every == ("bf16",) else ()
        alike = [site] if self.device == "cpu" else [one for one in self.sites if one.arena == site.arena]
        kept = ["fp32"]
        for form in reversed(every):
            if sum(self.bytes(one, form) for one in alike) < sum(self.bytes(one, kept[0]) for one in alike):
                kept.insert(0, form)
        return tuple(kept[:-1])

    def bytes(self, site: Site, form: str) -> int:
        """What a site takes in a format. Rows of 16 bits are tensors on a GPU, and not filled up to whole words."""
        tensor = self.device == "cuda" and form in FLOATS
        return site.elements * BITS[form] // 8 if tensor else site.lowered_bytes(form)

    def unable(self, site: Site, form: str | None) -> str | None:
        """Why a site can't be in a format for which the precision has its kind, but for the budget."""
        if site.unscaled is not None or site.kind != TABLE or form is None or form in self.options(site):
            return site.unscaled
        return f"{form} makes rows of {site.width} columns no smaller"

    def nothing(self, site: Site) -> str:
        return f"{self.precision} has no format for {site.kind}s on a {'CPU' if self.device == 'cpu' else 'GPU'}"

    def lower(self, reasons: dict[str, str]) -> tuple[dict[str, str], list[Move]]:
        """Lower as far as the budget allows: everything to its smallest format, or else move by move, in blocks that are
        halved where one is too much; a site whose move is too much makes no other. A layer that computes an answer goes last
        and in no block with others: an error there is not averaged over anything. The moves are told too."""
        formats: dict[str, str] = {}
        made: list[Move] = []
        stopped: set[str] = set()

        def outside_with(block: Sequence[Move]) -> str | None:
            self.progress(f"{len(formats)} of {len(self.choices)} lowered")
            wanted = {site.name: form for site, form in block}
            why = outside(self.limits, self.measure({**formats, **wanted}), self.spent)
            self.path.append(Step(wanted, self.some.calibration.rows, why))
            if why is None:
                formats.update(wanted)
            return why

        def take(block: Sequence[Move], why: str | None = None) -> None:
            block = [(site, form) for site, form in block if site.name not in stopped]
            why = why or (outside_with(block) if block else None)
            if why is not None and len(block) > 1:
                take(block[: len(block) // 2])
                take(block[len(block) // 2 :])
            elif why is not None:
                reasons.setdefault(block[0][0].name, f"{block[0][1]}: {why}")
                stopped.add(block[0][0].name)

        for head in (False, True):
            own = [s for s in self.able if s.name in self.choices and (s.head and s.kind not in TABLES) == head]
            moves = self.moves(own, 1)
            if own and (why := outside_with(moves)) is not None:
                moves = self.moves(own)
                take(moves, why)
            made += moves
        return formats, made

    def step_back(self, formats: dict[str, str], reasons: dict[str, str], why: str) -> None:
        """Give a site its next format, or none where it has no other: the costliest of those that stepped back least."""

        def steps(site: Site) -> int:
            own = self.choices[site.name]
            return own.index(formats[site.name]) if formats[site.name] in own else len(own)

        able = [site for site in self.sites if site.name in formats]
        least = min(map(steps, able))
        site = max((s for s in able if steps(s) == least), key=lambda site: self.loss(site, formats[site.name]))
        later = self.choices[site.name][steps(site) + 1 :]
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
        """Of a trial on some rows, or on those of `data`; none is made twice."""
        data = data or self.some
        key = id(data.calibration), frozenset(formats.items())
        if key not in self.measured:
            self.trials += 1
            trial = Trial(self.graph, self.sites, formats, self.device)
            self.measured[key] = data.measure(trial.answers, self.limits)
        return self.measured[key]

    def frontier(self, moves: Sequence[Move], formats: Mapping[str, str]) -> list[Point]:
        """Quality against bytes: nothing lowered, more and more of the moves, and the outcome."""
        points = []
        for count in sorted({round(len(moves) * i / FRONTIER) for i in range(FRONTIER + 1)}):
            points.append(self.point({site.name: form for site, form in moves[:count]}))
        points = [point for point in points if point.bytes != self.point_bytes(formats)]
        points.append(replace(self.point(formats), chosen=True))
        return sorted(points, key=lambda point: -point.bytes)

    def point_bytes(self, formats: Mapping[str, str]) -> int:
        """What all sites take. A table that is multiplied with too, in the same numbers, is stored once on a GPU; a CPU has
        it in panels beside."""
        stored = [(site, formats.get(site.name, "fp32")) for site in self.sites]
        multiplied = {site.name: form for site, form in stored if site.kind != TABLE}
        once = [
            (site, form)
            for site, form in stored
            if site.kind == TABLE and self.device == "cuda" and form in FLOATS and multiplied.get(site.arena) == form
        ]
        return sum(self.bytes(*one) for one in stored) - sum(self.bytes(*one) for one in once)

    def point(self, formats: Mapping[str, str]) -> Point:
        values = self.measure(formats)
        count = self.point_bytes(formats)
        work = sum(site.work * BITS[formats.get(site.name, "fp32")] for site in self.sites)
        share = work / max(sum(site.work * BITS["fp32"] for site in self.sites), 1)
        return Point(count, round(share, 4), values, inside(self.limits, values))
