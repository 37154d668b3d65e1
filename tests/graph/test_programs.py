"""Saved programs as input, and operators that only a library has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

import grc
from grc.compiler import optimise, traced
from grc.errors import ArtifactError
from grc.graph.capture import capture
from grc.graph.model_file import load_model
from grc.options import Options
from grc.progress import Silent
from grc.runtime.artifact import Artifact
from tests.graph.test_capture import Forward, agrees, rows


@torch.no_grad()
def test_a_saved_program(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    program = torch.export.export(model, (rows(8, 4),), dynamic_shapes=({0: Dim("batch")},))
    path = tmp_path / "saved.pt2"
    torch.export.save(program, path)
    source = capture(load_model(path))
    agrees(source, 1, 6, 19)
    assert (source.mode, source.model.name) == ("saved", "saved")
    assert torch.allclose(source.graph(rows(5, 4))[0], model(rows(5, 4)))


def test_an_operator_of_a_library_is_named_in_the_manifest_and_where_it_is_missing(tmp_path: Path) -> None:
    with torch.library._scoped_library("grc_test_library", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        model = Forward(lambda self, x: torch.ops.grc_test_library.twice(x) + 1).eval()
        options = Options(output=tmp_path / "model.grc", engine="eager", batches=(4,))
        artifact = grc.compile(model, lambda b: (rows(b, 4),), options)
        assert list(artifact.manifest["requires"]) == ["grc_test_library::twice"]
        assert torch.equal(grc.load(tmp_path / "model.grc")(rows(3, 4)), rows(3, 4) * 2 + 1)
    with pytest.raises(
        ArtifactError, match="needs the operator grc_test_library::twice, which is not loaded here"
    ) as caught:
        Artifact.open(
            tmp_path / "model.grc"
        ).check_host()  # before any part is loaded: AOTInductor would fail in torch's words
    assert "before grc.load()" in str(caught.value.hint)


def test_no_pass_widens_a_dtype() -> None:
    model = Forward(lambda self, x: torch.relu(self.layer(x)) / 2, layer=nn.Linear(4, 4)).eval().half()
    from grc.graph.model_file import from_module

    optimised = optimise(traced(from_module(model, lambda b: (rows(b, 4).half(),)), Silent()), Options(), Silent())
    values = [n.meta.get("val") for n in optimised.graph.graph.nodes]
    assert {v.dtype for v in values if isinstance(v, torch.Tensor)} == {torch.float16}
