"""grc check: an artifact is whole, and every part of it still answers as the model did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grc.cli import parameters as p
from grc.cli.errors import Traceback
from grc.cli.summary import put, put_json, table

if TYPE_CHECKING:
    from grc.runtime.golden import Golden

NAME = "check"
EXAMPLES = ("grc check model.grc", "grc check model.grc --json")


def command(artifact: p.ArtifactPath, json: p.Json = False, traceback: Traceback = False) -> None:
    """Verify every checksum, then replay the golden requests through each part and through the chosen routing.

    Exit code 1 when a file is damaged, this host can't run the artifact, or an answer is off by more than 1e-4 of the
    largest answer.
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
    bad = [row for row in rows if not row["ok"]]
    if json:
        put_json(
            {"path": str(artifact), "files": len(opened.manifest["files"]), "requests": len(requests), "parts": rows}
        )
    else:
        put(f"{artifact}: {len(opened.manifest['files'])} files as written, {len(requests)} golden requests replayed")
        for line in table([(r["part"], f"largest error {r['error']:.1e}", "ok" if r["ok"] else "WRONG") for r in rows]):
            put(line)
    if bad:
        raise ArtifactError(
            f"{artifact.name}: {bad[0]['part']} answers {bad[0]['error']:.1e} away from the model",
            f"rebuild it here: {opened.manifest['command']}",
        )


def replay(program: Any, requests: list[Golden]) -> float:
    from grc.graph.oracle import largest_error

    return max((largest_error(list(program.run_flat(r.inputs)), r.outputs) for r in requests), default=0.0)
