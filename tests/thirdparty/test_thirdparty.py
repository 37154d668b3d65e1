"""Models of other libraries, unchanged: captured, optimised with every pass proven, built, and equal.

AOTInductor builds some of them in every run, and all where GRC_THIRDPARTY=all.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import grc
from grc.cli.app import app
from grc.graph.oracle import largest_error
from grc.lowering.choose import Candidate, Choice, choose
from grc.lowering.eager import Eager
from grc.lowering.engine import Engine, Lowerable
from grc.lowering.inductor import Inductor
from grc.lowering.onnxruntime import OnnxRuntime
from grc.options import Options
from grc.report.summary import changes
from grc.runtime.structure import flatten
from tests.thirdparty.models import MODELS, Inputs, ThirdParty

pytestmark = [pytest.mark.thirdparty, pytest.mark.engine]

UNSEEN = (1, 6, 29, 64)
LISTED = [pytest.param(entry, marks=[pytest.mark.slow] if entry.slow else [], id=entry.name) for entry in MODELS]


@dataclass(frozen=True)
class Compiled:
    """A model of the list beside what grc made of it, and the engines that were built on the optimised graph."""

    entry: ThirdParty
    module: nn.Module
    inputs: Inputs
    artifact: grc.Artifact
    engines: dict[str, Candidate]
    rejected: dict[str, str]

    def record(self, name: str) -> dict[str, Any]:
        return next(record for record in self.artifact.manifest["passes"] if record["name"] == name)

    def call(self, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = self.inputs(batch)
        return (given, {}) if isinstance(given, tuple) else ((), given)


def by_inductor(entry: ThirdParty) -> bool:
    return entry.built or os.environ.get("GRC_THIRDPARTY") == "all"


def engines_of(entry: ThirdParty) -> Callable[..., list[tuple[Engine, Lowerable]]]:
    """Every engine that runs the optimised graph; plain AOTInductor runs the graph as it was captured."""
    chosen: list[Engine] = [*([Inductor(packed=True)] if by_inductor(entry) else []), OnnxRuntime(), Eager()]
    return lambda optimised, source: [(engine, optimised) for engine in chosen]


def require(entry: ThirdParty) -> None:
    if importlib.util.find_spec(entry.package) is None:
        pytest.skip(f"needs {entry.package}, which is not installed")


@pytest.fixture(scope="module", params=LISTED)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    entry: ThirdParty = request.param
    require(entry)
    module, inputs = entry.model()
    output: Path = tmp_path_factory.mktemp("thirdparty") / f"{entry.name}.grc"
    choices: list[Choice] = []

    def chosen(candidates: list[Candidate], rejected: dict[str, str], times: dict[int, float]) -> Choice:
        choices.append(choose(candidates, rejected, times))
        return choices[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grc.compiler.engines_for", engines_of(entry))
        patch.setattr("grc.compiler.choose", chosen)
        artifact = grc.compile(module, inputs, Options(output=output, batches=(4,), strict=True))
    engines = {candidate.built.engine: candidate for candidate in choices[0].candidates}
    return Compiled(entry, module, inputs, artifact, engines, choices[0].rejected)


def tensors(value: Any) -> list[torch.Tensor]:
    leaves: list[torch.Tensor] = []
    flatten(value, leaves)
    return leaves


def test_every_pass_is_proven(compiled: Compiled) -> None:
    records = compiled.artifact.manifest["passes"]
    changed = [r for r in records if any(change["missed"] is None for change in r["changes"])]
    assert [r["rolled_back"] for r in records if r["rolled_back"]] == []
    assert changed
    assert all(r["error"] is not None for r in changed)


def test_tables_are_merged(compiled: Compiled) -> None:
    changes = compiled.record("merge-tables")["changes"]
    assert [change["what"] for change in changes if change["missed"] is None] == list(compiled.entry.merged)


def test_fuses_what_should_fuse(compiled: Compiled) -> None:
    changes = compiled.record("fuse")["changes"]
    assert tuple(c["what"] for c in changes if c["missed"] is None) == compiled.entry.fused
    assert {(c["what"], c["missed"]) for c in changes if c["missed"] is not None and c["what"] != "look-up"} == set(
        compiled.entry.missed
    )


def test_needs_no_other_library_to_serve(compiled: Compiled) -> None:
    assert compiled.artifact.manifest["requires"] == {}


def test_engines_are_built(compiled: Compiled) -> None:
    missing = () if importlib.util.find_spec("onnxscript") else ("onnxruntime",)
    wanted = {"onnxruntime", "eager", *(["inductor"] if by_inductor(compiled.entry) else [])}
    assert set(compiled.engines) == wanted - set(missing), compiled.rejected


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.parametrize("entry", LISTED)
def test_answers_on_a_gpu(entry: ThirdParty, artifact_path: Path) -> None:
    require(entry)
    module, inputs = entry.model()
    options = Options(artifact_path, "cuda", "inductor", buckets=(1, 8, 64), max_batch=64, strict=True)
    grc.compile(module, inputs, options)
    program = grc.load(artifact_path)
    for batch in UNSEEN:
        given = inputs(batch)
        args, kwargs = (given, {}) if isinstance(given, tuple) else ((), given)
        answers = tensors(program(*args, **kwargs))
        # tf32 in three passes, and sums in another order
        assert largest_error(answers, tensors(module(*args, **kwargs))) < 1e-4, f"batch {batch}"


@torch.no_grad()
@pytest.mark.parametrize("name", ["inductor", "onnxruntime", "eager"])
def test_engines_agree_at_unseen_batches(compiled: Compiled, name: str) -> None:
    if name not in compiled.engines:
        pytest.skip(f"{name}: {compiled.rejected.get(name, 'built where GRC_THIRDPARTY=all')[:80]}")
    for batch in UNSEEN:
        args, kwargs = compiled.call(batch)
        answers: Sequence[torch.Tensor] = compiled.engines[name].run(tensors((args, kwargs)))
        assert largest_error(list(answers), tensors(compiled.module(*args, **kwargs))) < 1e-5, f"batch {batch}"


@torch.no_grad()
def test_the_artifact_agrees_at_unseen_batches(compiled: Compiled) -> None:
    program = grc.load(compiled.artifact.path)
    for batch in UNSEEN:
        args, kwargs = compiled.call(batch)
        error = largest_error(tensors(program(*args, **kwargs)), tensors(compiled.module(*args, **kwargs)))
        assert error < 1e-5, f"batch {batch}"


FILE = """\
from tests.thirdparty.models import MODELS

