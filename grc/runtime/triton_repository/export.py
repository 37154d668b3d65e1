"""export: an artifact becomes a Triton model repository, written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from grc.errors import ArtifactError
from grc.runtime.artifact import Artifact, writing
from grc.runtime.golden import read_golden
from grc.runtime.names import NAME, RULE
from grc.runtime.program import load
from grc.runtime.triton_repository import config, deploy, onnx_model, slices
from grc.runtime.triton_repository.override import override
from grc.runtime.triton_repository.repository import (
    ENSEMBLE,
    MARKER,
    POSTPROCESS,
    PREPROCESS,
    RESERVED,
    Repository,
    server_options,
)
from grc.runtime.triton_repository.rows import independent
from grc.runtime.triton_repository.settings import Settings
from grc.runtime.triton_repository.tensors import Interface, interface
from grc.runtime.triton_repository.warmup import Tensors, example, through, warmups, whole

VENDORED = ("__init__.py", "errors.py", "options.py", "runtime")
UNUSED = ("__pycache__", "server", "deploy", "models")


def export(
    artifact_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    force: bool = False,
    before_done: Callable[[Repository], Any] | None = None,
    **changes: Any,
) -> Repository:
    """Write a repository; `changes` are fields of Settings: `export("model.grc", "repo", layout="stages")`.

    `before_done` sees the finished folder under its temporary name; what it raises leaves nothing behind. Raises
    ArtifactError where `output` exists, the artifact is damaged or of another target, or carries no stages, or where a
    model can't be called what `settings` say.
    """
    config.messages()
    artifact = Artifact.open(artifact_path)
    settings = replace(settings or Settings(), **changes)
    check_names(artifact.manifest, settings)
    with writing(Path(output), force, MARKER, "Triton repository") as folder:
        made = Exporter(artifact, folder, settings).run()
        if before_done:
            before_done(made)
    return Repository.open(output)


def check_names(manifest: dict[str, Any], settings: Settings) -> None:
    """Raises ArtifactError for a name that would be no folder of the repository, or that is taken by a stage."""
    fused = [fused_name(manifest, settings)] if settings.layout == "fused" else []
    roles = [f"{settings.prefix}{role}" for role in RESERVED]
    for name in (*fused, *roles):
        if not NAME.fullmatch(name):
            raise ArtifactError(f"{name!r} can't be a model's name", f"let --prefix and --name make {RULE}")
        if name in roles and name in fused:
            raise ArtifactError(f"the fused model can't be called {name}", "name it with --name")


def fused_name(manifest: dict[str, Any], settings: Settings) -> str:
    """The fused model's name: the one that was given, or the artifact's as far as Triton takes it, behind the prefix."""
    return settings.name or settings.prefix + re.sub(r"[^A-Za-z0-9._-]", "_", manifest["name"])


class Exporter:
    """One export: the models are written in the order of a request, and the ensemble that joins them last."""

    def __init__(self, artifact: Artifact, folder: Path, settings: Settings):
        self.folder = folder
        self.settings = settings
        self.golden = read_golden(artifact)
        program = load(artifact.path)
        shapes = interface(artifact.manifest)
        self.alone: str | None = "its tensors have no rows that belong to one request each"
        if shapes.merges:
            self.alone = None if independent(program, shapes, self.golden) else "its rows read each other"
        self.artifact = Artifact(artifact.path, {**artifact.manifest, "rows": self.alone is None})
        self.interface = interface(self.artifact.manifest, settings.max_batch)
        self.processed = "preprocess" in (artifact.manifest["processing"] or {})
        self.example = example(program) if self.processed and settings.warmup else None
        # In an ensemble the version before the newest stays until the ensemble has turned to the new one.
        joined = self.processed or settings.layout == "stages"
        self.members = replace(settings, keep_versions=settings.keep_versions + 1) if joined else settings
        self.backend, self.reason = onnx_model.choose(self.artifact.manifest, self.interface, settings)
        self.steps: list[config.Step] = []
        self.programs: list[str] = []
        self.configs: dict[str, config.Config] = {}
        if settings.gpus and artifact.manifest["target"]["device"] != "cuda":
            raise ArtifactError(f"{artifact.path.name} was built for CPUs, and runs on no GPU", "leave --gpus out")
        self.engines: set[str] = set()

    def run(self) -> Repository:
        if self.processed:
            self.preprocess()
        if self.settings.layout == "stages":
            self.stages()
        else:
            self.fused()
        postprocessed = self.processed and "postprocess" in self.artifact.manifest["processing"]
        if postprocessed:
            self.postprocess()
        models = [step.model for step in self.steps]
        if len(models) > 1:
            models.append(self.ensemble(postprocessed))
        override(self.configs, self.settings.overrides)
        for model in models:
            (self.folder / model / "config.pbtxt").write_text(config.text(self.configs[model]))
        record = {
            "artifact": self.artifact.manifest["name"],
            "layout": self.settings.layout,
            "backend": self.backend,
            "backend_reason": self.reason,
            "entry": models[-1],
            "models": models,
            "programs": self.programs,
            "preprocesses": self.processed,
            "postprocesses": postprocessed,
            "max_batch": self.interface.max_batch,
            "alone": self.alone,
            "engines": sorted(self.engines),
            "requires": sorted({package for package in self.artifact.manifest["requires"].values() if package}),
            "version": self.settings.version,
            "grc": self.artifact.manifest["grc"],
            "target": self.artifact.manifest["target"],
            "options": server_options(self.configs.values()),
            "settings": asdict(self.settings),
        }
        (self.folder / MARKER).write_text(json.dumps(record, indent=1, default=str))
        made = Repository.open(self.folder)
        deploy.write(made, list(self.configs.values()))
        return made

    # The models

    def fused(self) -> None:
        manifest = self.artifact.manifest
        name = fused_name(manifest, self.settings)
        if self.backend == "onnxruntime":
            self.onnx(name)
            return
        slices.copy_whole(self.artifact, self.place(name))
        if not manifest["rows"]:
            slices.forbid_merging(self.place(name))
        self.program(name, manifest, self.interface, self.golden[0].inputs)

    def stages(self) -> None:
        entries = self.artifact.manifest.get("cut")
        if not entries:
            raise ArtifactError(
                f"{self.artifact.path.name} carries no stages",
                f"rebuild it: {self.artifact.manifest['command']} --stages; or export with --layout fused",
            )
        if not self.interface.merges:
            raise ArtifactError(
                f"the rows of {self.artifact.path.name} can't be told apart, which its stages need",
                "export with --layout fused",
            )
        folders = [self.place(self.named(entry["name"])) for entry in entries]
        for entry, folder in zip(entries, folders, strict=True):
            slices.write_stage(self.artifact, entry, folder)
        programs = [load(folder) for folder in folders]
        names = [entry.name for entry in self.interface.inputs]
        for stage, taken in zip(programs, through(programs, names, self.golden[0].inputs), strict=True):
            manifest = stage.artifact.manifest
            self.program(self.named(manifest["name"]), manifest, interface(manifest, self.settings.max_batch), taken)

    def program(self, name: str, manifest: dict[str, Any], shapes: Interface, request: Tensors) -> None:
        """A model that our runtime runs, and its place in the ensemble."""
        self.python(name, "program")
        self.programs.append(name)
        self.engines |= {part["engine"] for part in manifest["parts"]}
        found = warmups(self.folder / name / "warmup", manifest, shapes, request) if self.settings.warmup else []
        self.configs[name] = config.program(name, shapes, self.members, manifest["target"]["device"], found)
        self.step(name, shapes)

    def onnx(self, name: str) -> None:
        """The fused model as a file that Triton's own backend runs, checked here by ONNX Runtime itself."""
        self.version(name).mkdir(parents=True)
        manifest, shapes = self.artifact.manifest, self.interface
        onnx_model.write(self.artifact, shapes, self.version(name))
        onnx_model.check(self.version(name), shapes, self.golden, max(manifest["quality"].values(), default=0.0))
        warmup = self.folder / name / "warmup"
        found = warmups(warmup, manifest, shapes, self.golden[0].inputs) if self.settings.warmup else []
        self.configs[name] = config.onnx_program(name, shapes, self.members, found)
        self.programs.append(name)
        self.step(name, shapes)

    def step(self, name: str, shapes: Interface) -> None:
        reads = {entry.name: self.between(entry.name) for entry in shapes.inputs}
        self.steps.append(config.Step(name, reads, {entry.name: entry.name for entry in shapes.outputs}))

    def preprocess(self) -> None:
        name = self.named(PREPROCESS)
        slices.write_processing(self.artifact, self.place(name))
        self.python(name, "preprocess")
        made = config.ports(self.interface.inputs, batched=False)
        built = config.python_model(name, [config.REQUEST], made, self.members)
        config.queue(built, self.settings)
        if self.example:
            config.warm(built, [config.REQUEST], [whole(self.folder / name / "warmup", {"request": self.example[0]})])
        self.configs[name] = built
        self.steps.append(config.Step(name, {"request": "request"}, {p.name: self.between(p.name) for p in made}))

    def postprocess(self) -> None:
        name = self.named(POSTPROCESS)
        slices.write_processing(self.artifact, self.place(name))
        self.python(name, "postprocess")
        taken = [config.REQUEST, *config.ports(self.interface.outputs, batched=False)]
        built = config.python_model(name, taken, [config.ANSWER], self.members)
        if self.example:
            request, outputs = self.example
            rows = {e.name: e.to_rows(tensor) for e, tensor in zip(self.interface.outputs, outputs, strict=True)}
            config.warm(built, taken, [whole(self.folder / name / "warmup", {"request": request, **rows})])
        self.configs[name] = built
        self.steps.append(config.Step(name, {port.name: port.name for port in taken}, {"answer": "answer"}))

    def ensemble(self, postprocessed: bool) -> str:
        batched = self.interface.merges and not self.processed
        inputs = [config.REQUEST] if self.processed else config.ports(self.interface.inputs, batched=batched)
        # With an answer nothing but the answer: Triton drops a step whose outputs no caller asked for, though a later step
        # reads them.
        outputs = [config.ANSWER] if postprocessed else config.ports(self.interface.outputs, batched=batched)
        name, largest = self.named(ENSEMBLE), self.interface.max_batch if batched else 0
        self.version(name).mkdir(parents=True)
        self.configs[name] = config.ensemble(name, inputs, outputs, self.steps, self.settings, largest)
        return name

    # What they are made of

    def named(self, role: str) -> str:
        return f"{self.settings.prefix}{role}"

    def between(self, name: str) -> str:
        """The ensemble's name for a tensor. What preprocess makes gets a name apart, for an output may be called the same."""
        made = self.processed and any(entry.name == name for entry in self.interface.inputs)
        return f"{PREPROCESS}/{name}" if made else name

    def version(self, model: str) -> Path:
        return self.folder / model / str(self.settings.version)

    def place(self, model: str) -> Path:
        folder = self.version(model) / "artifact.grc"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def python(self, model: str, kind: str) -> None:
        """model.py, and the runtime that it imports: a model folder needs nothing of its neighbours."""
        shutil.copyfile(Path(__file__).parent / "models" / f"{kind}.py", self.version(model) / "model.py")
        vendor(self.version(model) / "grc")


def vendor(target: Path) -> None:
    """Copy what a serving host needs of grc: the runtime, with what it imports."""
    source = Path(__file__).parents[2]
    target.mkdir()
    for name in VENDORED:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns(*UNUSED))
        else:
            shutil.copyfile(source / name, target / name)
