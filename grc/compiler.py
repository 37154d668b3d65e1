"""compile(): capture, optimise, lower, prove, write. The whole compiler on one page."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from grc.errors import BudgetError, GrcError, LoweringError
from grc.graph.capture import EXPORT_BATCH, Source, capture
from grc.graph.cut import Stage, cut
from grc.graph.model_file import Model, from_module, load_model
from grc.kernels import FUSIONS, cpp
from grc.lowering.choose import Choice, Requests, build_all, choose, engines_for, load_built, measure
from grc.lowering.cuda import Gpu, full_precision, gpu_engines, gpu_target, mixed_rows
from grc.lowering.engine import Built, Engine, Lowerable, Target
from grc.lowering.export import written_out
from grc.lowering.kernel_times import KernelTimes
from grc.lowering.requests import judged, requests_of, timed_batches
from grc.lowering.stages import BuiltStage, Line
from grc.lowering.timing import crowding
from grc.lowering.traffic import interpolated, learn, read_traffic, told
from grc.manifest import describe
from grc.options import Options
from grc.passes.guard_ids import check_enabled, check_guarded
from grc.passes.manager import Proof, Record, run_passes
from grc.passes.pipeline import pipeline
from grc.precision.apply import graphs_of
from grc.precision.calibration import ROWS, calibration_of
from grc.precision.formats import check_precision
from grc.precision.outcome import Lowered
from grc.precision.quality import budget, worst
from grc.precision.search import SPENT, Search
from grc.precision.sites import find_sites
from grc.progress import Progress, Silent, Timed
from grc.report.html import write_report
from grc.report.summary import microseconds, size
from grc.runtime.artifact import Artifact, write_manifest, writing
from grc.runtime.device import DeviceWeights
from grc.runtime.engines import Run
from grc.runtime.plan import Plan, bucket_sizes
from grc.runtime.structure import output_names


@dataclass
class Optimised:
    """The graph after all passes, with the proof that it was held against and what each pass did."""

    graph: fx.GraphModule
    records: list[Record]
    proof: Proof
    canonical: fx.GraphModule
    """As it was before anything fused: what stages are cut from."""
    seconds: dict[str, float] = field(default_factory=dict)


Lowering = tuple[Choice, Target, dict[str, float]]
"""What was built and chosen, for which host, and the seconds of each stage."""


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
    if options.stages and (options.device != "cpu" or options.precision != "fp32"):
        raise LoweringError(
            "stages are built for the CPU in fp32 only", "leave out --stages, or --device cuda and --precision"
        )
    check_enabled(options)
    target = target_of(options)  # a GPU that is not there, or a precision that has no kernels, is told before any work
    check_precision(options.precision, options.device, target.sm)
    budget(options.budget)
    declared = as_model(model, inputs)
    output = Path(options.output or f"{declared.name}.grc")
    with writing(output, options.force) as folder:
        source = traced(declared, told)
        options, plain = replace(options, max_batch=min(options.max_batch, source.max_batch)), source.graph
        optimised = optimise(source, options, told, after=after)
        line = cut_line(source, optimised) if options.stages else None  # before minutes are spent on building
        if options.precision == "fp32":
            lowered, built = None, lower(source, plain, optimised, {"": optimised.graph}, options, folder, told)
        else:
            lowered, built = lower_in_fewer_bits(source, plain, optimised, options, folder, told)
        choice, target, seconds = built
        optimised.seconds |= seconds
        stages = lower_stages(line, options, folder, told) if line else []
        told.begin("write")
        manifest = describe(
            source, optimised.graph, optimised.records, choice, target, options, folder, lowered, stages
        )
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
    if not isinstance(model, (str, os.PathLike)):
        raise GrcError(f"{model!r} is no model", "pass an instance of torch.nn.Module, or the path of a model file")
    return load_model(Path(model) if not isinstance(model, str) else model)


def traced(model: Model, progress: Progress) -> Source:
    progress.begin("capture")
    source = capture(model)
    batch = f"batch {source.min_batch}.." if source.dynamic else "fixed sizes"
    progress.end(f"{len(source.names)} inputs, {batch}, {len(source.graph.graph.nodes)} nodes")
    return source


CANONICAL = ("jagged", "normalise", "merge-tables", "simplify")  # passes that leave every layer its own
QUIET = ("normalise", "simplify")  # too many changes to list, none of them a fusion


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
    canonical = source.graph

    def seen(step: Any, graph: fx.GraphModule) -> None:
        nonlocal canonical
        canonical = graph if step.name in CANONICAL else canonical
        if after:
            after(step, graph)

    graph, records = run_passes(
        source.graph,
        steps,
        proof,
        strict=options.strict,
        limit=options.bisect_limit,
        after=seen,
        progress=progress.detail,
    )
    check_guarded(records, options)
    fused: dict[str, int] = {}
    for record in records:
        for change in record.made if record.name not in QUIET and not record.rolled_back else ():
            key = change.what if record.name == "fuse" else record.name
            fused[key] = fused.get(key, 0) + 1
    progress.end(", ".join(f"{k} {v}" for k, v in fused.items()) or "nothing to fuse")
    return Optimised(graph, records, proof, canonical, {"passes": time.perf_counter() - start})


def lower_in_fewer_bits(
    source: Source, plain: fx.GraphModule, optimised: Optimised, options: Options, folder: Path, progress: Progress
) -> tuple[Lowered, Lowering]:
    """Find out which tables and layers may be kept in fewer bits, and build that; where every engine lands outside of the
    budget, again with more of it left, and at last in float32."""
    progress.begin("precision")
    search = Search(
        optimised.graph,
        find_sites(optimised.graph),
        calibration_of(source, options.calibration, options.max_batch),
        budget(options.budget),
        options.precision,
        progress.detail,
        options.device,
    )
    shares = iter(SPENT)
    found = search.run(next(shares))
    while True:
        for graphs, notes in graphs_of(found, search.sites, optimised.graph, options.device, folder):
            progress.end(found.summary())
            try:
                lowering = lower(source, plain, optimised, graphs, options, folder, progress, found)
            except BudgetError as error:  # which nothing in float32 raises
                fault = error.message
                progress.end(fault)
                progress.begin("precision")
                shutil.rmtree(folder / "parts")
                continue
            choice = lowering[0]
            found.notes += notes
            search.settle(found, {batch: candidate.built.engine for batch, candidate in choice.winners})
            if qualities := [candidate.quality for candidate in choice.parts if candidate.quality]:
                found.quality = worst(found.limits, qualities)
            return found, lowering
        del graphs  # and the files that they map
        refused = found
        less = (outcome for outcome in map(search.run, shares) if outcome.formats != refused.formats)
        found = next(less, None) or search.unlowered(refused, fault)


def lower(
    source: Source,
    plain: fx.GraphModule,
    optimised: Optimised,
    graphs: Mapping[str, fx.GraphModule],
    options: Options,
    folder: Path,
    progress: Progress,
    lowered: Lowered | None = None,
) -> Lowering:
    """Build, prove and measure the engines, and keep the files of the winners."""
    target = target_of(options)
    parts = folder / "parts"
    parts.mkdir()
    example = source.inputs(EXPORT_BATCH)
    shapes = source.shapes()
    ours = {label: Lowerable(graph, example, shapes) for label, graph in graphs.items()}
    theirs = Lowerable(plain, example, shapes)
    unguarded = theirs if options.on_bad_id == "error" else None
    if target.device == "cuda":
        traffic = read_traffic(options.traffic) if options.traffic else None
        gpu = open_gpu(source, options)
        requests = requests_of(source, optimised.proof, options, gpu.plan.buckets)
        fixed = [(b, source.inputs(b)) for b in fixed_batches(options, gpu.plan)]
        offered = gpu_engines(gpu, ours, unguarded, fixed)
        if lowered is not None and lowered.formats:
            requests = judged(requests, source, options, lowered.judge)
            offered = [(engine, lowerable) for engine, lowerable in offered if engine.name.startswith("inductor")]
        relearn = Relearn(gpu, source, optimised, options, traffic) if traffic and gpu.plan.buckets else None
        model = gpu.model_runner(theirs, source.inputs)
        with full_precision():
            lowering = build_and_choose(
                offered, target, parts, requests, options, progress, gpu.load, model, gpu.plan, relearn
            )
        lowering[0].kernels = gpu.times.entry()
        return lowering
    requests = requests_of(source, optimised.proof, options)
    if lowered is not None and lowered.formats:
        requests = judged(requests, source, options, lowered.judge)
        offered = engines_for(ours[""], None, lowered.choices, lowered.data.calibration.sample(ROWS).batches)
    else:
        offered = engines_for(ours[""], unguarded)
    return build_and_choose(offered, target, parts, requests, options, progress, load_built, source.eager_runner())


def cut_line(source: Source, optimised: Optimised) -> Line:
    """The stages of the canonical graph. Raises LoweringError where it has none."""
    return Line(source, cut(optimised.canonical, source.names, output_names(source.out_structure)))


def lower_stages(line: Line, options: Options, folder: Path, progress: Progress) -> list[BuiltStage]:
    """Build, prove and measure each stage like a model of its own."""
    source = line.source
    built = []
    for stage in line.stages:
        progress.begin("stage")
        plain = written_out(stage.graph)  # the oracle widens what operators of torch read, and no arena of ours
        proof = Proof([line.inputs(stage, batch) for batch in source.proof_batches()]).prepare(plain)
        graph, records = run_passes(stage.graph, pipeline(options, FUSIONS), proof, strict=options.strict)
        check_guarded(records, options)
        single = Proof([line.inputs(stage, 1)] if source.min_batch == 1 else []).prepare(plain)
        requests = Requests(
            proof.inputs + single.inputs,
            proof.truth + single.truth,
            proof.baseline + single.baseline,
            {b: line.inputs(stage, b) for b in timed_batches(source, options)},
        )
        offered = engines_for(line.lowerable(stage, graph, EXPORT_BATCH), None)
        parts = folder / "parts" / stage.name
        parts.mkdir()
        eager = partial(run_stage, stage, requests)
        choice, _, _ = build_and_choose(
            offered, target_of(options), parts, requests, options, Silent(), load_built, eager
        )
        built.append(BuiltStage(stage.name, graph, line.described(stage.inputs), line.described(stage.outputs), choice))
        winners = ", ".join(f"{c.built.engine} at batch {b}" for b, c in choice.winners)
        progress.end(f"{stage.name}: {winners}")
    return built


@torch.no_grad()
def run_stage(stage: Stage, requests: Requests, batch: int) -> Any:
    return stage.graph(*requests.timed[batch])


def target_of(options: Options) -> Target:
    """The host that is compiled for: this one. Raises LoweringError for a GPU that is not there."""
    isa, threads = cpp.target_isa(), torch.get_num_threads()
    return gpu_target(isa, threads) if options.device == "cuda" else Target(options.device, isa, threads)


def open_gpu(source: Source, options: Options) -> Gpu:
    """The GPU with the plan of its buckets; models whose rows read each other get none."""
    fixed = options.batches if options.static_buckets else ()
    sizes = bucket_sizes(options.buckets, source.min_batch, options.max_batch, fixed)
    plan = Plan.of(*source.described(), sizes, options.streams, mixed_rows(source, source.graph))
    device = torch.device("cuda", torch.cuda.current_device())
    return Gpu(DeviceWeights(device), plan, KernelTimes(device))


@dataclass(frozen=True)
class Relearn:
    """Buckets from traffic: their times must be known first, so they are learnt when the usual ones have been measured."""

    gpu: Gpu
    source: Source
    optimised: Optimised
    options: Options
    traffic: Mapping[int, int]

    def __call__(self, measured: Mapping[int, float]) -> tuple[Gpu, Requests, str]:
        usual, seconds = self.gpu.plan.buckets, interpolated(measured)
        learnt = learn(self.traffic, self.source.min_batch, self.options.max_batch, seconds)
        learnt = tuple(sorted({*learnt, *fixed_batches(self.options, self.gpu.plan)}))
        gpu = replace(self.gpu, plan=replace(self.gpu.plan, buckets=learnt))
        requests = requests_of(self.source, self.optimised.proof, self.options, learnt)
        return gpu, requests, told(self.traffic, learnt, usual, seconds)


def fixed_batches(options: Options, plan: Plan) -> list[int]:
    return [b for b in options.batches if b in plan.buckets] if options.static_buckets else []


def build_and_choose(
    offered: Sequence[tuple[Engine, Lowerable]],
    target: Target,
    parts: Path,
    requests: Requests,
    options: Options,
    progress: Progress,
    load: Callable[[Built, Path], Run],
    model: Callable[[int], Any],
    plan: Plan | None = None,
    relearn: Relearn | None = None,
) -> Lowering:
    """Build and prove every engine, measure them beside the model itself, and keep the files of the winners."""
    start = time.perf_counter()
    progress.begin("build")
    only = None if options.engine == "auto" else options.engine
    candidates, rejected = build_all(offered, target, parts, requests, only, progress.detail, load)
    progress.end(", ".join(f"{c.built.engine} {c.build_seconds:.0f} s" for c in candidates))
    built = time.perf_counter()
    progress.begin("measure")
    with crowding(target.threads if target.device == "cpu" else 1) as told_of:
        eager_times = measure(candidates, model, requests, progress.detail)
        learnt = ""
        if relearn is not None:
            known = {b: min(c.median(b) for c in candidates if b in c.times) for b in eager_times}
            gpu, requests, learnt = relearn(known)
            plan = gpu.plan
            for candidate in candidates:
                candidate.times = {}
                candidate.run = gpu.load(candidate.built, parts)
            eager_times = measure(candidates, model, requests, progress.detail)
    choice = choose(candidates, rejected, eager_times)
    choice.plan, choice.crowded = plan, next(iter(told_of), None)
    won = [f"batch {b}: {c.built.engine} {microseconds(c.median(b) * 1e6)}" for b, c in choice.winners]
    progress.end("   ".join([learnt, *won] if learnt else won))
    choice.tidy(parts)
    return choice, target, {"build": built - start, "measure": time.perf_counter() - built}
