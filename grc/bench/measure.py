"""measure(): compile, build the peers, prove every answer, time all in one run, and return the rows."""

from __future__ import annotations

import datetime
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

from grc.bench import host
from grc.bench.contender import Form, Stopwatch, flat
from grc.bench.peers import GRC, PEERS, known, usual
from grc.bench.quality import Quality, fault, judge
from grc.bench.requests import Request, draws, pool
from grc.bench.rows import Row, check
from grc.bench.subject import BenchError, Place, Subject
from grc.bench.worker import RemoteTurn, Worker, WorkerError
from grc.graph.capture import Source
from grc.graph.oracle import run_fp64
from grc.lowering.timing import Timing, crowding, interleave, summarise
from grc.options import Options
from grc.runtime.artifact import Artifact

POOL_OVER_CACHE = 2  # so that inputs come from memory, as those of a server do
PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Settings:
    """What to measure. `artifact` is used as it is where one is given; else the model is compiled with `engine`."""

    model: str
    against: Sequence[str] | None = None  # all that run there
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
    """A form on one pool of requests: how good it is, why it has no time, or its times."""

    form: Form
    quality: Quality | None = None
    refused: str | None = None
    timing: Timing | None = None
    wall: Timing | None = None


@dataclass(frozen=True)
class Run:
    """What stays the same from batch to batch."""

    settings: Settings
    subject: Subject
    staff: Staff
    build_s: float | None
    progress: Callable[[str], None]
    common: Row


class Staff:
    """A worker for each contender, hired when it is first asked for, and again after its process has died."""

    def __init__(self, place: Place):
        self.place = place
        self.environment = host.tuned_environment(os.environ, place.threads)
        self.workers: dict[str, Worker] = {}

    def worker(self, name: str) -> Worker:
        if name not in self.workers or not self.workers[name].alive:
            self.dismiss(name)
            self.workers[name] = Worker(self.place, self.environment)
        return self.workers[name]

    def dismiss(self, name: str) -> None:
        if name in self.workers:
            self.workers.pop(name).close()

    def close(self) -> None:
        for name in list(self.workers):
            self.dismiss(name)


@dataclass(frozen=True)
class Entry:
    """A form in the worker that holds it."""

    worker: Worker
    index: int
    form: Form


def measure(
    settings: Settings,
    progress: Callable[[str], None] = lambda text: None,
    keep: Callable[[list[Row]], None] = lambda rows: None,
    built: Callable[[dict[str, Any]], None] = lambda manifest: None,
) -> list[Row]:
    """The rows of one run: grc and each peer at each batch size, with uniform and, if the file has them, Zipf ids. `keep`
    gets those of each batch size as they are measured, `built` the manifest of the artifact.

    An engine that fails, dies or answers wrongly has a row without a time, and with the reason. Raises GrcError when the
    model can't be compiled, a peer is unknown, or a batch size is refused by the model.
    """
    asked = usual(settings.precision, settings.device) if settings.against is None else settings.against
    names = known(asked, settings.precision, settings.device)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise BenchError("this host has no usable GPU", "measure with --device cpu")
    threads = settings.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    folder = Path(tempfile.mkdtemp(prefix="grc-bench-"))
    artifact = settings.artifact or folder / "model.grc"
    place = Place(settings.model, settings.device, threads, folder, artifact, settings.precision)
    staff = Staff(place)
    try:
        progress("capture")
        subject = Subject(place)
        found = draws(subject.model, settings.model)
        drawn = {kind: draw for kind, draw in found.items() if kind in settings.ids}
        batches = usable_batches(settings.batches, subject.source)
        build_s = compiled(settings, staff, batches, progress)
        built(Artifact.open(artifact).manifest)
        run = Run(settings, subject, staff, build_s, progress, common(settings, subject.source))
        rows: list[Row] = []
        for batch in batches:
            pools = {kind: pool(draw, subject.source, batch, pool_bytes()) for kind, draw in drawn.items()}
            measured = [check(row) for row in measure_batch(run, names, batch, pools)]
            keep(measured)
            rows += measured
        return rows
    finally:
        staff.close()
        shutil.rmtree(folder, ignore_errors=True)


def usable_batches(batches: Sequence[int], source: Source) -> list[int]:
    if not source.dynamic:
        return [source.sizes[0][0].offset if source.sizes[0] else 1]
    small = [batch for batch in batches if batch < source.min_batch]
    if small:
        raise BenchError(
            f"the model itself fails at batch {small[0]}", f"measure from {source.min_batch} up: --batches 2,64"
        )
    return sorted(set(batches))


def compiled(settings: Settings, staff: Staff, batches: Sequence[int], progress: Callable[[str], None]) -> float | None:
    """The seconds that it took to compile, or None for an artifact that was given."""
    if settings.artifact is not None:
        check_artifact(settings.artifact, settings, batches)
        return None
    progress("grc: compile")
    options = Options(
        staff.place.artifact,
        settings.device,
        settings.engine,
        batches=tuple(batches),
        # Peers on a GPU are built for these very sizes.
        max_batch=max(batches) if settings.device == "cuda" else max(*batches, Options.max_batch),
        buckets=tuple(batches) if settings.device == "cuda" else (),
        precision=settings.precision,
        budget=settings.budget,
    )
    clock = Stopwatch()
    staff.worker("compiler").ask("compile", settings.model, options)
    seconds = clock.read()
    staff.dismiss("compiler")  # with the memory that it took
    return seconds


