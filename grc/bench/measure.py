"""measure(): compile, build the peers, prove every answer, time all in one run, and return the rows."""

from __future__ import annotations

import datetime
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

from grc.bench import cuda, host
from grc.bench.contender import Contender, Stopwatch, flat, grc_contender
from grc.bench.peers import PEERS, known
from grc.bench.quality import Quality, fault, judge
from grc.bench.requests import Request, draws, pool
from grc.bench.rows import Row, check
from grc.bench.subject import BenchError, Subject
from grc.compiler import compile
from grc.graph.capture import Source, capture
from grc.graph.model_file import load_model
from grc.graph.oracle import run_fp64
from grc.lowering.move import moved
from grc.lowering.timing import Timing, Turn, interleave, summarise
from grc.options import Options
from grc.runtime.artifact import Artifact
from grc.runtime.device import DeviceWeights
from grc.runtime.program import Program, load

WARM_UP = 3
POOL_OVER_CACHE = 2  # so that inputs come from memory, as those of a server do
PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Settings:
    """What to measure. `artifact` is used as it is where one is given; else the model is compiled with `engine`."""

    model: str
    against: Sequence[str] = tuple(PEERS)
    batches: Sequence[int] = (1, 64, 1024)
    threads: int | None = None
    device: str = "cpu"
    seconds: float = 2.0
    artifact: Path | None = None
    engine: str = "auto"
    ids: Sequence[str] = ("uniform", "zipf")
    precision: str = "fp32"
    budget: tuple[str, ...] = ()
    command: str = ""


@dataclass
class Trial:
    """A contender on one pool of requests: how good it is, why it has no time, or its times."""

    contender: Contender
    quality: Quality | None = None
    refused: str | None = None
    turn: Turn | None = None
    timing: Timing | None = None
    wall: Timing | None = None


@dataclass
class Run:
    """What stays the same from batch to batch."""

    settings: Settings
    subject: Subject
    program: Program
    build_s: float | None
    load_s: float
    progress: Callable[[str], None]
    common: Row = field(default_factory=dict)


def measure(settings: Settings, progress: Callable[[str], None] = lambda text: None) -> list[Row]:
    """The rows of one run: grc and each peer at each batch size, with uniform and, if the file has them, Zipf ids.

    An engine that fails or answers wrongly has a row without a time, and with the reason. Raises GrcError when the
    model can't be compiled, a peer is unknown, or a batch size is refused by the model.
    """
    names = known(settings.against, settings.precision)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise BenchError("this host has no usable GPU", "measure with --device cpu")
    threads = settings.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    folder = Path(tempfile.mkdtemp(prefix="grc-bench-"))
    try:
        progress("capture")
        model = load_model(settings.model)
        drawn = {kind: draw for kind, draw in draws(model, settings.model).items() if kind in settings.ids}
        source = placed(capture(model), settings.device)
        batches = usable_batches(settings.batches, source)
        program, build_s, load_s = artifact_of(settings, batches, folder, progress)
        subject = Subject(source, settings.device, threads, folder, settings.precision)
        run = Run(settings, subject, program, build_s, load_s, progress, common(settings, source))
        rows: list[Row] = []
        for batch in batches:
            pools = {kind: pool(draw, source, batch, pool_bytes()) for kind, draw in drawn.items()}
            rows += measure_batch(run, names, batch, pools)
        return [check(row) for row in rows]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def usable_batches(batches: Sequence[int], source: Source) -> list[int]:
    if not source.dynamic:
        return [source.sizes[0][0].offset if source.sizes[0] else 1]
    small = [batch for batch in batches if batch < source.min_batch]
    if small:
        raise BenchError(
            f"the model itself fails at batch {small[0]}", f"measure from {source.min_batch} up: --batches 2,64"
        )
    return sorted(set(batches))


def artifact_of(
    settings: Settings, batches: Sequence[int], folder: Path, progress: Callable[[str], None]
) -> tuple[Program, float | None, float]:
    """The program, the seconds it took to compile (None for a given artifact) and to load."""
    path, build_s = settings.artifact, None
    if path is None:
        progress("grc: compile")
        clock = Stopwatch()
        path = folder / "model.grc"
        largest = max(*batches, Options.max_batch)
        options = Options(
            path,
            settings.device,
            settings.engine,
            batches=tuple(batches),
            max_batch=largest,
            precision=settings.precision,
            budget=settings.budget,
        )
        compile(settings.model, options=options)
        build_s = clock.read()
    elif Artifact.open(path).manifest["target"]["device"] != settings.device:
        raise BenchError(f"{path.name} was not built for {settings.device}", "measure with the artifact's own --device")
    elif precision_of(Artifact.open(path)) != settings.precision:
        own = precision_of(Artifact.open(path))
        raise BenchError(f"{path.name} was built with --precision {own}", f"measure with --precision {own}")
    clock = Stopwatch()
    program = load(path)
    return program, build_s, clock.read()


def precision_of(artifact: Artifact) -> str:
    entry = artifact.manifest["precision"]
    return "fp32" if entry is None else entry["asked"]


def pool_bytes() -> int:
    return POOL_OVER_CACHE * host.last_level_cache()


