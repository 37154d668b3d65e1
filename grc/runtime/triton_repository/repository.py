"""A repository on disk: which models it has, and which of them to call."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from grc.errors import ArtifactError

MARKER = "repository.json"
PREPROCESS, POSTPROCESS, ENSEMBLE = "preprocess_py", "postprocess_py", "ensemble_model"
RESERVED = (PREPROCESS, "embedding_service", "interaction_python", "gr_trt", POSTPROCESS, ENSEMBLE)
CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class Repository:
    """What `grc export-triton` wrote, by its own record of it."""

    path: Path
    record: dict[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Repository:
        """Raises ArtifactError for a folder that `grc export-triton` did not write."""
        file = Path(path) / MARKER
        if not file.is_file():
            raise ArtifactError(
                f"{path} is no Triton repository of grc: it has no {MARKER}", "write one with grc export-triton"
            )
        return cls(Path(path), json.loads(file.read_text()))

    @property
    def layout(self) -> str:
        return self.record["layout"]

    @property
    def entry(self) -> str:
        """The model that clients call."""
        return self.record["entry"]

    @cached_property
    def models(self) -> list[str]:
        """All models, in the order in which a request passes them; an ensemble comes last."""
        return self.record["models"]

    @cached_property
    def programs(self) -> list[str]:
        """Those that compute: the fused model, or the stages."""
        return self.record["programs"]

    @property
    def preprocesses(self) -> bool:
        return self.record["preprocesses"]

    @property
    def postprocesses(self) -> bool:
        return self.record["postprocesses"]

    @property
    def options(self) -> list[str]:
        """What a server must be told for this repository."""
        return self.record["options"]

    def place(self, model: str) -> Path:
        """The artifact of a model in the version that was exported."""
        return self.path / model / str(self.record["version"]) / "artifact.grc"


def server_options(configs: Collection[Any]) -> list[str]:
    """What a server must be told for models that are configured so."""
    cached = any(config.response_cache.enable for config in configs)
    limited = any(group.HasField("rate_limiter") for config in configs for group in config.instance_group)
    return [
        *([f"--cache-config=local,size={CACHE_BYTES}"] if cached else []),
        *(["--rate-limit=execution_count"] if limited else []),
    ]