def check_artifact(path: Path, settings: Settings, batches: Sequence[int]) -> None:
    """Raises BenchError for an artifact that can't be measured as asked: of another device or precision, or for smaller
    batches, which would else be found when those before are measured."""
    manifest = Artifact.open(path).manifest
    device, precision, batch = manifest["target"]["device"], manifest["precision"], manifest["batch"]
    own = "fp32" if precision is None else precision["asked"]
    if device != settings.device:
        raise BenchError(f"{path.name} was not built for {settings.device}", "measure with the artifact's own --device")
    if own != settings.precision:
        raise BenchError(f"{path.name} was built with --precision {own}", f"measure with --precision {own}")
    if batch["dynamic"] and max(batches) > batch["max"]:
        raise BenchError(
            f"{path.name} takes batches up to {batch['max']}, not {max(batches)}",
            "measure smaller --batches: the model, as it was traced, takes no more"
            if batch["capped"]
            else f"measure smaller --batches, or compile with --max-batch {max(batches)}",
        )


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
    """Build every contender for a batch size in its worker, and measure them on each pool."""
    example = next(iter(pools.values()))[0]
    entries: list[Entry] = []
    failed: dict[str, str] = {}
    rows: list[Row] = []
    for name, worker in [(name, run.staff.worker(name)) for name in ("grc", *names)]:
        run.progress(f"batch {batch}: {'load' if name == 'grc' else 'build'} {name}")
        try:
            forms, reason = worker.ask("build", PEERS.get(name, GRC), example, batch)
        except WorkerError as error:
            forms, reason = [], error.message
        if reason is not None:
            failed[name] = reason
        entries += [Entry(worker, index, form) for index, form in enumerate(forms)]
    for kind, requests in pools.items():
        run.progress(f"batch {batch}: measure, {kind} ids")
        best = best_forms(timed(run, entries, requests))
        absent = [Trial(Form(name, ""), refused=failed[name]) for name in failed if name not in best]
        for trial in [*best.values(), *absent]:
            if trial.form.name == "grc":
                trial.form.build_s = run.build_s
            rows.append(row_of(run.common, trial, batch, kind, len(requests)))
    return rows


def timed(run: Run, entries: Sequence[Entry], requests: Sequence[Request]) -> list[Trial]:
    """Every form on the same requests, in turns: those that answer the first of them rightly have times."""
    truth, baseline = expected(run, requests[0])
    trials = [Trial(entry.form) for entry in entries]
    turns: list[tuple[Trial, RemoteTurn]] = []
    for entry, trial in zip(entries, trials, strict=True):
        try:
            if entry.index == 0:
                entry.worker.ask("serve", requests)
            trial.quality = judge(entry.worker.ask("answer", entry.index), truth)
            trial.refused = fault(trial.quality, baseline, run.settings.precision)
        except WorkerError as error:
            trial.refused = error.message
        if trial.refused is None:
            turns.append((trial, RemoteTurn(entry.worker, entry.index)))
    place, workers = run.staff.place, [entry.worker.process.pid for entry in entries]
    with crowding(place.threads if place.device == "cpu" else 1, workers) as told_of:
        interleave([turn for _, turn in turns], len(requests), run.settings.seconds)
    for note in told_of:
        run.progress(f"note: {note}")
    for trial, turn in turns:
        trial.refused = turn.fault
        if trial.refused is None:
            wall = summarise(turn.seconds)
            trial.timing = summarise(turn.device_seconds) if run.settings.device == "cuda" else wall
            trial.wall = wall if run.settings.device == "cuda" else None
    return trials


@torch.no_grad()
def expected(run: Run, request: Request) -> tuple[list[torch.Tensor], Quality]:
    """The fp64 oracle's flat answer, and how far the eager model is from it."""
    module, device = run.subject.module, run.settings.device
    args, kwargs = pytree.tree_map(
        lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, (request.args, request.kwargs)
    )
    truth = [tensor.cpu() for tensor in flat(run_fp64(module, *args, **kwargs))]
    return truth, judge([tensor.cpu() for tensor in flat(module(*args, **kwargs))], truth)


def best_forms(trials: Sequence[Trial]) -> dict[str, Trial]:
    """The fastest right form of each contender, or a wrong one where none is right."""
    best: dict[str, Trial] = {}
    for trial in trials:
        held = best.get(trial.form.name)
        if held is None or (trial.timing and (held.timing is None or trial.timing.p50 < held.timing.p50)):
            best[trial.form.name] = trial
    return best


def row_of(common: Row, trial: Trial, batch: int, ids: str, requests: int) -> Row:
    form, timing, wall, quality = trial.form, trial.timing, trial.wall, trial.quality
    error = None if quality is None or quality.max_error == float("inf") else quality.max_error
    return {
        **{name: common[name] for name in ("model", "device", "precision")},
        "batch": batch,
        "ids": ids,
        "engine": form.name,
        "form": form.form,
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
        "build_s": form.build_s and round(form.build_s, 2),
        "load_s": form.load_s and round(form.load_s, 4),
        "bytes": form.bytes,
        "pool": requests,
        **{name: common[name] for name in ("allocator", "machine", "versions", "date", "command")},
    }
