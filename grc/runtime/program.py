"""The program: an artifact as a callable with the model's own signature, safe to call from many threads."""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

from grc.errors import EngineError, GrcError, InputError, message_of
from grc.runtime.answers import hold_nan
from grc.runtime.artifact import Artifact
from grc.runtime.buckets import Buckets
from grc.runtime.engines import Run, part_loader
from grc.runtime.inputs import InputCheck
from grc.runtime.pages import keep_freed_memory, map_ahead
from grc.runtime.processing import Processing, read_request
from grc.runtime.signature import Signature
from grc.runtime.structure import builder

EXAMPLE = "request.json"


def load(
    path: str | os.PathLike[str], *, verify: bool = False, engine: str | None = None, keep_memory: bool = True
) -> Program:
    """Load an artifact into a Program. `verify` also hashes the weights; `engine` picks one of the parts it carries;
    without `keep_memory`, malloc stays as it is, and large batches on a CPU fault their pages in again at every request.

    Raises ArtifactError when the artifact is damaged or was built for another host.
    """
    return Program(Artifact.open(path, verify=verify), engine, keep_memory)


class Program:
    """Call it as the model was called: `program(*inputs)` or `program(**inputs)`.

    Raises InputError (a ValueError) naming the input, position, value and limit when a request does not fit.
    """

    def __init__(self, artifact: Artifact, engine: str | None = None, keep_memory: bool = True):
        self.artifact = artifact
        manifest = artifact.manifest
        parts = manifest["parts"]
        if engine is not None and engine not in [p["engine"] for p in parts]:
            raise InputError(
                f"{artifact.path.name} holds no part for engine {engine}",
                f"it holds {', '.join(p['engine'] for p in parts)}",
            )
        weights = artifact.weights
        if manifest["target"]["device"] == "cpu":
            map_ahead(weights.values())
            if keep_memory:
                keep_freed_memory()
        forced = next((i for i, p in enumerate(parts) if p["engine"] == engine), None)
        self.limits = [] if forced is not None else [c["up_to"] for c in manifest["choice"][:-1]]
        self.chosen = [forced] if forced is not None else [c["part"] for c in manifest["choice"]]
        load_one = part_loader(manifest, forced is not None)
        self.runs: dict[int, Run] = {
            i: load_one(parts[i], artifact.path / "parts", bound(parts[i]["weights"], weights))
            for i in sorted(set(self.chosen))
        }
        self.self_checking = [bool(p["checks_ids"]) for p in parts]
        self.check = InputCheck(manifest)
        self.min_batch = manifest["batch"]["min"]
        self.leaves = Signature(manifest).leaves
        self.single = manifest["structure"]["outputs"] == {"leaf": 0}
        self.build = builder(manifest["structure"]["outputs"])
        self.outputs = manifest["outputs"]

    @property
    def name(self) -> str:
        return self.artifact.manifest["name"]

    def engine_at(self, batch: int) -> str:
        """The engine that answers a batch of this size."""
        return self.artifact.manifest["parts"][self.part_at(batch)]["engine"]

    def replayer(self, batch: int) -> Callable[[Any], None] | None:
        """On a GPU: runs the kernels that answer a batch of this size once more, on what lies in their buffers, without
        copies and on the current stream. None where they are not one CUDA graph."""
        run = self.runs[self.part_at(batch)]
        return run.replayer(batch) if isinstance(run, Buckets) else None

    def part_at(self, batch: int) -> int:
        return self.chosen[bisect.bisect_left(self.limits, batch)] if self.limits else self.chosen[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.built(self.run_flat(self.leaves(args, kwargs)))

    def built(self, answers: Sequence[torch.Tensor]) -> Any:
        """The model's own structure around the flat answers."""
        return answers[0] if self.single else self.build(answers)

    @cached_property
    def processing(self) -> Processing:
        """The artifact's own pre- and postprocessing. Raises ArtifactError where it has neither."""
        return Processing(self.artifact)

    def recommend(self, request: dict[str, Any]) -> Any:
        """From a request as the model's users write it to an answer as they read it: preprocess, run, postprocess."""
        args, kwargs = self.processing.preprocess(request)
        return self.processing.postprocess(self(*args, **kwargs), request)

    def example(self) -> dict[str, Any] | None:
        """The request among the assets, for people to begin with; none where it is not one that preprocess takes."""
        file = self.processing.folder / EXAMPLE
        if not file.is_file() or "preprocess" not in self.processing.functions:
            return None
        try:
            request = read_request(file.read_text())
            args, kwargs = self.processing.preprocess(request)
            self.check.batch(self.leaves(args, kwargs))
        except InputError:
            return None
        return request

    def run_flat(self, inputs: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Answer a flat request: check it, run the part that is fastest at its batch, check the answer for NaN."""
        batch = self.check.batch(inputs)
        if batch == 0:
            return self.empty()
        self.check.bags(inputs)
        part = self.part_at(batch)
        if not self.self_checking[part]:
            self.check.ids(inputs)
        padded = batch < self.min_batch
        ready = self.check.padded(inputs, batch, self.min_batch) if padded else inputs
        try:
            # Compiled code reads memory by the strides it was built for, and knows of no sign that is kept beside it.
            answers = self.runs[part](
                [t if t.is_contiguous() and not t.requires_grad and not t.is_neg() else plain(t) for t in ready]
            )
        except GrcError:
            raise
        except Exception as error:  # an engine's own failure: name the input where one is to blame
            self.check.ids(inputs)
            raise EngineError(
                f"{self.engine_at(batch)} failed: {message_of(error)}", "check the request with grc run --engine eager"
            ) from error
        if padded:
            answers = [self.unpadded(a, spec, batch) for a, spec in zip(answers, self.outputs, strict=True)]
        if hold_nan(answers):
            self.check.nan(inputs)
        return answers

    def unpadded(self, answer: torch.Tensor, spec: dict[str, Any], batch: int) -> torch.Tensor:
        for dim, size in enumerate(spec["sizes"]):
            if size == "batch":
                answer = answer.narrow(dim, 0, batch)
        return answer

    def empty(self) -> list[torch.Tensor]:
        """The answer to a batch of no rows."""
        return [
            torch.empty([s if isinstance(s, int) else 0 for s in spec["sizes"]], dtype=getattr(torch, spec["dtype"]))
            for spec in self.outputs
        ]


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, without history, and with its values in memory as they are: an imaginary part may have them negated."""
    return tensor.detach().contiguous().resolve_neg()


def bound(refs: dict[str, Any], weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Constants by the name a part uses: whole tensors, or slices of one that other parts share."""
    found = {}
    for name, ref in refs.items():
        tensor = weights[ref["key"]]
        if "shape" in ref:
            count = 1
            for size in ref["shape"]:
                count *= size
            tensor = tensor.view(-1)[ref["start"] : ref["start"] + count].view(ref["shape"])
        found[name] = tensor
    return found
