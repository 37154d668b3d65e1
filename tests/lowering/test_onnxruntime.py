"""ONNX Runtime on weights that its file does not hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import grc

pytest.importorskip("onnxruntime", reason="the engine needs it")


class Tied(nn.Module):
    """Scores over steps by the table that the steps are read from, which the exporter writes as a transposition of it."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(5000, 64)

    def forward(self, history: Tensor) -> Tensor:
        return self.items(history) @ self.items.weight.t()


def test_a_table_that_is_transposed_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = Tied().eval()

    def inputs(batch: int) -> tuple[Tensor]:
        return (torch.randint(0, 5000, (batch, 3), generator=torch.Generator().manual_seed(batch)),)

    grc.compile(model, inputs, options=grc.Options(output=tmp_path / "tied.grc", engine="onnxruntime", batches=(2,)))
    request = inputs(7)
    with torch.inference_mode():
        torch.testing.assert_close(grc.load(tmp_path / "tied.grc")(*request), model(*request), rtol=1e-4, atol=1e-4)
    assert "onnxruntime" not in capfd.readouterr().err, "what it tries and fails is not for the user"
