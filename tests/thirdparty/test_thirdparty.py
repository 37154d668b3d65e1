"""Models of other libraries, unchanged: captured, optimised with every pass proven, compiled, and equal to eager."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import grc
from grc.graph.oracle import largest_error
from grc.options import Options
from grc.runtime.structure import flatten
from tests.thirdparty.models import MODELS, Inputs, ThirdParty

pytestmark = pytest.mark.thirdparty

UNSEEN = (1, 6, 29)


@dataclass(frozen=True)
class Compiled:
    """A model of the list beside what grc made of it."""

    entry: ThirdParty
    module: nn.Module
    inputs: Inputs
    artifact: grc.Artifact

    def record(self, name: str) -> dict[str, Any]:
        return next(record for record in self.artifact.manifest["passes"] if record["name"] == name)


@pytest.fixture(scope="module", params=MODELS, ids=lambda entry: entry.name)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    entry: ThirdParty = request.param
    if importlib.util.find_spec(entry.package) is None:
        pytest.skip(f"needs {entry.package}, which is not installed")
    module, inputs = entry.model()
    output: Path = tmp_path_factory.mktemp("thirdparty") / f"{entry.name}.grc"
    options = Options(output=output, engine="eager", batches=(4,), strict=True)
    return Compiled(entry, module, inputs, grc.compile(module, inputs, options))


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
    assert {(c["what"], c["missed"]) for c in changes if c["missed"] is not None} == set(compiled.entry.missed)


def test_needs_no_other_library_to_serve(compiled: Compiled) -> None:
    assert compiled.artifact.manifest["requires"] == {}


@torch.no_grad()
def test_agrees_at_unseen_batches(compiled: Compiled) -> None:
    program = grc.load(compiled.artifact.path)
    for batch in UNSEEN:
        given = compiled.inputs(batch)
        call, named = (given, {}) if isinstance(given, tuple) else ((), given)
        error = largest_error(tensors(program(*call, **named)), tensors(compiled.module(*call, **named)))
        assert error < 1e-5, f"batch {batch}"
