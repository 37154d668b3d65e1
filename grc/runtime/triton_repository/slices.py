"""The artifacts inside a repository: the whole one, one stage of it, or its pre- and postprocessing alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grc.runtime.artifact import MANIFEST, Artifact, read_manifest, write_manifest
from grc.runtime.weights import write_weights

WEIGHTS = "weights.safetensors"


def copy_whole(artifact: Artifact, folder: Path) -> None:
    """The artifact as it is. Weights are linked where the file system allows it: then they take no space, and share their
    pages in memory, while a copy of the folder is still complete."""
    for name in (*artifact.manifest["files"], MANIFEST):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(artifact.path / name, target) if name == WEIGHTS else shutil.copyfile(artifact.path / name, target)


def forbid_merging(folder: Path) -> None:
    """Write into a copied artifact that its rows read each other."""
    write_manifest(folder, read_manifest(folder) | {"rows": False})


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def write_stage(artifact: Artifact, stage: Mapping[str, Any], folder: Path) -> Artifact:
    """One stage as an artifact of its own, with the weights that its parts read and no others."""
    parts = []
    for part in stage["parts"]:
        file = folder / "parts" / Path(part["file"]).name
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.path / "parts" / part["file"], file)
        parts.append({**part, "file": file.name})
    keys = sorted({ref["key"] for part in parts for ref in part["weights"].values()})
    write_weights(folder / WEIGHTS, {key: artifact.weights[key] for key in keys})
    names = [entry["name"] for entry in stage["inputs"]]
    leaves = [{"leaf": i} for i in range(len(names))]
    outputs = {entry["name"]: {"leaf": i} for i, entry in enumerate(stage["outputs"])}
    structure = {
        "inputs": {"tuple": [{"tuple": leaves}, {"dict": {}}]},
        "outputs": {"dict": outputs},
        "parameters": names,
    }
    own = ("inputs", "outputs", "ids", "segments", "choice", "measured", "rejected", "quality")
    kept = {key: stage[key] for key in own}
    return write(artifact, folder, {**kept, "name": stage["name"], "structure": structure, "parts": parts})


def write_processing(artifact: Artifact, folder: Path) -> Artifact:
    """`preprocess` and `postprocess` with their assets, and no weights."""
    shutil.copytree(artifact.path / "processing", folder / "processing", ignore=shutil.ignore_patterns("__pycache__"))
    return write(artifact, folder, {"parts": [], "choice": [], "processing": artifact.manifest["processing"]})


def write(artifact: Artifact, folder: Path, changes: dict[str, Any]) -> Artifact:
    kept = ("format", "grc", "name", "command", "target", "gpu", "inputs", "outputs", "structure", "batch", "ids")
    more = ("segments", "on_bad_id", "requires", "rows")
    manifest = {key: artifact.manifest[key] for key in (*kept, *more) if key in artifact.manifest}
    manifest |= {"processing": None, "passes": [], "layers": [], "quality": {}, "measured": [], "rejected": {}}
    write_manifest(folder, manifest | changes)
    return Artifact.open(folder)
