"""The files beside the models: run_server.sh, a Dockerfile, a compose file, and manifests for KServe."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from grc.runtime.triton_repository.repository import Repository

TEMPLATES = Path(__file__).parent / "deploy"
TORCH = "https://download.pytorch.org/whl"
PYPI = "https://pypi.org/simple"  # whose torch is built for one CUDA
PACKAGES = ("numpy", "safetensors")
KSERVE = "kserve.yaml"


def write(repository: Repository, configs: Sequence[Any]) -> None:
    """Fill the templates for one repository and its models' configurations. The shell script is made executable."""
    folder, words = repository.path, values(repository, configs)
    for template in sorted(TEMPLATES.iterdir()):
        if template.name == KSERVE and not words["storage"]:
            continue
        text = string.Template(template.read_text()).substitute(words)
        (folder / template.name).write_text(text)
    (folder / "run_server.sh").chmod(0o755)


def values(repository: Repository, configs: Sequence[Any]) -> dict[str, str]:
    record, options = repository.record, repository.options
    target = record["target"]
    groups = [group for config in configs for group in config.instance_group]
    # A container counts its GPUs from 0; without a list, models run on all that it has.
    gpus = max((gpu + 1 for group in groups for gpu in group.gpus), default=1) if target["device"] == "cuda" else 0
    name = "".join(c if c.isalnum() else "-" for c in record["artifact"].lower()).strip("-") or "model"
    return {
        "name": name,
        "entry": record["entry"],
        "image": record["settings"]["image"],
        "packages": " ".join(pinned(package) for package in (*PACKAGES, *needed(record))),
        "torch": target["torch"],
        "index": index(target),
        "options": "".join(f" \\\n  {option}" for option in options),
        "arguments": "".join(f"\n        - {option}" for option in options),
        "memory": f"{memory(repository, sum(group.count * max(1, len(group.gpus)) for group in groups))}Gi",
        "storage": record["settings"]["storage"] or "",
        "gpu_limit": f'\n          nvidia.com/gpu: "{gpus}"' if gpus else "",
        "compose_gpu": COMPOSE_GPU.format(gpus=gpus) if gpus else "",
    }


def index(target: Mapping[str, Any]) -> str:
    """Where the torch of an artifact is found: the build for its CUDA, or where it does not say which, for this host's."""
    if target["device"] == "cpu":
        return f"{TORCH}/cpu"
    cuda = target.get("cuda") or torch.version.cuda
    return f"{TORCH}/cu{cuda.replace('.', '')}" if cuda else PYPI


def memory(repository: Repository, processes: int) -> int:
    """GiB for one server: the weights once, and half a GiB for each process with torch and for the server itself."""
    weights = sum(file.stat().st_size for file in repository.path.glob("*/*/**/weights.safetensors"))
    return math.ceil(weights / 2**30 + (processes + 1) / 2)


COMPOSE_GPU = """
    deploy:
      resources:
        reservations:
          devices:
            - driver: nvidia
              count: {gpus}
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
