"""The pass manager: run each pass on a copy, verify the result, and keep it only if the answers stayed right."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from grc.errors import PassError, SpecError, first_line
from grc.graph.match import Miss, source_text, where
from grc.graph.oracle import largest_error, run_fp64, within
from grc.graph.rewrite import Rewriter, copy_graph
from grc.graph.spec import verify, widest_float


@dataclass(frozen=True)
class Change:
    """What a pass did at one place, or why it did not."""

    what: str
    where: str = ""
    source: str = ""
    saves: str = ""
    missed: str | None = None


@dataclass(frozen=True)
class Pass:
    """A graph-to-graph rewrite. Fields of a subclass are its options, which the pipeline gives it."""

    name: ClassVar[str]

    def run(self, graph: fx.GraphModule) -> list[Change]:
        raise NotImplementedError

    def parts(self) -> list[Pass]:
        """The passes that it consists of, to run where it fails as a whole."""
        return []


def rewritten(
    edit: Rewriter, places: Iterable[tuple[str, fx.Node]], rewrite: Callable[[fx.Node], str | None]
) -> list[Change]:
    """What `rewrite` does at each place, a name and a node: it returns what that saves, or None where there is nothing to tell,
    and raises Miss with the reason why it leaves one as it is."""
    changes: list[Change] = []
    for what, node in list(places):
        line, text = where(node), source_text(node)
        try:
            with edit.at(node):
                saved = rewrite(node)
        except Miss as miss:
            changes.append(Change(what, line, text, missed=str(miss)))
            continue
        if saved is not None:
            changes.append(Change(what, line, text, saved))
    edit.finish()
    return changes


@dataclass
class Record:
    """What one pass did to one graph."""

    name: str
    changes: list[Change]
    seconds: float
    proof_seconds: float = 0.0
    error: float | None = None
    rolled_back: str | None = None
    nodes: int = 0

    @property
    def made(self) -> list[Change]:
        return [c for c in self.changes if c.missed is None]

    @property
    def missed(self) -> list[Change]:
        return [c for c in self.changes if c.missed is not None]


@dataclass
class Proof:
    """Real inputs with the oracle's answers and the model's own error, against which every pass is held."""

    inputs: list[list[torch.Tensor]]
    truth: list[list[torch.Tensor]] = field(default_factory=list)
    baseline: list[float] = field(default_factory=list)

    @torch.no_grad()
    def prepare(self, graph: fx.GraphModule) -> Proof:
        for inputs in self.inputs:
            self.truth.append(list(run_fp64(graph, *inputs)))
            self.baseline.append(largest_error(list(graph(*inputs)), self.truth[-1]))
        return self

    @torch.no_grad()
    def check(self, graph: fx.GraphModule) -> tuple[float, str | None]:
        """The largest error, and what is wrong (or None)."""
        worst = 0.0
        for inputs, truth, baseline in zip(self.inputs, self.truth, self.baseline, strict=True):
            try:
                error = largest_error(list(graph.forward(*inputs)), truth)  # a call would print what it raises
            except Exception as failure:
                return float("inf"), f"the rewritten graph fails: {first_line(failure)}"
            worst = max(worst, error)
            if not within(error, baseline):
                return worst, f"error {error:.1e} against fp64, the model's own is {baseline:.1e}"
        return worst, None


def run_passes(
    graph: fx.GraphModule,
    passes: Sequence[Pass],
    proof: Proof,
    *,
    strict: bool = False,
    limit: int | None = None,
    after: Callable[[Pass, fx.GraphModule], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[fx.GraphModule, list[Record]]:
    """Run passes in order. A pass that breaks the graph or its answers is rolled back, with the reason in its record, and run
    again in its parts: of several fusions only the one at fault is lost.

    `limit` stops after that many passes have changed something. With `strict`, a broken pass raises PassError.
    """
    widest = widest_float(graph)
    records: list[Record] = []
    waiting = list(passes)
    while waiting:
        step = waiting.pop(0)
        if limit is not None and sum(bool(r.made) and not r.rolled_back for r in records) >= limit:
            break
        if progress:
            progress(step.name)
        trial = copy_graph(graph)
        start = time.perf_counter()
        reason: str | None = None
        changes: list[Change] = []
        try:
            changes = step.run(trial)
        except Exception as failure:  # whatever a pass stumbles over in a model, the others still run
            reason = f"failed: {first_line(failure)}"
        record = Record(step.name, changes, time.perf_counter() - start)
        records.append(record)
        if record.made or reason:
            start = time.perf_counter()
            try:
                if reason is None:
                    verify(trial, widest)
                    record.error, reason = proof.check(trial)
            except SpecError as fault:
                reason = fault.message
            record.proof_seconds = time.perf_counter() - start
            if reason is None:
                graph = trial
            elif strict:
                raise PassError(f"pass {step.name}: {reason}", f"leave it out with --disable {step.name}")
            else:
                record.rolled_back = reason
                waiting[:0] = step.parts()
        record.nodes = len(graph.graph.nodes)
        if after:
            after(step, graph)
    return graph, records
