"""The application: which commands there are, and how every one of them fails."""

from __future__ import annotations

import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from grc.cli import bench, check, compile, doctor, ending, explain, export_onnx, export_triton, inspect, opt, run, serve
from grc.cli.errors import Failing
from grc.runtime.version import VERSION


class Commands(TyperGroup):
    """The commands, in the order in which they were registered, with grc's own way to fail."""

    def invoke(self, ctx: Any) -> Any:
        with Failing(ctx):
            return super().invoke(ctx)


app = typer.Typer(
    name="grc",
    cls=Commands,
    help="Compile PyTorch recommenders: one graph, verified rewrites, measured engines, one artifact.",
    epilog="Begin with:  grc compile examples/zoo/dlrm.py -o dlrm.grc",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def tell_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"grc {VERSION}\n")
        raise typer.Exit()


@app.callback()
def grc(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=tell_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show the Python traceback of an error.")] = False,
) -> None:
    ctx.meta["traceback"] = traceback or ctx.meta.get("traceback", False)


for command in (compile, run, serve, bench, inspect, explain, opt, check, export_onnx, export_triton, doctor):
    app.command(command.NAME, epilog="\n\n".join(["Examples:", *command.EXAMPLES]))(command.command)


def main() -> None:
    """Run the command line."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ending.end)
    app()
