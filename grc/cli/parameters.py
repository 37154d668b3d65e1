"""Parameters that several commands share: the model, the artifact, and the fields of Options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from grc.options import ENGINES, BadIdPolicy

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A model file (model.py or model.py:get_name) or a saved program (.pt2)."),
]
ArtifactPath = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder that grc compile wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts.")]
Disable = Annotated[
    list[str] | None, typer.Option("--disable", metavar="PASS", help="Leave a pass out; may be repeated.")
]
BisectLimit = Annotated[
    int | None,
    typer.Option("--bisect-limit", metavar="N", min=0, help="Stop after N passes have changed something."),
]
OnBadId = Annotated[
    BadIdPolicy,
    typer.Option(
        "--on-bad-id", help="An id outside its table: refuse it, read zeros (bags leave it out), clamp or hash it."
    ),
]
Precision = Annotated[
    Literal["fp32", "bf16", "fp16", "int8", "int4", "fp8", "auto"],
    typer.Option(help="At most this precision for tables and layers, wherever the budget allows."),
]
Budget = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LIMIT,…",
        help="What fewer bits may cost: max-error=0.02 (the default), topk-overlap@100=0.99, auc-drop=0.001 or "
        "ndcg-drop@10=0.005; the last two need labels.",
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Rows of real requests (.npz, .jsonl, .parquet), `label` among them or not; calibration() by default.",
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="A pass that fails its proof is an error, not rolled back.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what an earlier run wrote there.")]
Timing = Annotated[bool, typer.Option("--timing", help="Show what each pass cost, on stderr.")]
PrintAfter = Annotated[
    list[str] | None,
    typer.Option("--print-after", metavar="PASS", help="Print the graph after a pass, or after 'all', on stderr."),
]


def batch_sizes(text: str) -> tuple[int, ...]:
    """`1,64,1024` as numbers. Raises BadParameter, a usage error, for anything else."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of batch sizes such as 1,64,1024") from None
    if min(sizes) < 1:
        raise typer.BadParameter("a batch size is at least 1")
    return sizes


def limits(texts: Sequence[str] | None) -> tuple[str, ...]:
    """The limits of a budget, however they were given: by commas, or by several options. Raises BadParameter, a usage error,
    for an option that holds none: it would mean the default, unseen."""
    found: list[str] = []
    for text in texts or ():
        own = [part.strip() for part in text.split(",") if part.strip()]
        if not own:
            raise typer.BadParameter(f"{text!r} holds no limit such as max-error=0.02")
        found += own
    return tuple(found)


def given(ctx: typer.Context) -> dict[str, str]:
    """The flags that the command line has, as it has them, by the names of their parameters."""
    found = {}
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        if parameter.name and source is not None and source.name == "COMMANDLINE":
            off = parameter.secondary_opts if ctx.params[parameter.name] is False else []
            found[parameter.name] = max(off or parameter.opts, key=len)
    return found


def check_passes(names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse a pass that does not exist before any work is done."""
    from grc.errors import GrcError

    for name in names:
        if name not in known:
            raise GrcError(f"there is no pass {name}", f"the passes are {', '.join(known)}")


def check_engine(name: str, device: str) -> None:
    """Refuse an engine that does not exist before any work is done. On a GPU some are named after what is in the graph, such
    as inductor-small, and one that the graph does not offer is refused when that is known.
    """
    from grc.errors import LoweringError

    if name not in ENGINES and not (device == "cuda" and name.startswith("inductor-")):
        raise LoweringError(f"there is no engine {name}", f"choose auto or one of {', '.join(ENGINES[1:])}")


def engines(incomplete: str) -> list[str]:
    """What the shell completes --engine with."""
    return [name for name in ENGINES if name.startswith(incomplete)]
