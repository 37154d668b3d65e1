"""The files beside the models: run_server.sh, a Dockerfile, a compose file, and manifests for KServe."""

from __future__ import annotations

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
    folder, words = repository.path, values(repository.record, options)
    for template in sorted(TEMPLATES.iterdir()):
        if template.name == KSERVE and not words["storage"]:
            continue
        text = string.Template(template.read_text()).substitute(words)
        (folder / template.name).write_text(text)
    (folder / "run_server.sh").chmod(0o755)


def values(record: Mapping[str, Any], options: list[str]) -> dict[str, str]:
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
        "storage": record["settings"]["storage"] or "",
        "gpu_limit": '\n          nvidia.com/gpu: "1"' if gpu else "",
        "compose_gpu": COMPOSE_GPU if gpu else "",
    }


COMPOSE_GPU = """
    deploy:
      resources:
        reservations:
          devices:
            - driver: nvidia
              count: 1
              capabilities: [gpu]"""


def needed(record: Mapping[str, Any]) -> list[str]:
    return ["onnxruntime"] if "onnxruntime" in record["engines"] else []


def pinned(package: str) -> str:
    """As it is here, where the artifact was proven."""
    try:
        return f"{package}=={version(package)}"
    except PackageNotFoundError:
        return package
