"""A version of a model: an artifact that was proven on its golden requests, and all that a request to it needs."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from grc.errors import ArtifactError, GrcError
from grc.runtime.artifact import Artifact
from grc.runtime.closeness import QUALITY, largest_error
from grc.runtime.golden import Golden, read_golden
from grc.runtime.processing import Processing, written
from grc.runtime.program import Program
from grc.runtime.server.cache import Cache
from grc.runtime.server.estimate import Estimate
from grc.runtime.server.merge import Merge
from grc.runtime.server.packed import Packed
from grc.runtime.server.refusal import invalid
from grc.runtime.server.statistics import Statistics
from grc.runtime.structure import output_names

Tensors = list[torch.Tensor]
LAYOUTS = 1 << 20  # bytes: some thousand of them


class Version:
    """Loaded, checked by its checksums, and proven: golden requests are answered as the model did, alone and merged.

    Raises ArtifactError when it is damaged, was built for another host, or answers wrongly.
    """

    def __init__(self, name: str, number: str, path: Path, engine: str | None = None):
        self.name, self.number = name, number
        start = time.perf_counter()
        artifact = Artifact.open(path, verify=True)
        self.program = Program(artifact, engine)
        self.manifest: dict[str, Any] = artifact.manifest
        self.recommends = artifact.manifest["processing"] is not None
        # Pre- and postprocessing may read their files at any time, also when the artifact's folder has been replaced.
        self.scratch = tempfile.TemporaryDirectory(prefix="grc-serve-") if self.recommends else None
        if self.scratch is not None:
            folder = Path(self.scratch.name) / "processing"
            shutil.copytree(path / "processing", folder)
            self.program.processing = Processing(artifact, folder)
        self.inputs = self.manifest["inputs"]
        self.input_index = {entry["name"]: i for i, entry in enumerate(self.inputs)}
        self.dtypes = self.program.check.dtypes
        self.output_names = output_names(self.manifest["structure"]["outputs"])
        self.output_index = {name: i for i, name in enumerate(self.output_names)}
        self.output_dtypes = [getattr(torch, entry["dtype"]) for entry in self.manifest["outputs"]]
        self.estimate = Estimate(self.manifest)
        self.statistics = Statistics()
        golden = read_golden(artifact)
        self.canary: Golden = golden[0]
        # Twice what the worst part had when it was built, as for any rewrite of the model.
        quality = self.manifest["quality"]
        self.allowed_error = max(2 * max(quality[part["engine"]] for part in self.manifest["parts"]), QUALITY)
        self.prove(golden)
        # A client's requests of one size all begin with the same JSON, which is not read twice.
        self.layouts = Cache(LAYOUTS, math.inf)
        self.merge = Merge(self.manifest)
        self.prove_merging(golden)
        self.example, self.example_answer = self.answered_example()
        self.load_seconds = time.perf_counter() - start

    def prove(self, golden: list[Golden]) -> None:
        """Each golden request alone."""
        for request in golden:
            error = largest_error(list(self.program.run_flat(request.inputs)), request.outputs)
            if not error <= self.allowed_error:
                raise ArtifactError(
                    f"{self.program.artifact.path.name} answers a golden request {error:.1e} away from the model",
                    f"rebuild it here: {self.manifest['command']}",
                )

    def prove_merging(self, golden: list[Golden]) -> None:
        """Merged golden requests must be answered as the model answered each, or requests run alone."""
        merge = self.merge
        merge.prepare(golden, lambda inputs: self.program.check.batch(inputs))
        rows = [self.program.check.batch(r.inputs) for r in golden]
        while sum(rows) > merge.max_batch:
            rows.pop()
        if merge.reason is not None:
            return
        if len(rows) < 2:
            merge.reason = "it has no two golden requests that fit one batch, to prove that rows do not read each other"
            return
        try:
            for own in groups(golden[: len(rows)], rows, merge):
                answers = self.program.run_flat(merge.join([r.inputs for r in own]))
                parts = merge.cut(answers, [self.program.check.batch(r.inputs) for r in own])
                error = max(largest_error(part, r.outputs) for part, r in zip(parts, own, strict=True))
                if not error <= self.allowed_error:
                    merge.reason = f"merged golden requests are answered {error:.1e} away from the model"
        except GrcError as error:
            merge.reason = f"merged golden requests are refused: {error.message}"

    def answered_example(self) -> tuple[dict[str, Any] | None, Any]:
        """The request among the assets and its answer, as JSON has it; no example where there is none to it."""
        example = self.program.example() if self.recommends else None
        if example is None:
            return None, None
        try:
            return example, json.loads(written(self.program.recommend(example)))
        except GrcError:
            return None, None

    @property
    def max_rows(self) -> int:
        return self.merge.max_batch

    def packed(self, data: Mapping[int, bytes], shapes: Mapping[int, tuple[int, ...]]) -> Packed:
        """A request's inputs, by their places. Raises Refused where one is missing, InputError where one does not fit."""
        for name, index in self.input_index.items():
            if index not in data:
                raise invalid(f"the request misses input {name}; the inputs are {', '.join(self.input_index)}")
        places = range(len(data))
        found = Packed([data[i] for i in places], tuple(shapes[i] for i in places), self.dtypes, 0)
        # Shapes that fitted before are known to fit, and no tensors are made to see it.
        known = self.program.check.fitted.get(tuple(zip(self.dtypes, found.shapes, strict=True)))
        found.rows = self.program.check.batch(found.tensors()) if known is None else known
        return found

    def answers_rightly(self, answer: Sequence[torch.Tensor]) -> bool:
        return largest_error(answer, self.canary.outputs) <= self.allowed_error

    def engines(self) -> str:
        """The engines inside, with the batches that each answers: `onnxruntime to batch 16, then inductor`."""
        parts = self.manifest["parts"]
        names = [parts[index]["engine"] for index in self.program.chosen]
        limits = self.program.limits
        runs: list[tuple[str, int | None]] = []
        for name, limit in zip(names, [*limits, None], strict=True):
            if runs and runs[-1][0] == name:
                runs.pop()
            runs.append((name, limit))
        return ", then ".join(name if limit is None else f"{name} to batch {limit}" for name, limit in runs)

    def processing(self) -> Processing:
        if not self.recommends:
            raise ArtifactError(f"model {self.name} has no preprocess and no postprocess", "send tensors to infer")
        return self.program.processing


def groups(golden: list[Golden], rows: list[int], merge: Merge) -> list[list[Golden]]:
    """Golden requests that may share a batch; without jagged inputs that is all of them."""
    if merge.jagged:  # their lengths are about alike, and any mixture must be answered rightly
        return [golden]
    found: dict[tuple[int, ...], list[Golden]] = {}
    for request, count in zip(golden, rows, strict=True):
        found.setdefault(merge.key(request.inputs, count), []).append(request)
    return list(found.values())
