"""A new version of a model in a repository that is being served: moved in complete, and called only when all of it is there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from grc.errors import ArtifactError
from grc.runtime.triton_repository import config
from grc.runtime.triton_repository.export import export
from grc.runtime.triton_repository.repository import MARKER, Repository
from grc.runtime.triton_repository.settings import Settings

SAME = ("input", "output", "max_batch_size", "backend", "platform")


def add_version(
    artifact_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    version: int | None = None,
    *,
    before_done: Callable[[Repository], Any] | None = None,
) -> Repository:
    """Export an artifact as the next version of a repository, with the settings that the repository was exported with.

    `before_done` sees the new version as a repository of its own; what it raises leaves the old one as it was. Version
    folders are renamed into place, the programs' first. An ensemble names the versions of its steps, so its configuration,
    which is replaced last, sends requests from all old steps to all new ones at once.

    Raises ArtifactError where `output` is no repository, has that version, or serves other tensors.
    """
    served = Repository.open(output)
    number = version or served.record["version"] + 1
    if any((served.path / model / str(number)).exists() for model in served.models):
        raise ArtifactError(f"{output} has version {number}", "leave out --version, or name a higher one")
    settings = replace(recorded(served), version=number)
    with tempfile.TemporaryDirectory(dir=served.path.parent, prefix=f".{served.path.name}.") as work:
        made = export(artifact_path, Path(work) / served.path.name, settings)
        refuse_other_tensors(served, made)
        keep_configurations(served, made)
        if before_done:
            before_done(made)
        for model in made.models:
            (made.path / model / str(number)).rename(served.path / model / str(number))
        if len(made.models) > 1:
            os.replace(made.path / made.entry / "config.pbtxt", served.path / made.entry / "config.pbtxt")
        os.replace(made.path / MARKER, served.path / MARKER)
    drop_old(served, settings)
    return Repository.open(output)


def recorded(served: Repository) -> Settings:
    kept = served.record["settings"]
    name = served.programs[0] if kept["layout"] == "fused" else None
    return Settings(**{**kept, "name": name, "python": kept["python"] and Path(kept["python"])})


def refuse_other_tensors(served: Repository, made: Repository) -> None:
    if made.models != served.models:
        raise ArtifactError(
            f"{served.path} has the models {', '.join(served.models)}; the new version has {', '.join(made.models)}",
            "export it to a repository of its own",
        )
    for model in made.models:
        old, new = (config.read(repository.path / model / "config.pbtxt") for repository in (served, made))
        for field in SAME:
            if list_of(old, field) != list_of(new, field):
                raise ArtifactError(
                    f"the new version of {model} differs from the one in {served.path} in {field}",
                    "export it to a repository of its own",
                )


def keep_configurations(served: Repository, made: Repository) -> None:
    """The new version is served, and proven, as the models are configured: a model with a new configuration would be loaded
    anew in all its versions. So its warm-ups are the old ones, which it must answer."""
    for model in served.models[:-1] or served.models:
        shutil.copyfile(served.path / model / "config.pbtxt", made.path / model / "config.pbtxt")
        shutil.rmtree(made.path / model / "warmup", ignore_errors=True)
        if (served.path / model / "warmup").exists():
            shutil.copytree(served.path / model / "warmup", made.path / model / "warmup")


def list_of(found: Any, field: str) -> Any:
    value = getattr(found, field)
    return value if isinstance(value, (int, str)) else [str(entry) for entry in value]


def drop_old(served: Repository, settings: Settings) -> None:
    """Delete versions that are no longer served: all but the newest, the one before them that requests may still be in, and
    those that --set keeps.
    """
    for model in served.models:
        policy = config.read(served.path / model / "config.pbtxt").version_policy
        newest = max(settings.keep_versions + 1, policy.latest.num_versions)
        numbers = sorted(int(entry.name) for entry in (served.path / model).iterdir() if entry.name.isdigit())
        for number in numbers[:-newest]:
            if not policy.HasField("all") and number not in policy.specific.versions:
                shutil.rmtree(served.path / model / str(number))
