"""grc compile: a model file becomes an artifact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from grc.cli import parameters as p
from grc.cli.errors import Traceback, say
from grc.cli.printing import graph_printer
from grc.cli.progress import Reporting
from grc.cli.summary import put_json, show_changes, show_closing, show_precision, timing_lines

NAME = "compile"
EXAMPLES = (
    "grc compile model.py -o model.grc",
    "grc compile model.py --engine onnxruntime --batches 1,32 --max-batch 256",
    "grc compile model.py --precision int8 --budget max-error=0.01,topk-overlap@100=0.99",
    "grc compile model.py --on-bad-id zero --force --json",
)
PRECISION = ("budget", "calibration")  # parameters that nothing uses in fp32
GPU = ("buckets", "traffic", "streams", "static_buckets")  # and those that nothing uses on a CPU


def command(
    ctx: typer.Context,
    model: p.Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PATH", help="The artifact's folder; NAME.grc by default.")
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where the artifact will run.")] = "cpu",
    engine: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="auto keeps the fastest that is exact enough; a name forces one.",
            autocompletion=p.engines,
        ),
    ] = "auto",
    batches: Annotated[
        str, typer.Option(metavar="N,N,…", help="Batch sizes at which the engines are measured.")
    ] = "1,64,1024",
    max_batch: Annotated[int, typer.Option(metavar="N", min=1, help="Largest batch a request may have.")] = 4096,
    buckets: Annotated[
        str, typer.Option(metavar="N,N,…", help="On a GPU: batch sizes with a CUDA graph; 1,8,32,128,… by default.")
    ] = "",
    traffic: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="On a GPU: batch sizes of real requests, one a line, to learn the buckets from."
        ),
    ] = None,
    streams: Annotated[int, typer.Option(metavar="N", min=1, help="On a GPU: requests that run at once.")] = 1,
    static_buckets: Annotated[
        bool, typer.Option("--static-buckets", help="On a GPU: also build for each of --batches alone, autotuned.")
    ] = False,
    precision: p.Precision = "fp32",
    budget: p.Budget = None,
    calibration: p.Calibration = None,
    stages: Annotated[
        bool, typer.Option("--stages", help="Also build the stages for grc export-triton --layout stages.")
    ] = False,
    on_bad_id: p.OnBadId = "error",
    disable: p.Disable = None,
    bisect_limit: p.BisectLimit = None,
    strict: p.Strict = False,
    force: p.Force = False,
    print_after: p.PrintAfter = None,
    timing: p.Timing = False,
    json: p.Json = False,
    traceback: Traceback = False,
) -> None:
    """Compile a recommender into an artifact that serves by itself.

    The model file defines get_model(), which returns a torch.nn.Module in eval mode, and get_inputs(batch), which
    returns the tuple or dict of tensors to call it with.
    """
    refuse_unused(p.given(ctx), device, precision)
    sizes = p.batch_sizes(batches)
    from grc import Options
    from grc.compiler import compile
    from grc.passes.pipeline import NAMES
    from grc.report.summary import summarise

    options = Options(
        output=output,
        device=device,
        engine=engine,
        batches=sizes,
        max_batch=max_batch,
        buckets=p.batch_sizes(buckets) if buckets else (),
        traffic=traffic,
        streams=streams,
        static_buckets=static_buckets,
        precision=precision,
        budget=p.limits(budget),
        calibration=calibration,
        stages=stages,
        on_bad_id=on_bad_id,
        disable=tuple(disable or ()),
        bisect_limit=bisect_limit,
        strict=strict,
        force=force,
    )
    p.check_passes(options.disable, NAMES)
    p.check_engine(engine, device)
    with Reporting() as progress:
        artifact = compile(model, None, options, progress, graph_printer(print_after or [], NAMES))
    if timing:
        records = artifact.manifest["passes"]
        for line in timing_lines((r["name"], len(r["changes"]), r["seconds"], r["proof_seconds"]) for r in records):
            say(line)
    summary = summarise(artifact.manifest)
    if json:
        put_json({"path": str(artifact.path), "bytes": artifact.bytes, **summary})
        return
    show_changes(summary)
    show_precision(summary)
    show_closing(summary, str(artifact.path), artifact.bytes)


def refuse_unused(given: Mapping[str, str], device: str, precision: str) -> None:
    """Raises GrcError for flags that this device or this precision would leave unused."""
    from grc import GrcError

    for names, used, what, value, hint in (
        (GPU, device == "cuda", "--device", device, "--device cuda"),
        (PRECISION, precision != "fp32", "--precision", precision, "another --precision, such as int8"),
    ):
        unused = [given[name] for name in names if name in given]
        if unused and not used:
            raise GrcError(f"{what} {value} makes no use of {' and '.join(unused)}", f"leave it out, or choose {hint}")
