"""Small artifacts to export: a DLRM and a MovieLens recommender, each with stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

import grc
from tests.cli.session import MODEL, SERVED, WORDS
from tests.examples.conftest import sample, write_atomic

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
EXAMPLE = '{"dense": [0.5, -1.0, 2.0], "user": 3, "item": 7}'
TINY = {"width": 16, "heads": 2, "ffn": 32, "layers": 1}


def compiled(model: Path | nn.Module, output: Path, inputs: object = None, **env: str) -> Path:
    """An artifact with stages."""
    options = grc.Options(output=output, engine="eager", batches=(1, 8), max_batch=64, stages=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        grc.compile(model, inputs, options)
    return output


@pytest.fixture(scope="session")
def dlrm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("dlrm") / "dlrm.grc"
    return compiled(EXAMPLES / "zoo/dlrm.py", output, GRC_ZOO_SIZE="small")


@pytest.fixture(scope="session")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with preprocess, postprocess and an example request."""
    folder = tmp_path_factory.mktemp("spoken")
    served = SERVED + 'assets = ["request.json"]\n'
    for name, text in {"tiny.py": MODEL, "words.py": WORDS, "served.py": served, "request.json": EXAMPLE}.items():
        (folder / name).write_text(text)
    options = grc.Options(output=folder / "spoken.grc", engine="eager", batches=(4,), max_batch=8)
    grc.compile(str(folder / "served.py"), None, options)
    return folder / "spoken.grc"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recommender trained for two epochs on made-up ratings."""
    from movielens import data, train
    from movielens.corpus import Corpus

    folder = tmp_path_factory.mktemp("movielens")
    write_atomic(folder, *sample())
    corpus = Corpus(data.load(folder))
    recipe = train.Recipe(epochs=2, ahead=2, batch=32, rate=1e-2, dropout=0.1, decay=0.1)
    train.save(train.train(corpus, TINY, recipe, quiet=True), corpus, TINY, {}, folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture(scope="session")
def films(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("films") / "films.grc"
    return compiled(EXAMPLES / "movielens/model.py", output, GRC_MOVIELENS_CHECKPOINT=str(checkpoint))


@pytest.fixture(scope="session")
def requests(checkpoint: Path) -> list[dict]:
    """A few users with their behaviours."""
    return json.loads((checkpoint / "requests.json").read_text())[:4]
