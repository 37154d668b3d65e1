"""Choose: build every engine that is usable, drop what answers wrongly, measure the rest, keep the fastest at each batch."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from grc.errors import BudgetError, GrcError, LoweringError, first_line
from grc.graph.oracle import largest_error, within
from grc.lowering.eager import Eager
from grc.lowering.engine import Built, Engine, Lowerable, Target
from grc.lowering.inductor import Inductor
from grc.lowering.onnx_int8 import OnnxRuntimeInt8, OnnxRuntimeStatic
from grc.lowering.onnxruntime import OnnxRuntime
from grc.lowering.timing import Turn, interleave
from grc.runtime.artifact import FULL
from grc.runtime.closeness import QUALITY as QUALITY
from grc.runtime.engines import Run, load_part
from grc.runtime.pages import keep_freed_memory
from grc.runtime.plan import Plan

SECONDS = 0.4  # spent on each engine at each batch size, in interleaved rounds
MOST = 2.0  # from so many seconds on, two calls tell as much as five
TIE = 0.95  # of another's time: what takes more of it is not faster


@dataclass
class Candidate:
    """One engine's part, loaded, with its error and its times in seconds by batch."""

    built: Built
    run: Run
    build_seconds: float
    error: float = 0.0
    quality: dict[str, float] = field(default_factory=dict)  # of fewer bits, by limit of the budget
    times: dict[int, list[float]] = field(default_factory=dict)

    def median(self, batch: int) -> float:
        return statistics.median(self.times[batch])


@dataclass
class Choice:
    """What was built and measured, and which part answers which batches."""

    candidates: list[Candidate]
    rejected: dict[str, str]
    eager_times: dict[int, float]
    winners: list[tuple[int, Candidate]]
    plan: Plan | None = None  # of a GPU's buckets
    kernels: dict[str, Any] = field(default_factory=dict)  # how fast a GPU's fused ops are
    crowded: str | None = None  # what other programs took meanwhile, if it was much

    @property
    def parts(self) -> list[Candidate]:
        used: list[Candidate] = []
        for _, candidate in self.winners:
            if candidate not in used:
                used.append(candidate)
        return used

    def tidy(self, folder: Path) -> None:
        """Delete the files of engines that lost, and of those that were built and refused."""
        kept = {candidate.built.file for candidate in self.parts}
        for file in folder.iterdir():
            if file.name not in kept:
                file.unlink()


@dataclass(frozen=True)
class Requests:
    """Real inputs: some to prove an engine on, with the oracle's answers, and some of each size to time it on."""

    proof: Sequence[Sequence[torch.Tensor]]
    truth: Sequence[Sequence[torch.Tensor]]
    baseline: Sequence[float]
    timed: dict[int, list[torch.Tensor]]
    judge: Callable[[Run], tuple[dict[str, float], str | None]] | None = None
    """Of fewer bits: an engine's quality, and why it is outside of the budget that stands in the oracle's place."""


def engines_for(
    optimised: Lowerable,
    source: Lowerable | None,
    formats: Mapping[str, Mapping[str, str]] | None = None,
    calibration: Sequence[Sequence[torch.Tensor]] = (),
) -> list[tuple[Engine, Lowerable]]:
    """The engines in the order in which ties go: ours, then plain AOTInductor on the graph as it came, then the others.

    With `formats`, those that can keep weights in fewer bits: choices of them by label, the best guess under "".
    `calibration` tells static ones their ranges.
    """
    if formats is not None:
        ours = [Inductor(packed=True, formats=chosen, label=label) for label, chosen in formats.items()]
        guess = formats[""]
        engines: tuple[Engine, ...] = (*ours, OnnxRuntimeInt8(guess), OnnxRuntimeStatic(guess, calibration))
        return [(engine, optimised) for engine in engines]
    offered: list[tuple[Engine, Lowerable]] = [(Inductor(packed=True), optimised)]
    if source is not None:
        offered.append((Inductor(packed=False), source))
    return [*offered, (OnnxRuntime(), optimised), (Eager(), optimised)]


def load_built(built: Built, folder: Path) -> Run:
    return load_part({"engine": built.engine, "file": built.file}, folder, built.constants)


def build_all(
    offered: Sequence[tuple[Engine, Lowerable]],
    target: Target,
    folder: Path,
    requests: Requests,
    only: str | None,
    progress: Callable[[str], None],
    load: Callable[[Built, Path], Run] = load_built,
) -> tuple[list[Candidate], dict[str, str]]:
    """Build and prove the engines. Raises LoweringError when the one that was asked for can't be built or is wrong, and
    BudgetError when all that is wrong is the quality, or numbers that fewer bits have no room for."""
    names = [engine.name for engine, _ in offered]
    if only is not None and only not in names:
        raise LoweringError(f"there is no engine {only}", f"choose auto or one of {', '.join(names)}")
    candidates: list[Candidate] = []
    rejected: dict[str, str] = {}
    over_budget = False
    for engine, lowerable in offered:
        if only is not None and engine.name != only:
            continue
        reason = engine.missing(target)
        if reason is None:
            progress(engine.name)
            start = time.perf_counter()
            try:
                built = engine.build(lowerable, target, folder)
                candidate = Candidate(built, load(built, folder), time.perf_counter() - start)
                reason = prove(candidate, requests)
                if reason is not None and requests.judge is not None:
                    over_budget |= bool(candidate.quality) or candidate.error == math.inf
            except GrcError as error:
                reason = error.message
            except Exception as error:  # an engine raises its own kind, and must not take the others with it
                if isinstance(error, OSError) and error.errno in FULL:
                    raise
                reason = first_line(error)
        if reason is None:
            candidates.append(candidate)
        else:
            rejected[engine.name] = reason
    if not candidates:
        reasons = [f"{name}: {reason}" for name, reason in rejected.items()]
        fault = (
            f"engine {only} can't be used: {rejected[only]}"
            if only
            else "\n  ".join(["no engine can be used", *reasons])
        )
        if over_budget:
            raise BudgetError(fault, "allow more with --budget, or lower less")
        raise LoweringError(fault, "try --engine auto, or see grc doctor" if only else "see grc doctor")
    return candidates, rejected


