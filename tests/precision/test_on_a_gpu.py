"""Lower precision on a GPU, from the compiler to answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import grc
from grc.precision.apply import FLOATS_BETWEEN, HALVES_BETWEEN
from tests.precision.models import Ranker, doubled, doubled_inputs, ranker_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.engine]


DTYPES = {
    "fp16": {"torch.float16"},
    "bf16": {"torch.bfloat16"},
    "int8": {"torch.int8", "torch.uint8"},
    "int4": {"torch.int8", "torch.uint8"},
    "fp8": {"torch.float8_e4m3fn", "torch.float16"},
}


@pytest.mark.parametrize("precision", DTYPES)
def test_answers_inside_of_the_budget(precision: str, tmp_path: Path) -> None:
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 begins with sm_89")
    torch.manual_seed(0)
    model = Ranker().eval()
    options = grc.Options(
        tmp_path / "low.grc", "cuda", batches=(8,), max_batch=64, precision=precision, budget=("max-error=0.05",),
        engine="inductor",
    )  # fmt: skip
    program = grc.load(grc.compile(model, ranker_inputs, options).path)
    found = program.artifact.manifest["precision"]
    tables = {site["format"] for site in found["sites"] if site["kind"] == "table"}
    assert tables == {"fp16" if precision == "fp8" else precision}
    dtypes = {str(tensor.dtype) for tensor in program.artifact.weights.values() if tensor.numel() > 1000}
    assert dtypes == DTYPES[precision]
    assert program.artifact.manifest["parts"][0]["checks_ids"]
    inputs = ranker_inputs(50)
    with torch.no_grad():
        assert 0 < (program(*inputs) - model(*inputs)).abs().max() <= 0.05
    with pytest.raises(ValueError, match="table users"):
        program(inputs[0], inputs[1] + 400)


def test_layers_of_8_bits_are_measured_beside_the_same_in_halves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = grc.Options(
        tmp_path / "low.grc", "cuda", batches=(8,), max_batch=64, precision="int8", budget=("max-error=0.05",)
    )
    manifest = grc.compile(Ranker().eval(), ranker_inputs, options).manifest
    assert {row["engine"] for row in manifest["measured"]} >= {"inductor", "inductor-half-layers"}


@pytest.mark.parametrize(("size", "note"), [(1.0, HALVES_BETWEEN), (40000.0, FLOATS_BETWEEN)])
def test_what_lies_between_layers_is_narrow_where_it_may_be(size: float, note: str, tmp_path: Path) -> None:
    model = doubled(size)
    options = grc.Options(tmp_path / "low.grc", "cuda", batches=(8,), max_batch=8, precision="fp16", engine="inductor")
    program = grc.load(grc.compile(model, doubled_inputs, options).path)
    assert note in program.artifact.manifest["precision"]["notes"]
    inputs = doubled_inputs(5)
    with torch.no_grad():
        assert (program(*inputs) - model(*inputs)).abs().max() <= 0.02 * model(*inputs).abs().max()
