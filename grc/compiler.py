"""compile(): capture, optimise, lower, prove, write. The whole compiler on one page."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import fx, nn

from grc.errors import GrcError
from grc.graph.capture import EXPORT_BATCH, Source, capture
from grc.graph.model_file import Model, from_module, load_model
from grc.kernels import FUSIONS, cpp
from grc.lowering.choose import Choice, Requests, build_all, choose, engines_for, measure
from grc.lowering.engine import Lowerable, Target
from grc.manifest import describe
from grc.options import Options
from grc.passes.manager import Proof, Record, run_passes
from grc.passes.pipeline import pipeline
from grc.report.html import write_report
from grc.report.summary import size
from grc.runtime.artifact import Artifact, write_manifest, writing


class Progress(Protocol):
    """Told what the compiler is doing: a stage begins, goes on with a detail, and ends with a summary."""

    def begin(self, stage: str) -> None: ...
    def detail(self, text: str) -> None: ...
    def end(self, summary: str) -> None: ...


class Silent:
    """Progress for programs."""

    def begin(self, stage: str) -> None: ...
    def detail(self, text: str) -> None: ...
    def end(self, summary: str) -> None: ...


class Timed:
    """Progress that also keeps every stage with its summary and seconds, for the manifest."""

    def __init__(self, told: Progress):
        self.told = told
        self.stages: list[dict[str, Any]] = []

    def begin(self, stage: str) -> None:
        self.stages.append({"name": stage, "summary": "", "seconds": 0.0})
        self.start = time.perf_counter()
        self.told.begin(stage)

    def detail(self, text: str) -> None:
        self.told.detail(text)

    def end(self, summary: str) -> None:
        self.stages[-1] |= {"summary": summary, "seconds": round(time.perf_counter() - self.start, 3)}
        self.told.end(summary)


@dataclass
class Optimised:
    """The graph after all passes, with the proof that it was held against and what each pass did."""

    graph: fx.GraphModule
    records: list[Record]
    proof: Proof
    seconds: dict[str, float] = field(default_factory=dict)


def compile(
    model: str | os.PathLike[str] | nn.Module,
    inputs: Any = None,
    options: Options | None = None,
    progress: Progress | None = None,
    after: Callable[[Any, fx.GraphModule], None] | None = None,
) -> Artifact:
    """Compile a recommender into an artifact.

    `model` is a model file, a saved program, or a module in eval mode with `inputs`: a function of the batch size (or
    example inputs, for a model of fixed sizes) that returns the tuple or dict to call it with. `after` is shown the
    graph after each pass. Raises GrcError, with a hint, when the model can't be captured, no engine can build it, or
    the artifact can't be written; nothing is left behind then.
    """
    options, told = options or Options(), Timed(progress or Silent())
    declared = as_model(model, inputs)
    output = options.output or Path(f"{declared.name}.grc")
    with writing(output, options.force) as folder:
        source = traced(declared, told)
        plain = source.graph
        optimised = optimise(source, options, told, after=after)
        choice, target, optimised_seconds = lower(source, plain, optimised, options, folder, told)
        optimised.seconds |= optimised_seconds
        told.begin("write")
        manifest = describe(source, optimised.graph, optimised.records, choice, target, options, folder)
        told.end(size(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())))
        manifest["stages"] = told.stages
        write_report(manifest, folder)
        write_manifest(folder, manifest)
    return Artifact.open(output)


def as_model(model: str | os.PathLike[str] | nn.Module, inputs: Any) -> Model:
    if isinstance(model, nn.Module):
        if inputs is None:
            raise GrcError("a module needs inputs to be compiled", "pass inputs=lambda batch: (tensor, ...)")
        return from_module(model, inputs)
    return load_model(Path(model) if not isinstance(model, str) else model)


def traced(model: Model, progress: Progress) -> Source:
    progress.begin("capture")
    source = capture(model)
    batch = f"batch {source.min_batch}.." if source.dynamic else "fixed sizes"
    progress.end(f"{len(source.names)} inputs, {batch}, {len(source.graph.graph.nodes)} nodes")
    return source


def optimise(
    source: Source,
    options: Options,
    progress: Progress,
    passes: Sequence[Any] | None = None,
    after: Callable[[Any, fx.GraphModule], None] | None = None,
) -> Optimised:
    """Run the passes, each proven against the fp64 oracle at two batch sizes."""
    progress.begin("passes")
    start = time.perf_counter()
    proof = Proof([source.inputs(batch) for batch in source.proof_batches()]).prepare(source.graph)
    steps = pipeline(options, FUSIONS) if passes is None else passes
    graph, records = run_passes(
        source.graph,
        steps,
        proof,
        strict=options.strict,
        limit=options.bisect_limit,
        after=after,
        progress=progress.detail,
    )
    fused: dict[str, int] = {}
    for record in records:
        for change in record.made if record.name in ("merge-tables", "fuse") and not record.rolled_back else ():
            key = change.what if record.name == "fuse" else record.name
            fused[key] = fused.get(key, 0) + 1
    progress.end(", ".join(f"{k} {v}" for k, v in fused.items()) or "nothing to fuse")
    return Optimised(graph, records, proof, {"passes": time.perf_counter() - start})


def lower(
    source: Source, plain: fx.GraphModule, optimised: Optimised, options: Options, folder: Path, progress: Progress
) -> tuple[Choice, Target, dict[str, float]]:
    """Build, prove and measure the engines, and keep the files of the winners."""
    target = Target(options.device, cpp.target_isa(), torch.get_num_threads())
    parts = folder / "parts"
    parts.mkdir()
    requests = make_requests(source, optimised, options)
    example = source.inputs(EXPORT_BATCH)
    shapes = source.shapes()
    guarded = options.on_bad_id != "error"
    offered = engines_for(
        Lowerable(optimised.graph, example, shapes), None if guarded else Lowerable(plain, example, shapes)
    )
    start = time.perf_counter()
    progress.begin("build")
    only = None if options.engine == "auto" else options.engine
    candidates, rejected = build_all(offered, target, parts, requests, only, progress.detail)
    progress.end(", ".join(f"{c.built.engine} {c.build_seconds:.0f} s" for c in candidates))
    built = time.perf_counter()
    progress.begin("measure")
    eager_times = measure(candidates, source.eager_runner(), requests, progress.detail)
    choice = choose(candidates, rejected, eager_times)
    progress.end("   ".join(f"batch {b}: {c.built.engine} {microseconds(c.median(b))}" for b, c in choice.winners))
    for candidate in candidates:
        if candidate not in choice.parts:
            (parts / candidate.built.file).unlink()
    return choice, target, {"build": built - start, "measure": time.perf_counter() - built}


def make_requests(source: Source, optimised: Optimised, options: Options) -> Requests:
    """Proof inputs with the oracle's answers, a single row among them, and inputs to time."""
    proof, truth, baseline = list(optimised.proof.inputs), list(optimised.proof.truth), list(optimised.proof.baseline)
    if source.dynamic and source.min_batch == 1:
        one = Proof([source.inputs(1)]).prepare(source.graph)
        proof, truth, baseline = proof + one.inputs, truth + one.truth, baseline + one.baseline
    sizes = [b for b in options.batches if source.min_batch <= b <= options.max_batch] if source.dynamic else [1]
    return Requests(
        proof,
        truth,
        baseline,
        {b: source.inputs(b if source.dynamic else EXPORT_BATCH) for b in sizes or [options.max_batch]},
    )


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"