@torch.no_grad()
def prove(candidate: Candidate, requests: Requests) -> str | None:
    """Why a candidate's answers are wrong, or None."""
    for inputs, truth, baseline in zip(requests.proof, requests.truth, requests.baseline, strict=True):
        batch = inputs[0].shape[0] if inputs and inputs[0].dim() else 1
        try:
            answers = candidate.run([t.clone() for t in inputs])
        except Exception as failure:  # an engine raises its own kind
            return f"fails at batch {batch}: {first_line(failure)}"
        error = largest_error(list(answers), list(truth))
        candidate.error = max(candidate.error, error)
        if requests.judge is not None:
            if error == math.inf:
                return f"answers NaN or infinity at batch {batch}"
        elif not within(error, baseline, QUALITY):
            return f"error {error:.1e} at batch {batch}, the budget is {max(2 * baseline, QUALITY):.1e}"
    if requests.judge is None:
        return None
    candidate.quality, reason = requests.judge(candidate.run)
    return reason


@torch.no_grad()
def measure(
    candidates: Sequence[Candidate], eager: Callable[[int], Any], requests: Requests, progress: Callable[[str], None]
) -> dict[int, float]:
    """Time the candidates and the eager model at every batch, interleaved; returns the eager model's medians.

    A candidate that was built for one batch is timed at that one. One on a GPU is timed by the device's own events.
    """
    eager_times: dict[int, float] = {}
    gc.collect()
    keep_freed_memory()  # as where the artifact will run
    for batch, inputs in requests.timed.items():
        progress(f"batch {batch}")
        turns: list[Turn] = []
        for candidate in candidates:
            if candidate.built.bucket in (None, batch):
                timed = getattr(candidate.run, "seconds", candidate.run)
                turns.append(Turn(partial(call_fresh, timed, inputs)))
                candidate.times[batch] = turns[-1].seconds
        own = Turn(lambda index, batch=batch: eager(batch))  # type: ignore[misc]
        interleave([*turns, own], 1, SECONDS, most=MOST)
        eager_times[batch] = statistics.median(own.seconds)
    return eager_times


def call_fresh(run: Run, inputs: Sequence[torch.Tensor], index: int) -> Any:
    """AOTInductor empties the list it is given."""
    return run(list(inputs))


def choose(candidates: list[Candidate], rejected: dict[str, str], eager_times: dict[int, float]) -> Choice:
    """The fastest part at each measured batch, but for ties, which go to earlier engines and to few parts."""
    winners: list[tuple[int, Candidate]] = []
    least: dict[int, float] = {}
    for batch in sorted(eager_times):
        able = [candidate for candidate in candidates if batch in candidate.times]
        if not able:
            raise LoweringError(f"no engine takes batch {batch}", "leave --engine at auto")
        best = able[0]
        for candidate in able[1:]:
            if candidate.median(batch) < TIE * best.median(batch):
                best = candidate
        winners.append((batch, best))
        least[batch] = min(candidate.median(batch) for candidate in able)
    return Choice(candidates, rejected, eager_times, few_parts(winners, least))


def few_parts(winners: list[tuple[int, Candidate]], least: Mapping[int, float]) -> list[tuple[int, Candidate]]:
    """Winners of as few parts as can be, each of which may have weights of its own: one goes where at all of its batches
    another is as fast as the `least` time there, but for a tie. Those of few batches go first."""
    parts: list[Candidate] = []
    for _, winner in winners:
        if winner not in parts:
            parts.append(winner)
    for part in sorted(parts, key=lambda part: sum(winner is part for _, winner in winners)):
        others = [other for other in parts if other is not part]
        instead: dict[int, Candidate] = {}
        own = [batch for batch, winner in winners if winner is part]
        for batch in own:
            able = [other for other in others if batch in other.times and TIE * other.median(batch) <= least[batch]]
            if able:
                instead[batch] = min(able, key=lambda other: other.median(batch))
        if len(instead) == len(own):
            winners = [(batch, instead.get(batch, winner)) for batch, winner in winners]
            parts = others
    return winners


def boundaries(winners: Sequence[tuple[int, Candidate]], buckets: bool = False) -> list[int]:
    """Up to which batch each winner answers: half way, by ratio, to the next measured size.

    Where requests are padded to buckets, each of which was measured, a winner answers up to its own size.
    """
    batches = [batch for batch, _ in winners]
    if buckets:
        return [*batches[:-1], 2**31 - 1]
    return [int((a * b) ** 0.5) for a, b in pairwise(batches)] + [2**31 - 1]
