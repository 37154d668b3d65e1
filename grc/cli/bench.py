"""grc bench: an artifact beside its peers, in one run."""

from __future__ import annotations

import json as jsons
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from grc.cli import parameters as p
from grc.cli.errors import Traceback, say

NAME = "bench"
EXAMPLES = (
    "grc bench examples/zoo/dlrm.py --batches 1,64,1024 --threads 2",
    "grc bench model.py --artifact model.grc --against eager,onnxruntime --plot times.svg",
    "grc bench model.py --output rows.jsonl --json",
)
ALL = "all"


def command(
    model: p.Model,
    against: Annotated[
        str, typer.Option(metavar="PEER,…", help="What to compare with: by default all that run there.")
    ] = ALL,
    batches: Annotated[str, typer.Option(metavar="N,N,…", help="Batch sizes to measure.")] = "1,64,1024",
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads of every engine; torch's own number by default.")
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to measure.")] = "cpu",
    seconds: Annotated[
        float, typer.Option(metavar="S", min=0.01, help="Recorded calls of each engine at each batch size.")
    ] = 2.0,
    artifact: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Measure this artifact instead of compiling the model.")
    ] = None,
    engine: Annotated[
        str, typer.Option(metavar="NAME", help="The engine to compile with.", autocompletion=p.engines)
    ] = "auto",
    precision: p.Precision = "fp32",
    budget: p.Budget = None,
    ids: Annotated[
        str, typer.Option(metavar="KIND,…", help="How ids are drawn, where the model file offers both.")
    ] = "uniform,zipf",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="Add the rows to this .jsonl file, in the place of those of the same cells.",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the times as .svg or .png.")] = None,
    json: p.Json = False,
    traceback: Traceback = False,
) -> None:
    """Compile a model and measure it beside its peers: same inputs, same threads, in turns.

    With --precision, peers are those that lower it by themselves: on a CPU those that quantise a model, and on a GPU the
    model in half precision.

    Every time stands beside its error against the fp64 oracle and the overlap of the best 100 ids; an engine that
    answers wrongly has no time. Each engine builds and runs in a process of its own, with malloc tuned for all alike.
    """
    sizes = p.batch_sizes(batches)
    from grc.bench import rows as table_rows
    from grc.bench.host import allocator
    from grc.bench.measure import Settings, measure
    from grc.bench.peers import known, usual
    from grc.bench.plot import drawing, plot_times
    from grc.bench.subject import BenchError
    from grc.bench.table import text_table
    from grc.cli.summary import table
    from grc.report.summary import fused_on_gpu

    asked = usual(precision, device) if against == ALL else [name for name in against.split(",") if name]
    names = known(asked, precision, device)
    kinds = ids.split(",")
    if not set(kinds) <= {"uniform", "zipf"}:
        raise BenchError(f"ids are drawn uniform or zipf, not {ids}", "use --ids uniform,zipf")
    if plot is not None:
        drawing(plot)
    say(f"memory: {allocator()}")
    said = [
        "grc",
        "bench",
        shown(model),
        "--against",
        ",".join(names),
        "--batches",
        batches,
        "--seconds",
        f"{seconds:g}",
    ]
    said += ["--threads", str(threads)] if threads is not None else []
    said += ["--device", device] if device != "cpu" else []
    said += ["--engine", engine] if engine != "auto" else []
    said += ["--precision", precision] if precision != "fp32" else []
    said += ["--budget", ",".join(p.limits(budget))] if budget else []
    said += ["--artifact", artifact.name] if artifact is not None else []
    settings = Settings(
        model,
        names,
        sizes,
        threads,
        device,
        seconds,
        artifact,
        engine,
        tuple(kinds),
        precision,
        p.limits(budget),
        shlex.join(said),
    )

    def keep(measured: list[table_rows.Row]) -> None:
        if output is not None:
            table_rows.write(output, measured)

    manifests: list[dict[str, Any]] = []
    rows = measure(settings, lambda text: say(f"  {text}"), keep, manifests.append)
    if plot is not None:
        plot_times(rows, plot)
    fused = list(table(fused_on_gpu(manifests[0])))
    if fused:
        fused = ["", "fused ops, timed when they were built:", *fused]
    lines = [jsons.dumps(row) for row in rows] if json else [text_table(rows), *fused]
    sys.stdout.write("\n".join(lines) + "\n")


def shown(model: str) -> str:
    """The model as others would name it: below the current folder, or by its file's name alone."""
    path = Path(model)
    if not path.is_absolute():
        return model
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name
