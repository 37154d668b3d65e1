"""export: an artifact becomes a Triton model repository, written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grc.errors import ArtifactError
from grc.runtime.artifact import Artifact, writing
from grc.runtime.golden import read_golden
from grc.runtime.program import load
from grc.runtime.triton_repository import config, deploy, slices
from grc.runtime.triton_repository.settings import Settings
from grc.runtime.triton_repository.tensors import Interface, interface
from grc.runtime.triton_repository.warmup import Tensors, through, warmups

MARKER = "repository.json"
STAGES = ("embedding_service", "interaction_python", "gr_trt")
ENSEMBLE, PREPROCESS, POSTPROCESS = "ensemble_model", "preprocess_py", "postprocess_py"
CACHE_BYTES = 256 << 20
VENDORED = ("__init__.py", "errors.py", "options.py", "runtime")
UNUSED = ("__pycache__", "server", "deploy", "models")


@dataclass(frozen=True)
class Repository:
    """A repository on disk: its models in the order in which a request passes them, and which of them to call."""

    path: Path
    layout: str
    entry: str
    models: list[str]
    artifact: str
    version: int
    record: dict[str, Any] = field(repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Repository:
        """Raises ArtifactError for a folder that `grc export-triton` did not write."""
        file = Path(path) / MARKER
        if not file.is_file():
            raise ArtifactError(
                f"{path} is no Triton repository of grc: it has no {MARKER}", "write one with grc export-triton"
            )
        record = json.loads(file.read_text())
        kept = {key: record[key] for key in ("layout", "entry", "models", "artifact", "version")}
        return cls(Path(path), record=record, **kept)


def server_options(repository: Repository) -> list[str]:
    """What the server must be told for this repository."""
    return [f"--cache-config=local,size={CACHE_BYTES}"] if repository.record["settings"]["cache"] else []


def export(
    artifact_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    force: bool = False,
    before_done: Callable[[Repository], Any] | None = None,
) -> Repository:
    """Write `output`. `before_done` sees the finished folder under its temporary name; what it raises leaves nothing behind.

    Raises ArtifactError where `output` exists, the artifact is damaged or of another target, or has no stages.
    """
    settings = settings or Settings()
    artifact = Artifact.open(artifact_path)
    config.messages()
    with writing(Path(output), force, MARKER, "Triton repository") as folder:
        made = Exporter(artifact, folder, settings).run()
        if before_done:
            before_done(made)
    return Repository.open(output)


class Exporter:
    """One export: the models are written in the order of a request, and the ensemble that joins them last."""

    def __init__(self, artifact: Artifact, folder: Path, settings: Settings):
        self.artifact = artifact
        self.folder = folder
        self.settings = settings
        self.interface = interface(artifact.manifest, settings.max_batch)
        self.golden = read_golden(artifact)
        self.functions = artifact.manifest["processing"] or {}
        self.steps: list[config.Step] = []
        self.engines: set[str] = set()

    def run(self) -> Repository:
        self.processed = "preprocess" in self.functions
        if self.processed:
            self.preprocess()
        if self.settings.layout == "stages":
            self.stages()
        else:
            self.fused()
        if self.processed and "postprocess" in self.functions:
            self.postprocess()
        models = [step.model for step in self.steps]
        if len(models) > 1:
            self.ensemble()
            models.append(ENSEMBLE)
        record = {
            "layout": self.settings.layout,
            "entry": models[-1],
            "models": models,
            "version": self.settings.version,
            "artifact": self.artifact.manifest["name"],
            "grc": self.artifact.manifest["grc"],
            "target": self.artifact.manifest["target"],
            "engines": sorted(self.engines),
            "settings": asdict(self.settings),
        }
        (self.folder / MARKER).write_text(json.dumps(record, indent=1, default=str))
        repository = Repository.open(self.folder)
        deploy.write(self.folder, repository.record, server_options(repository))
        return repository

    # The models

    def fused(self) -> None:
        manifest = self.artifact.manifest
        name = self.settings.name or re.sub(r"[^\w.-]", "_", manifest["name"])
        if name in (*STAGES, ENSEMBLE, PREPROCESS, POSTPROCESS):
            raise ArtifactError(f"the fused model can't be called {name}", "name it with --name")
        slices.copy_whole(self.artifact, self.place(name))
        self.program(name, manifest, self.interface, self.golden[0].inputs)
        self.step(name, self.interface)

    def stages(self) -> None:
        entries = self.artifact.manifest.get("cut")
        if not entries:
            raise ArtifactError(
                f"{self.artifact.path.name} carries no stages",
                f"rebuild it: {self.artifact.manifest['command']} --stages; or export with --layout fused",
            )
        if not self.interface.merges:
            raise ArtifactError(f"{self.artifact.path.name} has no batch to cut by", "export with --layout fused")
        for entry in entries:
            slices.write_stage(self.artifact, entry, self.place(entry["name"]))
        programs = [load(self.place(entry["name"])) for entry in entries]
        names = [entry.name for entry in self.interface.inputs]
        for stage, taken in zip(programs, through(programs, names, self.golden[0].inputs), strict=True):
            manifest = stage.artifact.manifest
            shapes = interface(manifest, self.settings.max_batch)
            self.program(manifest["name"], manifest, shapes, taken)
            self.step(manifest["name"], shapes)

    def program(self, name: str, manifest: dict[str, Any], shapes: Interface, request: Tensors) -> None:
        self.python(name, "program")
        self.engines |= {part["engine"] for part in manifest["parts"]}
        found = warmups(self.folder / name / "warmup", manifest, shapes, request) if self.settings.warmup else []
        device = manifest["target"]["device"]
        self.configure(name, config.program(name, shapes, self.settings, device, found))

    def preprocess(self) -> None:
        slices.write_processing(self.artifact, self.place(PREPROCESS))
        self.python(PREPROCESS, "preprocess")
        made = config.ports(self.interface.inputs, batched=False)
        self.configure(PREPROCESS, config.python_model(PREPROCESS, [config.REQUEST], made, self.settings))
        self.steps.append(
            config.Step(PREPROCESS, {"request": "request"}, {port.name: self.between(port.name) for port in made})
        )

    def postprocess(self) -> None:
        slices.write_processing(self.artifact, self.place(POSTPROCESS))
        self.python(POSTPROCESS, "postprocess")
        taken = [config.REQUEST, *config.ports(self.interface.outputs, batched=False)]
        self.configure(POSTPROCESS, config.python_model(POSTPROCESS, taken, [config.ANSWER], self.settings))
        reads = {"request": "request", **{entry.name: entry.name for entry in self.interface.outputs}}
        self.steps.append(config.Step(POSTPROCESS, reads, {"answer": "answer"}))

    def ensemble(self) -> None:
        batched = self.interface.merges and not self.processed
        inputs = [config.REQUEST] if self.processed else config.ports(self.interface.inputs, batched=batched)
        outputs = config.ports(self.interface.outputs, batched=batched)
        if self.steps[-1].model == POSTPROCESS:
            # The answer alone: Triton drops a step whose outputs no caller asked for, though a later step reads them.
            outputs = [config.ANSWER]
        self.version(ENSEMBLE).mkdir(parents=True)
        built = config.ensemble(
            ENSEMBLE, inputs, outputs, self.steps, self.settings, self.interface.max_batch if batched else 0
        )
        self.configure(ENSEMBLE, built)

    # What they are made of

    def step(self, name: str, shapes: Interface) -> None:
        """A program between what the ensemble is given and what it answers; all else is named after where it came from."""
        self.steps.append(
            config.Step(
                name,
                {entry.name: self.between(entry.name) for entry in shapes.inputs},
                {entry.name: self.between(entry.name) for entry in shapes.outputs},
            )
        )

    def between(self, name: str) -> str:
        """The ensemble's name for a tensor: its own at the ends, so that callers find what the model's signature says."""
        given = {entry.name for entry in self.interface.inputs}
        return f"{PREPROCESS}/{name}" if self.processed and name in given else name

    def version(self, model: str) -> Path:
        return self.folder / model / str(self.settings.version)

    def place(self, model: str) -> Path:
        folder = self.version(model) / "artifact.grc"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def python(self, model: str, kind: str) -> None:
        """model.py, and the runtime that it imports: a model folder needs nothing of its neighbours."""
        root = Path(__file__).parent / "models"
        shutil.copyfile(root / f"{kind}.py", self.version(model) / "model.py")
        vendor(self.version(model) / "grc")

    def configure(self, model: str, built: config.Config) -> None:
        (self.folder / model / "config.pbtxt").write_text(config.text(built))


def vendor(target: Path) -> None:
    """Copy what a serving host needs of grc: the runtime, with what it imports."""
    source = Path(__file__).parents[2]
    target.mkdir()
    for name in VENDORED:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns(*UNUSED))
        else:
            shutil.copyfile(source / name, target / name)
