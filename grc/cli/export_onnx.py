"""grc export-onnx: the optimised graph as an ONNX model for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grc.cli import parameters as p
from grc.cli.errors import Traceback
from grc.cli.progress import Reporting
from grc.cli.summary import put, put_json

NAME = "export-onnx"
EXAMPLES = ("grc export-onnx model.py -o model-onnx", "grc export-onnx model.py -o model-onnx --force --json")


def command(
    model: p.Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The folder to write.")],
    on_bad_id: p.OnBadId = "error",
    disable: p.Disable = None,
    force: p.Force = False,
    json: p.Json = False,
    traceback: Traceback = False,
) -> None:
    """Write model.onnx with a dynamic batch, and large weights in a file beside it.

    Fused ops are written out in plain form. The file is checked, its shapes inferred, and its answers compared with the
    model's where ONNX Runtime is installed.
    """
    from grc import Options
    from grc.compiler import as_model, optimise, traced
    from grc.lowering.onnx_file import FILE, write_onnx
    from grc.passes.pipeline import NAMES
    from grc.report.summary import size
    from grc.runtime.artifact import writing

    p.check_passes(disable or (), NAMES)
    options = Options(on_bad_id=on_bad_id, disable=tuple(disable or ()))
    with writing(output, force, FILE, "ONNX export") as folder, Reporting() as progress:
        source = traced(as_model(model, None), progress)
        optimised = optimise(source, options, progress)
        progress.begin("export")
        error = write_onnx(source, optimised.graph, folder)
        progress.end("not compared: onnxruntime is not installed" if error is None else f"largest error {error:.1e}")
    count = sum(file.stat().st_size for file in output.iterdir())
    if json:
        put_json({"path": str(output / FILE), "bytes": count, "inputs": source.names, "error": error})
    else:
        put(f"  {output / FILE}   {size(count)}")
