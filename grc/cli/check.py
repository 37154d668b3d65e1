"""grc check: an artifact is whole, and every part of it still answers as the model did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from grc.cli import parameters as p
from grc.cli.errors import Traceback
from grc.cli.summary import put, put_json, table

if TYPE_CHECKING:
    from torch import Tensor

    from grc.precision.quality import Limit
    from grc.runtime.golden import Golden

NAME = "check"
EXAMPLES = ("grc check model.grc", "grc check model.grc --json")


def command(artifact: p.ArtifactPath, json: p.Json = False, traceback: Traceback = False) -> None:
    """Verify every checksum, then replay the golden requests through each part and through the chosen routing.

    Exit code 1 when a file is damaged, this host can't run the artifact, or an answer is off by more than 1e-4 of the
    largest answer. Where tables or layers are kept in fewer bits, quality is measured again on the calibration rows that
    the artifact carries, and held against its budget.
    """
    from grc import Artifact, Program
    from grc.errors import ArtifactError
    from grc.graph.oracle import within
    from grc.lowering.choose import QUALITY
    from grc.runtime.golden import read_golden

    opened = Artifact.open(artifact, verify=True)
    requests = read_golden(opened)
    rows: list[dict[str, Any]] = []
    recorded = opened.manifest["quality"]
    engines = [part["engine"] for part in opened.manifest["parts"]]
    for engine in [*engines, None]:
        error = replay(Program(opened, engine), requests)
        own = max(recorded[name] for name in ([engine] if engine else engines))
        rows.append({"part": engine or "routing", "error": error, "ok": within(error, own, QUALITY)})
    measured = remeasure(opened, engines)
    bad = [row for row in rows if not row["ok"]]
    if json:
        put_json(
            {
                "path": str(artifact),
                "files": len(opened.manifest["files"]),
                "requests": len(requests),
                "parts": rows,
                "budget": [str(limit) for limit in measured.limits],
                "calibrated": measured.parts,
                "calibration_rows": measured.rows,
            }
        )
    else:
        put(f"{artifact}: {len(opened.manifest['files'])} files as written, {len(requests)} golden requests replayed")
        for line in table([(r["part"], f"largest error {r['error']:.1e}", "ok" if r["ok"] else "WRONG") for r in rows]):
            put(line)
        for engine, values in measured.parts.items():
            held = [f"{limit.name} {values[limit.name]:.2g} of {limit.bound:g}" for limit in measured.limits]
            put(f"  {engine} on {measured.rows} of {measured.of} calibration rows: {', '.join(held)}")
    for engine, values in measured.parts.items():
        broken = [limit for limit in measured.limits if not limit.inside(values[limit.name])]
        if broken:
            raise ArtifactError(
                f"{artifact.name}: {engine} has {broken[0].name} {values[broken[0].name]:.2g}, outside of {broken[0]}",
                f"rebuild it here: {opened.manifest['command']}",
            )
    if bad:
        raise ArtifactError(
            f"{artifact.name}: {bad[0]['part']} answers {bad[0]['error']:.1e} away from the model",
            f"rebuild it here: {opened.manifest['command']}",
        )


@dataclass(frozen=True)
class Measured:
    """The budget, and the quality of each part on the calibration rows that the artifact carries, of so many in all."""

    limits: Sequence[Limit] = ()
    parts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    rows: int = 0
    of: int = 0


def remeasure(artifact: Any, engines: list[str]) -> Measured:
    """Nothing where no bits were saved."""
    import torch

    from grc import Program
    from grc.precision.quality import budget, read_kept, rows_of

    entry = artifact.manifest["precision"]
    if entry is None or all(site["format"] == "fp32" for site in entry["sites"]):
        return Measured()
    limits = budget(entry["budget"])
    batches, truth = read_kept(artifact.path / "calibration.safetensors")
    parts = {}
    with torch.no_grad():
        for engine in dict.fromkeys(engines):
            run = in_pieces(Program(artifact, engine))
            parts[engine] = truth.measure([list(run(list(batch))) for batch in batches], limits)
    sizes = [spec["sizes"] for spec in artifact.manifest["inputs"]]
    return Measured(limits, parts, sum(rows_of(batch, sizes) for batch in batches), entry["calibration"]["rows"])


def in_pieces(program: Any) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """The program for batches larger than it takes, where each input has the batch in one dimension at most."""
    from grc.runtime.plan import Plan

    manifest = program.artifact.manifest
    plan = Plan.of(manifest["inputs"], manifest["outputs"], (manifest["batch"]["max"],))
    if plan.reason is not None:
        return program.run_flat

    def run(inputs: list[Tensor]) -> Sequence[Tensor]:
        pieces = [program.run_flat(plan.cut(inputs, *piece)) for piece in plan.pieces(plan.batch(inputs))]
        return pieces[0] if len(pieces) == 1 else plan.joined(pieces)

    return run


def replay(program: Any, requests: list[Golden]) -> float:
    from grc.graph.oracle import largest_error

    return max((largest_error(list(program.run_flat(r.inputs)), r.outputs) for r in requests), default=0.0)
