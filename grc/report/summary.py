"""The summary of a manifest: what fused, what missed, what was rolled back, how fast, how exact, what to try next."""

from __future__ import annotations

import bisect
import shlex
from itertools import pairwise
from typing import Any

MODEL = "model"  # the model itself, run eagerly
PLAIN = "aoti"  # plain AOTInductor on the graph as it was captured


def summarise(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest in what a person or a script asks of it first. Times are medians in microseconds."""
    fused, missed = changes(manifest)
    return {
        "name": manifest["name"],
        "stages": manifest.get("stages", []),
        "notes": [*manifest["capture"]["notes"], *filter(None, [manifest["crowded"]]), *part_notes(manifest)],
        "fused": fused,
        "missed": missed,
        "rolled_back": rolled_back(manifest),
        "rejected": manifest["rejected"],
        "engines": winners(manifest),
        "speed": speed(manifest),
        "error": max((manifest["quality"][p["engine"]] for p in manifest["parts"]), default=0.0),
        "precision": precision(manifest),
        "others": [] if manifest["precision"] is None else manifest["precision"]["others"],
        "times": measured_times(manifest),
        "next": next_steps(manifest, missed),
    }


def part_notes(manifest: dict[str, Any]) -> list[str]:
    """What is told of engines that were kept: that one runs without CUDA graphs, say, and why."""
    return [f"{part['engine']} {note}" for part in manifest["parts"] for note in part["notes"]]


def precision(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """What is kept in fewer bits, what stayed higher than it could be and why; None where no bits were to be saved."""
    found = manifest["precision"]
    if found is None:
        return None
    sites = found["sites"]
    lowest = [site for site in sites if site["format"] == site["smallest"]]
    return {
        "asked": found["asked"],
        "budget": found["budget"],
        "quality": found["quality"],
        "calibration": found["calibration"],
        "notes": found["notes"],
        "bytes": sum(site["bytes"] for site in sites),
        "lowered_bytes": sum(site["lowered_bytes"] for site in sites),
        "lowered": len(lowest),
        "higher": [site for site in sites if site not in lowest],
        "sites": sites,
        "frontier": distinct(found["frontier"]),
    }


def distinct(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points of a frontier, of those that are alike the one that was chosen, or else the first."""
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for point in sorted(points, key=lambda point: not point["chosen"]):
        kept.setdefault((point["bytes"], point["work"], *point["quality"].values()), point)
    return [point for point in points if any(point is own for own in kept.values())]


def measured_times(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Medians in microseconds by batch of each engine, of the model itself too, and which batches the engine answers."""
    times, measured = medians(manifest), batches(manifest)
    engines = dict.fromkeys(engine for engine, _ in times)
    return [
        {
            "engine": engine,
            "answers": [batch for batch in measured if engine_at(manifest, batch) == engine],
            "p50_us": {batch: times[engine, batch] for batch in measured if (engine, batch) in times},
        }
        for engine in engines
    ]


def changes(manifest: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What fused and what missed, each with its place in the user's source; what happens twice there is counted."""
    fused: dict[tuple[str, ...], dict[str, Any]] = {}
    missed: dict[tuple[str, ...], dict[str, Any]] = {}
    for record in manifest["passes"]:
        for change in record["changes"]:
            made = change["missed"] is None
            if not change["where"] or (made and record["rolled_back"]):
                continue
            key = (change["what"], change["where"], change["missed"] or change["saves"])
            found = (fused if made else missed).setdefault(key, {**change, "count": 0})
            found["count"] += 1
    return list(fused.values()), list(missed.values())


def rolled_back(manifest: dict[str, Any]) -> list[dict[str, str]]:
    return [{"pass": r["name"], "why": r["rolled_back"]} for r in manifest["passes"] if r["rolled_back"]]


def medians(manifest: dict[str, Any]) -> dict[tuple[str, int], float]:
    """Measured medians in microseconds by engine and batch."""
    return {(row["engine"], row["batch"]): row["p50_us"] for row in manifest["measured"]}


def batches(manifest: dict[str, Any]) -> list[int]:
    return sorted({row["batch"] for row in manifest["measured"]})


def engine_at(manifest: dict[str, Any], batch: int) -> str:
    """The engine that answers a batch of this size."""
    limits = [entry["up_to"] for entry in manifest["choice"]]
    return manifest["parts"][manifest["choice"][bisect.bisect_left(limits, batch)]["part"]]["engine"]


def winners(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    times = medians(manifest)
    rows = ((batch, engine_at(manifest, batch)) for batch in batches(manifest))
    return [{"batch": batch, "engine": engine, "p50_us": times[engine, batch]} for batch, engine in rows]


def speed(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """How many times faster than the eager model and than plain AOTInductor, at the middle measured batch; None where nothing
    was measured, or other programs had a part in it."""
    measured = batches(manifest)
    if not measured or manifest["crowded"]:
        return None
    batch = measured[len(measured) // 2]
    times = medians(manifest)
    own = times[engine_at(manifest, batch), batch]
    ratios = {
        name: round(times[peer, batch] / own, 2)
        for name, peer in (("eager", MODEL), ("aotinductor", PLAIN))
        if (peer, batch) in times
    }
    return {"batch": batch, **ratios}


SHARED = ("--on-bad-id", "--disable")  # flags of `grc compile` that `grc explain` and `grc opt` take too


def fused_on_gpu(manifest: dict[str, Any]) -> list[tuple[str, ...]]:
    """Each fused op of a GPU's graph at each batch: its time, what it moves, and its bandwidth beside that of a copy."""
    return [
        (
            f"{row['op']} {row['dtype']}",
            row["node"],
            f"batch {row['batch']}",
            f"{row['us']:.1f} us",
            size(row["bytes"]),
            f"{row['bytes'] / row['us'] / 1e3:.0f} GB/s",
            f"{row['of_copy']:.0%} of a copy's",
            f"tile {', '.join(map(str, row['tile']))}" if row["tile"] else "",
        )
        for row in manifest.get("kernels", {}).get("fused", [])
    ]


def next_steps(manifest: dict[str, Any], missed: list[dict[str, Any]]) -> list[str]:
    """Commands that are worth a try after this compilation, the most useful first."""
    model, *flags = shlex.split(manifest["command"].removeprefix("grc compile "))
    shared = [word for pair in pairwise(flags) if pair[0] in SHARED for word in pair]
    model = shlex.join([model, *shared])
    steps = [f"grc opt {model} --passes {r['pass']} --print-after all" for r in rolled_back(manifest)]
    if missed:
        steps.append(f"grc explain {model}")
    return steps


def microseconds(value: float) -> str:
    """`63 us`, `2.8 ms`, `1.20 s`."""
    if value < 1e3:
        return f"{value:.0f} us"
    return f"{value / 1e3:.1f} ms" if value < 1e6 else f"{value / 1e6:.2f} s"


def size(count: float) -> str:
    """`312 B`, `4.5 KB`, `668 MB`: powers of 1000, three digits."""
    units = ["B", "KB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    unit = units[0]
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
