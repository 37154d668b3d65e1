"""grc inspect: what an artifact holds, on any host, able to run it or not."""

from __future__ import annotations

from typing import Any

from grc.cli import parameters as p
from grc.cli.errors import Traceback
from grc.cli.summary import alone, name, place, put, put_json, table

NAME = "inspect"
EXAMPLES = ("grc inspect model.grc", "grc inspect model.grc --json | jq .layers")


def command(artifact: p.ArtifactPath, json: p.Json = False, traceback: Traceback = False) -> None:
    """Show an artifact: inputs and outputs, layers, fusions, engines with their times, quality, files."""
    from grc import Artifact, GrcError
    from grc.runtime.artifact import read_manifest

    manifest = read_manifest(artifact)
    opened = Artifact(artifact, manifest)
    refused = None
    try:
        opened.check_files(verify=False)
        opened.check_host()
    except GrcError as error:
        refused = error
    if json:
        put_json({"path": str(artifact), "bytes": opened.bytes, "refused": refused and refused.message, **manifest})
        return
    target = manifest["target"]
    put(
        f"{manifest['name']}: grc {manifest['grc']}, torch {target['torch']}, {target['device']} {target['isa']}, "
        f"{target['threads']} threads"
    )
    if refused is not None:
        put(f"this host can't run it: {refused.message}")
    for title, rows in sections(manifest):
        if rows:
            put()
            put(title)
            for line in table(rows):
                put(line)


def sections(manifest: dict[str, Any]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Every table of the manifest: a title and rows of text."""
    from grc.report.summary import changes, fused_on_gpu, rolled_back, size, summarise
    from grc.runtime.inputs import InputCheck

    check = InputCheck(manifest)
    batch = manifest["batch"]
    limits = f"batch {batch['min']} to {batch['max']}" if batch["dynamic"] else "fixed sizes"
    fused, missed = changes(manifest)
    summary = summarise(manifest)
    told = [*summary["notes"], *(summary["precision"] or {"notes": []})["notes"]]
    layers = manifest["layers"]
    total = sum(layer["bytes"] for layer in layers)
    flops = sum(layer["flops"] for layer in layers)
    return [
        (
            f"inputs: {limits}, bad ids: {manifest['on_bad_id']}",
            [(spec["name"], spec["dtype"], check.described(i)) for i, spec in enumerate(manifest["inputs"])],
        ),
        ("outputs", [(n, spec["dtype"], listed(spec["sizes"])) for n, spec in named_outputs(manifest)]),
        (
            "ids",
            [
                (manifest["inputs"][e["input"]]["name"], columns(e), f"{e['rows']} rows", e["table"])
                for e in manifest["ids"]
            ],
        ),
        (
            f"layers: {parameters(layers):,} parameters, {size(total)}, {flops:,} FLOPs a row",
            [
                (
                    x["name"],
                    x["kind"],
                    "x".join(map(str, x["shape"])),
                    size(x["bytes"]),
                    f"{x['flops']:,} FLOPs" if x["flops"] else "",
                )
                for x in layers
            ],
        ),
        (precision_title(manifest), precision_rows(manifest)),
        (
            "other parameters of 1 KB and more, kept as they are",
            [(other["name"], size(other["bytes"]), other["reason"]) for other in summary["others"]],
        ),
        ("fused", [(name(c), place(c), c["saves"]) for c in fused]),
        ("missed", [(name(c), place(c), c["missed"]) for c in missed]),
        ("rolled back", [(r["pass"], r["why"]) for r in rolled_back(manifest)]),
        ("engines: medians by batch, largest error against fp64", engine_rows(manifest)),
        ("fused ops, timed on the GPU that it was built on", fused_on_gpu(manifest)),
        ("notes", [(note,) for note in told]),
        ("files", [(file, size(entry["bytes"])) for file, entry in manifest["files"].items()]),
    ]


def precision_title(manifest: dict[str, Any]) -> str:
    found = manifest["precision"]
    if found is None:
        return ""
    quality = ", ".join(f"{name} {value:.2g}" for name, value in found["quality"].items())
    data = found["calibration"]
    return (
        f"precision: at most {found['asked']}; {quality}, of {', '.join(found['budget'])}; "
        f"{data['rows']} rows of {data['origin']}"
    )


def precision_rows(manifest: dict[str, Any]) -> list[tuple[str, ...]]:
    from grc.report.summary import size

    sites = [] if manifest["precision"] is None else manifest["precision"]["sites"]
    return [
        (
            site["name"],
            site["kind"],
            site["format"],
            f"{size(site['bytes'])} -> {size(site['lowered_bytes'])}",
            "" if site["loss"] is None else f"alone {alone(site)}",
            site["reason"] or "",
        )
        for site in sites
    ]


def parameters(layers: list[dict[str, Any]]) -> int:
    from math import prod

    return sum(prod(layer["shape"]) for layer in layers)


def columns(entry: dict[str, Any]) -> str:
    if entry["stop"] is None:
        return "all columns"
    return (
        f"column {entry['start']}"
        if entry["stop"] == entry["start"] + 1
        else f"columns {entry['start']}..{entry['stop'] - 1}"
    )


def listed(sizes: list[Any]) -> str:
    parts = [str(s) if not isinstance(s, dict) else f"{s['scale']}*batch+{s['offset']}" for s in sizes]
    return f"[{', '.join(parts)}]"


def named_outputs(manifest: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    from grc.runtime.structure import output_names

    return list(zip(output_names(manifest["structure"]["outputs"]), manifest["outputs"], strict=True))


def engine_rows(manifest: dict[str, Any]) -> list[tuple[str, ...]]:
    from grc.report.summary import batches, engine_at, medians, microseconds

    times, measured = medians(manifest), batches(manifest)
    engines = dict.fromkeys(engine for engine, _ in times)
    rows: list[tuple[str, ...]] = [("", *(f"batch {b}" for b in measured), "error")]
    for engine in engines:
        marks = [
            microseconds(times[engine, b]) + ("*" if engine_at(manifest, b) == engine else "")
            if (engine, b) in times
            else ""
            for b in measured
        ]
        error = manifest["quality"].get(engine)
        rows.append((engine, *marks, "" if error is None else f"{error:.1e}"))
    rows += [
        (engine, *("" for _ in measured), f"left out: {reason}") for engine, reason in manifest["rejected"].items()
    ]
    return rows
