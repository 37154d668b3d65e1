"""The artifact: a folder with a manifest, weights and parts. Written whole or not at all; refused by name on a wrong host."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from grc.errors import ArtifactError
from grc.runtime.weights import read_weights

FORMAT = 6
MANIFEST = "manifest.json"
SMALL = 64 << 20  # bytes: files up to this size are hashed at load; larger ones by `grc check`
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what writing alone meets
ISA_ORDER = ("default", "avx2", "avx512")


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = False) -> Artifact:
        """Read and check an artifact. `verify` hashes every file, the weights too.

        Raises ArtifactError when a file is missing, truncated or altered, or when this host can't run it.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        artifact = cls(folder, manifest)
        artifact.check_files(verify)
        artifact.check_host()
        return artifact

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """All tensors, memory-mapped."""
        return read_weights(self.path / "weights.safetensors")

    @property
    def bytes(self) -> int:
        return sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())

    def check_files(self, verify: bool) -> None:
        for name, entry in self.manifest["files"].items():
            file = self.path / name
            if not file.is_file():
                raise ArtifactError(f"{self.path.name}/{name} is missing", "copy the artifact again, or rebuild it")
            size = file.stat().st_size
            if size != entry["bytes"]:
                raise ArtifactError(
                    f"{self.path.name}/{name} has {size} bytes, the manifest says {entry['bytes']}",
                    "copy the artifact again, or rebuild it",
                )
            if (verify or size <= SMALL) and sha256(file) != entry["sha256"]:
                raise ArtifactError(
                    f"{self.path.name}/{name} is damaged: its sha256 is not {entry['sha256'][:12]}…",
                    "copy the artifact again, or rebuild it",
                )

    def check_host(self) -> None:
        target = self.manifest["target"]
        rebuild = f"rebuild it here: {self.manifest['command']}"
        if target["device"] == "cuda":
            check_gpu(self.path.name, target, rebuild)
        here = torch.backends.cpu.get_cpu_capability().lower()
        here = here if here in ISA_ORDER else "default"
        if ISA_ORDER.index(target["isa"]) > ISA_ORDER.index(here):
            raise ArtifactError(f"{self.path.name} was built for {target['isa']}; this CPU has {here}", rebuild)
        version = torch.__version__.split("+")[0]
        if target["torch"].rpartition(".")[0] != version.rpartition(".")[0]:
            raise ArtifactError(
                f"{self.path.name} was built with torch {target['torch']}; this is torch {version}", rebuild
            )
        for operator, package in self.manifest["requires"].items():
            import_operator(self.path.name, operator, package)


def import_operator(name: str, operator: str, package: str | None) -> None:
    """A custom operator that an artifact calls must be registered before it is loaded."""
    if package:
        try:
            importlib.import_module(package)
        except ImportError:
            raise ArtifactError(
                f"{name} needs the operator {operator} of {package}", f"pip install {package}"
            ) from None
    if operator not in torch._C._dispatch_get_all_op_names():
        namespace = operator.split("::")[0]
        raise ArtifactError(
            f"{name} needs the operator {operator}, which is not loaded here",
            f"install a version of {package} that has it"
            if package
            else f"import the package that defines {namespace}:: before grc.load()",
        )


def check_gpu(name: str, target: dict[str, Any], rebuild: str) -> None:
    if not torch.cuda.is_available():
        raise ArtifactError(
            f"{name} was built for {target['sm']}; this host has no usable GPU", rebuild.replace("cuda", "cpu")
        )
    major, minor = torch.cuda.get_device_capability()
    if target["sm"] != f"sm_{major}{minor}":
        raise ArtifactError(f"{name} was built for {target['sm']}; this GPU is sm_{major}{minor}", rebuild)


def read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise ArtifactError(
            f"{folder} is no grc artifact: it has no {MANIFEST}", "build one with grc compile MODEL -o PATH"
        )
    try:
        manifest = json.loads(file.read_text())
        checksum = manifest.pop("checksum")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{folder.name}/{MANIFEST} can't be read: {error}", "copy the artifact again, or rebuild it"
        ) from error
    if digest(manifest) != checksum:
        raise ArtifactError(
            f"{folder.name}/{MANIFEST} is damaged: its checksum is not {checksum[:12]}…", "rebuild the artifact"
        )
    if manifest["format"] != FORMAT:
        raise ArtifactError(
            f"{folder.name} has format {manifest['format']}; this grc reads format {FORMAT}", "rebuild the artifact"
        )
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Hash every file of a finished folder and write the manifest last."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST)
    manifest["files"] = {str(f.relative_to(folder)): {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}
    manifest = json.loads(json.dumps(manifest))
    manifest["checksum"] = digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def writing(output: Path, force: bool, marker: str = MANIFEST, what: str = "grc artifact") -> Iterator[Path]:
    """A folder beside `output` that takes its name when the block ends well, and vanishes when it does not.

    Only a folder that holds `marker` is ever replaced. Raises ArtifactError when `output` exists and `force` is False, or
    can't be written; another error of the block is left as it is.
    """
    check_free(output, force, marker, what)
    partial = output.parent / f".{output.name}.{os.getpid()}.partial"
    try:
        make(partial, output)
        yield partial
        old = output.parent / f".{output.name}.{os.getpid()}.old"
        check_free(output, force, marker, what)  # another process may have been sooner
        if force and output.exists():
            output.rename(old)
        partial.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if not of_writing(error, partial, output):
            raise
        raise ArtifactError(
            f"can't write {output}: {error.strerror}", "free some space, or choose another -o"
        ) from error
    finally:  # also of a signal that comes as soon as the folder is there
        shutil.rmtree(partial, ignore_errors=True)


def of_writing(error: OSError, *places: Path) -> bool:
    """Whether what failed is writing into one of these places, and not the reading of some other file meanwhile."""
    if error.errno in FULL or not isinstance(error.filename, str):
        return error.errno in FULL
    file = Path(error.filename).absolute()
    return any(place.absolute() in (file, *file.parents) for place in places)


def check_free(output: Path, force: bool, marker: str, what: str) -> None:
    """Raises ArtifactError where there is something that may not be replaced."""
    if not output.exists():
        return
    if not force:
        raise ArtifactError(f"{output} exists", "choose another -o, or replace it with --force")
    if not (output / marker).exists():
        raise ArtifactError(f"{output} exists and is no {what}", f"choose another -o; --force replaces a {what} only")


def make(partial: Path, output: Path) -> None:
    """Raises ArtifactError where the folder can't be made."""
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        reason = f"{error.filename} is no folder" if isinstance(error, FileExistsError) else error.strerror
        raise ArtifactError(f"can't write {output}: {reason}", "choose another -o") from error
