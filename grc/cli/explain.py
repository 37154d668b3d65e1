"""grc explain: what would fuse and what misses, without building an engine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from grc.cli import parameters as p
from grc.cli.errors import Traceback, say
from grc.cli.progress import Reporting
from grc.cli.summary import put, put_json, show_changes

NAME = "explain"
EXAMPLES = ("grc explain model.py", "grc explain model.py --print-graph | less", "grc explain model.py --json")


def command(
    model: p.Model,
    print_graph: Annotated[bool, typer.Option("--print-graph", help="Print the optimised graph as well.")] = False,
    on_bad_id: p.OnBadId = "error",
    disable: p.Disable = None,
    json: p.Json = False,
    traceback: Traceback = False,
) -> None:
    """Say what would fuse, what would miss and why, in a few seconds and without building anything."""
    from grc import Options
    from grc.compiler import as_model, optimise, traced
    from grc.graph.show import show
    from grc.passes.pipeline import NAMES
    from grc.report.summary import changes, rolled_back

    p.check_passes(disable or (), NAMES)
    options = Options(on_bad_id=on_bad_id, disable=tuple(disable or ()))
    with Reporting() as progress:
        source = traced(as_model(model, None), progress)
        optimised = optimise(source, options, progress)
    told: dict[str, Any] = {"passes": [asdict(record) for record in optimised.records]}
    fused, missed = changes(told)
    summary = {
        "model": model,
        "fused": fused,
        "missed": missed,
        "rolled_back": rolled_back(told),
        "notes": source.notes,
    }
    if json:
        graph = {"graph": show(optimised.graph)} if print_graph else {}
        put_json({**summary, **graph})
        return
    show_changes(summary)
    if not (fused or missed or summary["rolled_back"]):
        say("  no fusion applies to this model, and none comes near")
    for note in source.notes:
        say(f"note: {note}")
    if print_graph:
        put()
        put(show(optimised.graph).rstrip())
