"""What a version says of itself: metadata, and its configuration in the form of the protocol's extension."""

from __future__ import annotations

from typing import Any

import torch

from grc.runtime.server.datatypes import NAMES
from grc.runtime.server.version import Version
from grc.runtime.version import VERSION

EXTENSIONS = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]


def server_metadata() -> dict[str, Any]:
    return {"name": "grc", "version": VERSION, "extensions": EXTENSIONS}


def datatype(entry: dict[str, Any]) -> str:
    return NAMES[getattr(torch, entry["dtype"])]


def shape(entry: dict[str, Any]) -> list[int]:
    return [size if isinstance(size, int) else -1 for size in entry["sizes"]]


def tensors(version: Version) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Inputs and outputs: names, the manifest's entries."""
    outputs = [{**e, "name": n} for n, e in zip(version.output_names, version.manifest["outputs"], strict=True)]
    return version.inputs, outputs


def metadata(version: Version) -> dict[str, Any]:
    inputs, outputs = tensors(version)
    return {
        "name": version.name,
        "versions": [version.number],
        "platform": "grc",
        "inputs": [{"name": e["name"], "datatype": datatype(e), "shape": shape(e)} for e in inputs],
        "outputs": [{"name": e["name"], "datatype": datatype(e), "shape": shape(e)} for e in outputs],
    }


def config(version: Version) -> dict[str, Any]:
    """Sizes without the batch where every input and output begins with it; else no batch is promised."""
    inputs, outputs = tensors(version)
    rows = all(e["sizes"][:1] == ["batch"] for e in [*inputs, *outputs])

    def entry(e: dict[str, Any]) -> dict[str, Any]:
        code = datatype(e)
        return {"name": e["name"], "data_type": f"TYPE_{code}", "dims": shape(e)[1:] if rows else shape(e)}

    found: dict[str, Any] = {
        "name": version.name,
        "platform": "grc",
        "backend": "grc",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": version.max_rows if rows else 0,
        "input": [entry(e) for e in inputs],
        "output": [entry(e) for e in outputs],
        "model_transaction_policy": {"decoupled": False},
    }
    if rows and version.merge.reason is None:
        found["dynamic_batching"] = {}
    return found


def index(versions: list[Version], ready: dict[str, bool]) -> list[dict[str, str]]:
    return [
        {"name": v.name, "version": v.number, "state": "READY" if ready[v.name] else "UNAVAILABLE", "reason": ""}
        for v in versions
    ]
