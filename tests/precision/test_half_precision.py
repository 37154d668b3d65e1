"""Half precision on a GPU, from the compiler to answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import grc
from tests.precision.models import Ranker, ranker_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.engine]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_answers_inside_of_the_budget(precision: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Ranker().eval()
    options = grc.Options(
        tmp_path / "half.grc", "cuda", batches=(8,), max_batch=64, precision=precision, budget=("max-error=0.05",)
    )
    program = grc.load(grc.compile(model, ranker_inputs, options).path)
    found = program.artifact.manifest["precision"]
    assert {site["format"] for site in found["sites"]} == {precision}
    dtypes = {str(tensor.dtype) for tensor in program.artifact.weights.values() if tensor.numel() > 1000}
    assert dtypes == {"torch.float16" if precision == "fp16" else "torch.bfloat16"}
    inputs = ranker_inputs(50)
    with torch.no_grad():
        assert 0 < (program(*inputs) - model(*inputs)).abs().max() <= 0.05
    with pytest.raises(ValueError, match="table users"):
        program(inputs[0], inputs[1] + 400)
