"""grc opt: run chosen passes on a model and print the graph that they leave, as mlir-opt does."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from grc.cli import parameters as p
from grc.cli.errors import Traceback, say
from grc.cli.printing import graph_printer
from grc.cli.progress import Reporting
from grc.cli.summary import put, timing_lines

NAME = "opt"
EXAMPLES = (
    "grc opt model.py",
    "grc opt model.py --passes normalise,merge-tables --print-after normalise",
    "grc opt model.py --bisect-limit 2 --verify end --timing",
)


def command(
    model: p.Model,
    passes: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Passes to run, in this order; the whole pipeline by default.")
    ] = None,
    print_after: p.PrintAfter = None,
    verify: Annotated[
        Literal["each", "end"], typer.Option(help="Prove the answers after each pass, or once at the end.")
    ] = "each",
    bisect_limit: p.BisectLimit = None,
    disable: p.Disable = None,
    on_bad_id: p.OnBadId = "error",
    strict: p.Strict = False,
    timing: p.Timing = False,
    traceback: Traceback = False,
) -> None:
    """Run passes on a model and print the graph on stdout."""
    from grc import Options
    from grc.compiler import as_model, traced
    from grc.graph.show import show
    from grc.passes.manager import Proof, run_passes
    from grc.passes.pipeline import NAMES

    p.check_passes(disable or (), NAMES)
    after = graph_printer(print_after or [], NAMES)
    options = Options(on_bad_id=on_bad_id, disable=tuple(disable or ()))
    steps = chosen(passes, options)
    with Reporting() as progress:
        source = traced(as_model(model, None), progress)
        progress.begin("passes")
        proof = Proof([source.inputs(batch) for batch in source.proof_batches()]).prepare(source.graph)
        held = proof if verify == "each" else Proof([])
        graph, records = run_passes(
            source.graph, steps, held, strict=strict, limit=bisect_limit, after=after, progress=progress.detail
        )
        kept = [f"{r.name} {len(r.made)}" for r in records if r.made and not r.rolled_back]
        progress.end(", ".join(kept) or "no pass changed anything")
    for record in records:
        if record.rolled_back:
            say(f"  rolled back {record.name}: {record.rolled_back}")
    if timing:
        for line in timing_lines((r.name, len(r.made), r.seconds, r.proof_seconds) for r in records):
            say(line)
    put(show(graph).rstrip())
    if verify == "end":
        prove(proof, graph)


def chosen(passes: str | None, options: Any) -> list[Any]:
    """The passes that were named, in that order, or the whole pipeline. Raises GrcError for a name that no pass has."""
    from dataclasses import replace

    from grc.kernels import FUSIONS
    from grc.passes.pipeline import NAMES, pipeline

    if passes is None:
        return pipeline(options, FUSIONS)
    names = [name.strip() for name in passes.split(",") if name.strip()]
    p.check_passes(names, NAMES)
    policy = "zero" if options.on_bad_id == "error" else options.on_bad_id
    offered = dict(zip(NAMES, pipeline(replace(options, on_bad_id=policy, disable=()), FUSIONS), strict=True))
    return [offered[name] for name in names if name not in options.disable]


def prove(proof: Any, graph: Any) -> None:
    """Raise PassError where the passes together broke the answers."""
    from grc.errors import PassError

    _, reason = proof.check(graph)
    if reason is not None:
        raise PassError(f"the passes together: {reason}", "find the one to blame with --verify each, or --bisect-limit")
