"""The files beside the models: run_server.sh, a Dockerfile, a compose file, and manifests for KServe."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from grc.runtime.triton_repository.repository import Repository

TEMPLATES = Path(__file__).parent / "deploy"
IMAGE = "nvcr.io/nvidia/tritonserver:25.05-py3"
PACKAGES = ("numpy", "safetensors")
KSERVE = "kserve.yaml"


def write(repository: Repository, options: list[str]) -> None:
    """Fill the templates for one repository. The shell script is made executable."""
    folder, words = repository.path, values(repository, options)
    for template in sorted(TEMPLATES.iterdir()):
        if template.name == KSERVE and not words["storage"]:
            continue
        text = string.Template(template.read_text()).substitute(words)
        (folder / template.name).write_text(text)
    (folder / "run_server.sh").chmod(0o755)


def values(repository: Repository, options: list[str]) -> dict[str, str]:
    record = repository.record
    target = record["target"]
    gpu = target["device"] == "cuda"
    name = "".join(c if c.isalnum() else "-" for c in record["artifact"].lower()).strip("-") or "model"
    return {
        "name": name,
        "entry": record["entry"],
        "image": IMAGE,
        "packages": " ".join(pinned(package) for package in (*PACKAGES, *needed(record))),
        "torch": target["torch"],
        "index": "https://download.pytorch.org/whl/" + ("cu128" if gpu else "cpu"),
        "options": "".join(f" \\\n  {option}" for option in options),
        "arguments": "".join(f"\n        - {option}" for option in options),
        "memory": f"{memory(repository)}Gi",
        "storage": record["settings"]["storage"] or "",
        "gpu_limit": '\n          nvidia.com/gpu: "1"' if gpu else "",
        "compose_gpu": COMPOSE_GPU if gpu else "",
    }


def memory(repository: Repository) -> int:
    """GiB for one server: the weights once, and half a GiB for each process with torch and for the server itself."""
    weights = sum(file.stat().st_size for file in repository.path.glob("*/*/**/weights.safetensors"))
    processes = len(repository.models) * repository.record["settings"]["instances"]
    return math.ceil(weights / 2**30 + (processes + 1) / 2)


COMPOSE_GPU = """
    deploy:
      resources:
        reservations:
          devices:
            - driver: nvidia
              count: 1
              capabilities: [gpu]"""


def needed(record: Mapping[str, Any]) -> list[str]:
    """What the artifact needs beside torch: the engine that won, and packages whose operators it calls."""
    return [
        *(["onnxruntime"] if any(e.startswith("onnxruntime") for e in record["engines"]) else []),
        *record["requires"],
    ]


def pinned(package: str) -> str:
    """As it is here, where the artifact was proven."""
    try:
        return f"{package}=={version(package)}"
    except PackageNotFoundError:
        return package