def common(settings: Settings, source: Source) -> Row:
    floats = [p.dtype for p in source.model.module.parameters() if p.is_floating_point()]
    own = PRECISIONS.get(floats[0], str(floats[0])[6:]) if floats else "fp32"
    return {
        "model": source.model.name,
        "device": settings.device,
        "precision": own if settings.precision == "fp32" else settings.precision,
        "allocator": host.allocator(),
        "machine": host.machine(settings.device),
        "versions": host.versions(),
        "date": datetime.date.today().isoformat(),
        "command": settings.command,
    }


def measure_batch(run: Run, names: Sequence[str], batch: int, pools: dict[str, list[Request]]) -> list[Row]:
    """Build the contenders for a batch size and measure them on each pool."""
    example = next(iter(pools.values()))[0]
    contenders = [grc_contender(run.program, batch, run.build_s, run.load_s)]
    failed: dict[str, str] = {}
    for name in names:
        run.progress(f"batch {batch}: build {name}")
        try:
            for contender in PEERS[name](run.subject, example, batch):
                contenders.append(contender)
        except Exception as error:  # a peer may raise anything; its row then says why it has no time
            failed[name] = first_line(error)
    rows: list[Row] = []
    for kind, requests in pools.items():
        run.progress(f"batch {batch}: measure, {kind} ids")
        trials = prove(run, contenders, requests[0])
        time_all(trials, requests, run.settings)
        best = best_forms(trials)
        absent = [
            Trial(never_built(name), refused=failed[name]) for name in names if name in failed and name not in best
        ]
        for trial in [*best.values(), *absent]:
            rows.append(row_of(run.common, trial, batch, kind, len(requests)))
    return rows


def never_built(name: str) -> Contender:
    return Contender(name, "", prepare=flat, run=flat, tensors=flat)


@torch.no_grad()
def prove(run: Run, contenders: Sequence[Contender], request: Request) -> list[Trial]:
    """Every contender's answer to one request, beside the fp64 oracle's and the eager model's."""
    module, device = run.subject.source.model.module, run.settings.device
    args, kwargs = pytree.tree_map(
        lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, (request.args, request.kwargs)
    )
    truth = [tensor.cpu() for tensor in flat(run_fp64(module, *args, **kwargs))]
    baseline = judge([tensor.cpu() for tensor in flat(module(*args, **kwargs))], truth)
    trials = []
    for contender in contenders:
        trial = Trial(contender)
        try:
            trial.quality = judge(contender.answer(request), truth)
            trial.refused = fault(trial.quality, baseline, run.settings.precision)
        except Exception as error:  # as above
            trial.refused = first_line(error)
        trials.append(trial)
    return trials


def time_all(trials: Sequence[Trial], requests: Sequence[Request], settings: Settings) -> None:
    """Time what answers rightly."""
    running = [trial for trial in trials if trial.refused is None]
    for trial in running:
        contender = trial.contender
        with contender.scope():
            prepared = [contender.prepare(request) for request in requests]
            for index in range(WARM_UP):
                contender.run(prepared[index % len(prepared)])
        trial.turn = turn_of(contender, prepared, settings.device)
    interleave([trial.turn for trial in running if trial.turn], len(requests), settings.seconds)
    for trial in running:
        assert trial.turn is not None
        wall = summarise(trial.turn.seconds)
        trial.timing = summarise(trial.turn.device_seconds) if settings.device == "cuda" else wall
        trial.wall = wall if settings.device == "cuda" else None


def turn_of(contender: Contender, prepared: Sequence[Any], device: str) -> Turn:
    run = contender.run
    if device == "cpu":
        return Turn(lambda index: run(prepared[index]), contender.scope)
    replay = contender.replay or run
    return Turn(
        lambda index: run(prepared[index]),
        contender.scope,
        device=lambda index: cuda.device_seconds(replay, prepared[index]),
    )


def best_forms(trials: Sequence[Trial]) -> dict[str, Trial]:
    """The fastest right form of each contender, or a wrong one where none is right."""
    best: dict[str, Trial] = {}
    for trial in trials:
        held = best.get(trial.contender.name)
        if held is None or (trial.timing and (held.timing is None or trial.timing.p50 < held.timing.p50)):
            best[trial.contender.name] = trial
    return best


def row_of(common: Row, trial: Trial, batch: int, ids: str, requests: int) -> Row:
    contender, timing, wall, quality = trial.contender, trial.timing, trial.wall, trial.quality
    error = None if quality is None or quality.max_error == float("inf") else quality.max_error
    return {
        **{name: common[name] for name in ("model", "device", "precision")},
        "batch": batch,
        "ids": ids,
        "engine": contender.name,
        "form": contender.form,
        "p50_us": timing and round(timing.p50, 2),
        "p99_us": timing and round(timing.p99, 2),
        "min_us": timing and round(timing.least, 2),
        "spread": timing and round(timing.spread, 4),
        "calls": timing.calls if timing else 0,
        "wall_p50_us": wall and round(wall.p50, 2),
        "wall_p99_us": wall and round(wall.p99, 2),
        "max_error": error,
        "overlap100": quality and quality.overlap100,
        "refused": trial.refused,
        "build_s": contender.build_s and round(contender.build_s, 2),
        "load_s": contender.load_s and round(contender.load_s, 4),
        "bytes": contender.bytes,
        "pool": requests,
        **{name: common[name] for name in ("allocator", "machine", "versions", "date", "command")},
    }


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
