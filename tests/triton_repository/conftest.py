"""Small artifacts to export: a DLRM and a MovieLens recommender, each with stages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import grc
from tests.examples.conftest import sample, write_atomic

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = {"width": 16, "heads": 2, "ffn": 32, "layers": 1}


@pytest.fixture(scope="session")
def quick() -> Iterator[pytest.MonkeyPatch]:
    """These tests ask what is served, not how fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grc.lowering.choose.SECONDS", 0.01)
        patch.setenv("GRC_ZOO_SIZE", "small")
        yield patch


def compiled(model: Path, output: Path, **options: object) -> Path:
    chosen = {"engine": "eager", "batches": (1, 8), "max_batch": 64, "stages": True} | options
    grc.compile(model, None, grc.Options(output=output, **chosen))  # type: ignore[arg-type]
    return output


@pytest.fixture(scope="session")
def dlrm(quick: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(EXAMPLES / "zoo/dlrm.py", tmp_path_factory.mktemp("dlrm") / "dlrm.grc")


@pytest.fixture(scope="session")
def checkpoint(quick: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recommender trained for two epochs on made-up ratings."""
    from movielens import data, train
    from movielens.corpus import Corpus

    folder = tmp_path_factory.mktemp("movielens")
    write_atomic(folder, *sample())
    corpus = Corpus(data.load(folder))
    recipe = train.Recipe(epochs=2, ahead=2, batch=32, rate=1e-2, dropout=0.1, decay=0.1)
    train.save(train.train(corpus, TINY, recipe, quiet=True), corpus, TINY, {}, folder / "checkpoint")
    quick.setenv("GRC_MOVIELENS_CHECKPOINT", str(folder / "checkpoint"))
    return folder / "checkpoint"


@pytest.fixture(scope="session")
def films(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(EXAMPLES / "movielens/model.py", tmp_path_factory.mktemp("films") / "films.grc")


@pytest.fixture(scope="session")
def requests(checkpoint: Path) -> list[dict]:
    """A few users with their behaviours."""
    return json.loads((checkpoint / "requests.json").read_text())[:4]
