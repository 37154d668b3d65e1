"""Sources: where a model's versions come from. Either one artifact, or a folder of versions: `model/1`, `model/2`, …"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from grc.errors import ArtifactError
from grc.runtime.artifact import MANIFEST, read_manifest
from grc.runtime.names import NAME

Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Found:
    """An artifact on disk. `stamp` tells a new one under the same name apart: it is written anew, never in place."""

    path: Path
    stamp: Stamp
    number: int | None


@dataclass(frozen=True)
class Source:
    """A model's name, and the folder that holds the artifact or its versions."""

    name: str
    path: Path
    versions: bool

    @classmethod
    def of(cls, text: str) -> Source:
        """From `PATH` or `NAME=PATH`. Without a name it is that of the artifact's model, or of the folder of versions.

        Raises ArtifactError where there is neither an artifact nor a version.
        """
        given, path = split(text)
        if (path / MANIFEST).is_file():
            source = cls(read_manifest(path)["name"] if given is None else given, path, versions=False)
        elif numbers(path):
            folder = path.resolve().name.removesuffix(".grc")
            source = cls(folder if given is None else given, path, versions=True)
        else:
            raise ArtifactError(
                f"{path} is neither an artifact nor a folder of versions",
                "build one with grc compile MODEL -o PATH; versions are artifacts named 1, 2, …",
            )
        if not NAME.fullmatch(source.name):
            raise ArtifactError(f"{source.name!r} can't be a model's name in a URL", f"name it: grc serve NAME={path}")
        return source

    def newest(self) -> Found | None:
        """The artifact that should be served now; None while it is being replaced."""
        number = max(numbers(self.path), default=None) if self.versions else None
        if self.versions and number is None:
            return None
        path = self.path / str(number) if self.versions else self.path
        try:
            stat = (path / MANIFEST).stat()
        except OSError:
            return None
        return Found(path, (stat.st_ino, stat.st_mtime_ns, stat.st_size), number)


def split(text: str) -> tuple[str | None, Path]:
    """The name before the first `=`, and the path. What is there as a whole, or has no name before the `=`, is a path."""
    given, equals, rest = text.partition("=")
    if not equals or Path(text).exists() or not (NAME.fullmatch(given) or Path(rest).exists()):
        return None, Path(text)
    return given, Path(rest)


def numbers(path: Path) -> list[int]:
    """The versions in a folder. One that is still being copied has no manifest: grc writes it last."""
    if not path.is_dir():
        return []
    return [int(f.name) for f in path.iterdir() if re.fullmatch(r"[1-9]\d{0,17}", f.name) and (f / MANIFEST).is_file()]


def sources(texts: list[str]) -> list[Source]:
    """Raises ArtifactError where two models have one name."""
    found: dict[str, Source] = {}
    for text in texts:
        source = Source.of(text)
        if source.name in found:
            raise ArtifactError(
                f"{found[source.name].path} and {source.path} are both named {source.name}",
                f"name one of them: grc serve OTHER={source.path}",
            )
        found[source.name] = source
    return list(found.values())
