"""grc run: answer requests from a file or a pipe."""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from grc.cli import parameters as p
from grc.cli.errors import Traceback

NAME = "run"
EXAMPLES = (
    "grc run model.grc --example -o request.json",
    "grc run model.grc request.json",
    "grc run model.grc requests.parquet -o answers.parquet",
    "cat rows.jsonl | grc run model.grc - --format jsonl",
    "grc run model.grc --request request.json        a request as the model's preprocess() takes it",
    "grc run model.grc --example --format perf_analyzer -o load.json",
)
STDIN = "-"


def command(
    artifact: p.ArtifactPath,
    source: Annotated[
        str | None, typer.Argument(metavar="[INPUT]", help="A .json, .jsonl, .npz or .parquet file; - reads stdin.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PATH", help="Where the answers go; stdout by default.")
    ] = None,
    form: Annotated[
        Literal["json", "jsonl", "npz", "parquet", "perf_analyzer"] | None,
        typer.Option("--format", help="The format, where no extension tells it; perf_analyzer is for --example."),
    ] = None,
    request: Annotated[
        bool,
        typer.Option("--request", help="INPUT is a JSON request for preprocess(); print postprocess()'s answer."),
    ] = False,
    example: Annotated[bool, typer.Option("--example", help="Write an example INPUT instead of running.")] = False,
    engine: Annotated[str | None, typer.Option(metavar="NAME", help="Answer with one of the artifact's parts.")] = None,
    traceback: Traceback = False,
) -> None:
    r"""Answer requests: inputs by name in, outputs by name out.

    JSON is either {"input": \[row, row, …]} or a list of rows; JSON lines and parquet hold a row each.
    No rows are a batch too: \[], {"input": \[]}, or a file of no lines.
    """
    if example == (source is not None):
        raise typer.BadParameter("give an INPUT or --example, one of the two")
    if example and request:
        raise typer.BadParameter("--example writes tensors; --request has no example")
    if form == "perf_analyzer" and not example:
        raise typer.BadParameter("perf_analyzer is a format of --example: the requests that it sends")
    from grc import load
    from grc.runtime import values
    from grc.runtime.structure import output_names

    if form == "perf_analyzer":
        put(load_requests(artifact), output, form)
        return
    if example:
        put(values.encode(golden_inputs(artifact), target_format(output, form, "json")), output, form)
        return
    assert source is not None
    program = load(artifact, engine=engine)
    if request:
        put(
            recommended(program, read(source, "write the JSON object that preprocess() takes").decode()), output, "json"
        )
        return
    kind = values.format_of(source, form)
    inputs = values.decode(read(source), kind, program.artifact.manifest["inputs"])
    names = output_names(program.artifact.manifest["structure"]["outputs"])
    answers = dict(zip(names, program.run_flat(inputs), strict=True))
    wanted = target_format(output, form, "json" if kind in values.BINARY and output is None else kind)
    put(values.encode(answers, wanted), output, wanted)


def target_format(output: Path | None, form: str | None, default: str) -> str:
    from grc.runtime import values

    if output is None:
        return form or default
    return values.format_of(output.name, None if output.suffix else form or default)


def recommended(program: Any, text: str) -> bytes:
    """The answer to one request as JSON."""
    from grc.runtime.processing import read_request, written

    return (written(program.recommend(read_request(text))) + "\n").encode()


def golden_inputs(artifact: Path) -> dict[str, Any]:
    """The second golden request, which has more than one row where the model takes batches."""
    from grc import Artifact
    from grc.runtime.golden import read_golden

    opened = Artifact.open(artifact)
    request = read_golden(opened)[:2][-1]
    return {spec["name"]: tensor for spec, tensor in zip(opened.manifest["inputs"], request.inputs, strict=True)}


def load_requests(artifact: Path) -> bytes:
    """Every row of the golden requests, as perf_analyzer reads them by --input-data."""
    from grc import Artifact
    from grc.runtime.golden import read_golden
    from grc.runtime.triton_repository.perf_analyzer import load_data
    from grc.runtime.triton_repository.tensors import interface

    opened = Artifact.open(artifact)
    return (dumps(load_data(interface(opened.manifest), read_golden(opened))) + "\n").encode()


def read(source: str, hint: str = "make one with grc run ARTIFACT --example -o request.json") -> bytes:
    from grc import GrcError

    if source == STDIN:
        return sys.stdin.buffer.read()
    if not Path(source).is_file():
        raise GrcError(f"no request file at {source}", hint)
    return Path(source).read_bytes()


def put(data: bytes, output: Path | None, form: str | None) -> None:
    from grc import GrcError

    if output is not None:
        output.write_bytes(data)
        return
    if form in ("npz", "parquet") and sys.stdout.isatty():
        raise GrcError(f"{form} is not for a terminal", f"write it to a file: -o answers.{form}")
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
