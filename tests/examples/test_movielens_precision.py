"""The MovieLens recommender in int8 ranks the films of real users as it does in float32."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from movielens import data, evaluate, model, train
from movielens.corpus import Corpus

import grc

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "movielens"


@pytest.mark.slow
def test_int8_ranks_as_float32_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both held-out ratings of each user: one user in 943 is more than half a percent of HR@10."""
    try:
        corpus = Corpus(data.load(data.locate()))
    except data.DataError as error:
        pytest.skip(str(error))
    trained = train.train(corpus, model.SIZES["small"], train.RECIPES["small"], quiet=True)
    train.save(trained, corpus, model.SIZES["small"], {}, tmp_path / "checkpoint")
    monkeypatch.setenv("GRC_MOVIELENS_CHECKPOINT", str(tmp_path / "checkpoint"))
    options = grc.Options(tmp_path / "int8.grc", engine="inductor", batches=(64,), precision="int8")
    artifact = grc.compile(str(EXAMPLE / "model.py"), None, options)

    examples = np.concatenate([corpus.validation, corpus.test])
    found = evaluate.compared(artifact.path, train.rank(trained, corpus, examples), corpus, examples)
    print({name: round(value, 4) for name, value in found.items()}, file=sys.stderr)
    assert min(found["change of hr@10"], found["change of ndcg@10"]) >= -0.005
    lowered = artifact.manifest["precision"]["sites"]
    assert sum(site["bytes"] for site in lowered) >= 3.5 * sum(site["lowered_bytes"] for site in lowered)
    float32 = sum(parameter.nbytes for parameter in trained.parameters())
    assert float32 >= 3.5 * found["bytes"]


def test_a_comparison_counts_changes_and_bytes(checkpoint: Path, tmp_path: Path, corpus: Corpus) -> None:
    path = tmp_path / "films.grc"
    grc.compile(str(EXAMPLE / "model.py"), None, grc.Options(path, engine="eager", batches=(4,), max_batch=64))
    own = train.rank(model.get_model(), corpus, corpus.test)
    found = evaluate.compared(path, own, corpus, corpus.test)
    assert found["hr@10"] == own["hr@10"] and found["change of ndcg@10"] == pytest.approx(0, abs=1e-6)
    assert found["bytes"] == (path / "weights.safetensors").stat().st_size
    halved = {name: 2 * value for name, value in own.items()}
    assert evaluate.compared(path, halved, corpus, corpus.test)["change of hr@10"] == -0.5
