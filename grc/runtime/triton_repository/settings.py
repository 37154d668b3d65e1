"""Settings: how Triton schedules the models of a repository. Every field is also a flag of `grc export-triton`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Layout = Literal["fused", "stages"]
Backend = Literal["auto", "python", "onnxruntime"]
IMAGE = "nvcr.io/nvidia/tritonserver:25.05-py3"
LAYOUTS: tuple[Layout, ...] = ("fused", "stages")


@dataclass(frozen=True)
class Settings:
    """What the artifact does not say about its serving."""

    layout: Layout = "fused"
    """`fused` has one model; `stages` cuts it into embedding_service, interaction_python and gr_trt."""
    backend: Backend = "auto"
    """What runs the fused model: the Python backend with our runtime, or Triton's own for ONNX Runtime where that is enough.
    `auto` takes ONNX Runtime's where the server found on this host has it, or none is found."""
    name: str | None = None
    """Name of the fused model, taken as it is; the prefix and the artifact's own by default."""
    prefix: str = ""
    """Put before the names of all other models, so that repositories of several artifacts can be served by one server."""
    version: int = 1
    """Version folder to write."""
    keep_versions: int = 1
    """How many of the newest versions are served."""
    instances: int = 1
    """Processes that run each model; all map the same weights."""
    gpus: Sequence[int] = ()
    """GPUs that the models of an artifact for GPUs run on, `instances` on each; all that the server sees by default."""
    max_batch: int | None = None
    """Most rows that are merged into one call; the artifact's own limit by default."""
    max_delay_us: int = 0
    """How long a lone request may wait for others. 0 merges only what waits anyway."""
    max_queue: int = 0
    """Requests that may wait; more are refused with 503. 0: any number."""
    timeout_us: int = 0
    """How long a request may wait before it is refused with 503; a request may ask for less. 0: for ever, whatever it asks."""
    priorities: int = 0
    """Levels of priority, 1 the highest; a request without one gets the lowest. 0: first come, first served."""
    cache: bool = False
    """Keep answers by their exact inputs; the server needs --cache-config, which run_server.sh gives it."""
    warmup: bool = True
    """Answer a golden request at every batch size that has a part of its own, before the server is ready."""
    python: Path | None = None
    """A virtual environment for the models (EXECUTION_ENV_PATH); by default that of the first python on PATH."""
    overrides: Sequence[str] = ()
    """MODEL.FIELD=VALUE: fields of the models' config.pbtxt, under Triton's own names; `*` stands for every model."""
    image: str = IMAGE
    """The tritonserver image that the Dockerfile begins with."""
    storage: str | None = None
    """Where the repository will lie for KServe (`s3://…`, `pvc://…`): manifests are written for it."""
