"""Rows of the smaller benchmarks: where, when and how they were measured, and how they take the place of older ones."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grc.bench.host import versions

RESULTS = Path(__file__).resolve().parent / "results"


def place(machine: str, command: str, packages: Iterable[str] = ("torch", "triton")) -> dict[str, str]:
    """The fields that tell of the measurement itself. `packages` are those whose versions matter."""
    told = ", ".join(f"{name} {version}" for name, version in versions().items() if name in packages)
    return {"machine": machine, "versions": told, "date": datetime.date.today().isoformat(), "command": command}


def replace(rows: list[dict[str, Any]], file: Path, key: tuple[str, ...]) -> None:
    """Add rows to a file, in the place of those that have the same key."""
    new = {tuple(r.get(name) for name in key) for r in rows}
    old = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    staying = [r for r in old if tuple(r.get(name) for name in key) not in new]
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text("".join(json.dumps(r) + "\n" for r in [*staying, *rows]))
    partial.replace(file)