model, get_inputs = next(entry for entry in MODELS if entry.name == {name!r}).model()


def get_model():
    return model
"""


def named_with_their_lines(entry: ThirdParty, fused: list[dict[str, Any]], missed: list[dict[str, Any]]) -> None:
    """Each by a line of the library's own model or of the file that wraps it."""
    assert {change["what"] for change in fused} >= {*entry.merged, *entry.fused}
    assert {(c["what"], c["missed"]) for c in missed} >= set(entry.missed)
    lines = [change["where"] for change in (*fused, *missed)]
    assert all(line and line.partition(":")[0] not in TORCHS_OWN for line in lines), lines


def test_the_artifact_names_the_fusions(compiled: Compiled) -> None:
    named_with_their_lines(compiled.entry, *changes(compiled.artifact.manifest))


@pytest.mark.parametrize("name", ["torchrec-deepfm", "deepctr-deepfm", "transformers-gpt2"])
def test_explain_names_the_fusions(name: str, tmp_path: Path) -> None:
    (entry,) = (entry for entry in MODELS if entry.name == name)
    pytest.importorskip(entry.package)
    file = tmp_path / "model.py"
    file.write_text(FILE.format(name=name))
    ran = CliRunner().invoke(app, ["explain", str(file), "--json"])
    assert ran.exit_code == 0, ran.stderr
    told = json.loads(ran.stdout)
    named_with_their_lines(entry, told["fused"], told["missed"])


TORCHS_OWN = ("linear.py", "sparse.py", "container.py", "functional.py", "activation.py", "normalization.py")


def test_a_jagged_tensor_is_known_by_lengths_or_offsets(tmp_path: Path) -> None:
    """TorchRec's remember either once they were asked for, and get_inputs may hand out the same ones again."""
    jagged = pytest.importorskip("torchrec.sparse.jagged_tensor")
    kept: dict[int, Any] = {}

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.EmbeddingBag(50, 8, mode="sum", include_last_offset=True)

        def forward(self, features: Any) -> torch.Tensor:
            return self.table(features.values(), features.offsets()).unflatten(0, (2, -1)).sum(0)

    def inputs(batch: int) -> tuple[Any, ...]:
        if batch not in kept:
            lengths = torch.arange(2 * batch) % 3
            values = torch.arange(int(lengths.sum())) % 50
            kept[batch] = jagged.KeyedJaggedTensor(keys=["a", "b"], values=values, lengths=lengths)
        return (kept[batch],)

    model = Pooled().eval()
    grc.compile(model, inputs, Options(output=tmp_path / "a.grc", engine="eager"))
    program = grc.load(tmp_path / "a.grc")
    (given,) = inputs(5)
    expected = model(given)  # offsets are remembered now
    by_offsets = jagged.KeyedJaggedTensor.from_offsets_sync(["a", "b"], given.values(), given.offsets())
    for request in (given, by_offsets):
        assert torch.allclose(program(request), expected)
    with pytest.raises(
        grc.GrcError, match=r"takes features\.values, features\.lengths; the request holds features\[0\]"
    ):
        program((given.values(), given.lengths()))
