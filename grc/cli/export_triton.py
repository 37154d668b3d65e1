"""grc export-triton: an artifact as a Triton model repository, proven on the real server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from grc.cli import parameters as p
from grc.cli.errors import Traceback, say
from grc.cli.progress import Reporting
from grc.cli.summary import put, put_json

NAME = "export-triton"
EXAMPLES = (
    "grc export-triton model.grc -o repo --verify",
    "grc export-triton model.grc -o repo --layout stages --instances 2 --cache",
    "grc export-triton model.grc -o repo --requests requests.json --verify --kserve s3://models/repo",
    "grc export-triton model.grc -o repo --instances 2 --gpus 0,1   two processes on each GPU, of an artifact for GPUs",
    "grc export-triton model.grc -o repo --set '*.instance_group[0].count=4' --set 'model.dynamic_batching=null'",
    "grc export-triton newer.grc -o repo --add --verify             a version more, while the repository is served",
)


WITH_ADD = ("artifact", "output", "version", "add", "requests", "verify", "json", "traceback")


def command(
    ctx: typer.Context,
    artifact: p.ArtifactPath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The repository to write.")],
    layout: Annotated[
        Literal["fused", "stages"],
        typer.Option(help="One model, or embedding_service, interaction_python and gr_trt (grc compile --stages)."),
    ] = "fused",
    backend: Annotated[
        Literal["auto", "python", "onnxruntime"],
        typer.Option(help="What runs the fused model: our runtime, or Triton's own ONNX Runtime where that is enough."),
    ] = "auto",
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the fused model.")] = None,
    prefix: Annotated[
        str,
        typer.Option(metavar="TEXT", help="Before every name but --name's, for a server of several repositories."),
    ] = "",
    version: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Version folder to write; 1, or the next, by default.")
    ] = None,
    keep_versions: Annotated[int, typer.Option(metavar="N", min=1, help="How many of the newest are served.")] = 1,
    add: Annotated[
        bool, typer.Option("--add", help="Add a version to the repository that is there, with the settings it has.")
    ] = False,
    instances: Annotated[int, typer.Option(metavar="N", min=1, help="Processes that run each model.")] = 1,
    gpus: Annotated[
        str, typer.Option(metavar="N,…", help="GPUs that the models run on, --instances on each; all by default.")
    ] = "",
    max_batch: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Most rows that are merged; the artifact's limit by default.")
    ] = None,
    max_delay: Annotated[
        int, typer.Option("--max-delay", metavar="US", min=0, help="How long a lone request may wait for others.")
    ] = 0,
    max_queue: Annotated[
        int, typer.Option(metavar="N", min=0, help="Requests that may wait, more get 503; 0: any number.")
    ] = 0,
    timeout: Annotated[
        int, typer.Option(metavar="US", min=0, help="How long one may wait before it gets 503; 0: for ever.")
    ] = 0,
    priorities: Annotated[int, typer.Option(metavar="N", min=0, help="Levels of priority, 1 the highest.")] = 0,
    cache: Annotated[bool, typer.Option("--cache", help="Keep answers by their exact inputs.")] = False,
    warmup: Annotated[bool, typer.Option(help="Answer golden requests before the server is ready.")] = True,
    python: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Virtual environment of the models (EXECUTION_ENV_PATH).")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="MODEL.FIELD=VALUE",
            help="A field of a model's config.pbtxt by Triton's name, with JSON; * is every model. May be repeated.",
        ),
    ] = None,
    image: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="The tritonserver image that the Dockerfile begins with.")
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON requests that --verify also sends: one, a list, or one a line."),
    ] = None,
    kserve: Annotated[
        str | None, typer.Option(metavar="URI", help="Write KServe manifests for the repository at this storage URI.")
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Start tritonserver, replay golden requests, write only what answers right."),
    ] = False,
    force: p.Force = False,
    json: p.Json = False,
    traceback: Traceback = False,
) -> None:
    """Write a model repository that tritonserver runs: models, scripts to start it, and a proof that it answers right.

    With --verify the golden requests go through the real server, over HTTP and gRPC, one at a time and merged.
    """
    from grc import GrcError
    from grc.runtime.triton_repository.export import export
    from grc.runtime.triton_repository.replay import Replayed, read_requests
    from grc.runtime.triton_repository.replay import verify as replay
    from grc.runtime.triton_repository.repository import Repository
    from grc.runtime.triton_repository.settings import IMAGE, Settings
    from grc.runtime.triton_repository.versions import add_version

    if add:
        refuse_settings(p.given(ctx))
    if requests is not None and not verify:
        raise GrcError("--requests are sent by --verify, which is not there", "add --verify, or leave --requests out")
    if python is not None and not python.is_dir():
        raise GrcError(f"no virtual environment at {python}", "name its folder, as python -m venv made it")
    settings = Settings(
        layout=layout,
        backend=backend,
        name=name,
        prefix=prefix,
        version=version or 1,
        keep_versions=keep_versions,
        instances=instances,
        gpus=gpu_list(gpus),
        max_batch=max_batch,
        max_delay_us=max_delay,
        max_queue=max_queue,
        timeout_us=timeout,
        priorities=priorities,
        cache=cache,
        warmup=warmup,
        python=python,
        overrides=overrides or (),
        image=image or IMAGE,
        storage=kserve,
    )
    told: list[Replayed] = []
    asked = read_requests(requests)
    with Reporting() as progress:
        progress.begin("export")

        def finished(repository: Repository) -> None:
            progress.end(", ".join(repository.models))
            if verify:
                progress.begin("verify")
                told.append(replay(repository, artifact, asked))
                progress.end(f"tritonserver {told[0].server}, ready after {told[0].ready_seconds:.1f} s")

        if add:
            written = add_version(artifact, output, version, before_done=finished)
        else:
            written = export(artifact, output, settings, force=force, before_done=finished)
    replayed = told[0] if told else None
    if replayed and replayed.warning:
        say(f"warning: {replayed.warning}")
        say("hint: name a request.json among the model's assets and compile it again, or send requests with --requests")
    if json:
        put_json(
            {"path": str(output), "layout": layout, "models": written.models, "entry": written.entry}
            | ({"verified": vars(replayed)} if replayed else {})
        )
        return
    put(f"  backend {written.record['backend']}: {written.record['backend_reason']}")
    put(f"  {output}   clients call {written.entry}   {proven(replayed, written.preprocesses)}")
    put(f"  try: {output}/run_server.sh")


def gpu_list(text: str) -> tuple[int, ...]:
    """`0,1` as numbers. Raises BadParameter, a usage error, for anything else."""
    numbers = text.split(",") if text else []
    if not all(number.isdecimal() for number in numbers):
        raise typer.BadParameter(f"{text!r} is no list of GPUs such as 0,1", param_hint="--gpus")
    return tuple(map(int, numbers))


def refuse_settings(given: Mapping[str, str]) -> None:
    """Raises GrcError for flags beside --add, which a version that is added would leave unused."""
    from grc import GrcError

    unused = [flag for name, flag in given.items() if name not in WITH_ADD]
    if unused:
        raise GrcError(
            f"--add makes no use of {' and '.join(unused)}: a new version has the repository's settings",
            "leave it out, or export a repository anew without --add",
        )


def proven(replayed: Any, preprocesses: bool) -> str:
    if replayed is None:
        return "not verified: --verify replays golden requests on the real server"
    texts = f" and {replayed.requests} of JSON" if replayed.requests else " and none of JSON" if preprocesses else ""
    merged = f"each alone: {replayed.alone}" if replayed.alone else f"{replayed.merged} of them in another's call"
    return (
        f"{replayed.tensors} golden requests{texts} answered over HTTP and gRPC, {merged}; "
        f"largest error {replayed.error:.1e}"
    )
