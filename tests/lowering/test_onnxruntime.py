"""ONNX Runtime on weights that its file does not hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import grc
from grc.options import BadIdPolicy

pytest.importorskip("onnxruntime", reason="the engine needs it")


class Tied(nn.Module):
    """Scores over steps by the table that the steps are read from, which the exporter writes as a transposition of it."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(5000, 64)

    def forward(self, history: Tensor) -> Tensor:
        return self.items(history) @ self.items.weight.t()


class Jagged(nn.Module):
    """Bags of any length, some of them empty."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.words = nn.EmbeddingBag(50, 8, mode="mean"), nn.EmbeddingBag(90, 8, mode="sum")

    def forward(self, tags: Tensor, tag_offsets: Tensor, words: Tensor, word_offsets: Tensor) -> Tensor:
        return torch.cat([self.tags(tags, tag_offsets), self.words(words, word_offsets)], 1)


def jagged_inputs(batch: int) -> tuple[Tensor, ...]:
    make = torch.Generator().manual_seed(batch)
    lengths = torch.randint(0, 4, (2, batch), generator=make)
    ends = lengths.cumsum(1)
    ids = [torch.randint(0, 50, (int(end[-1]),), generator=make) for end in ends]
    return ids[0], (ends - lengths)[0], ids[1], (ends - lengths)[1]


@pytest.mark.parametrize("policy", ["error", "zero", "clamp"])
def test_bags_with_offsets(policy: BadIdPolicy, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Jagged().eval()
    options = grc.Options(output=tmp_path / "bags.grc", engine="onnxruntime", batches=(2,), on_bad_id=policy)
    grc.compile(model, jagged_inputs, options=options)
    for batch in (1, 7, 40):
        request = jagged_inputs(batch)
        with torch.inference_mode():
            torch.testing.assert_close(grc.load(tmp_path / "bags.grc")(*request), model(*request))


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
