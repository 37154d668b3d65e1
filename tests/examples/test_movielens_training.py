"""The MovieLens recommender's split and labels, its training, and its model file, on made-up data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from movielens import data, model, train
from movielens.corpus import DAY, TASKS, Corpus

from tests.examples.conftest import QUICK, TINY

NINETIES = 870_000_000


# Corpus


def test_split_leaves_the_two_newest_ratings_out(corpus: Corpus) -> None:
    assert (len(corpus.train), len(corpus.validation), len(corpus.test)) == (12 * 12, 12, 12)
    for test in corpus.test.tolist():
        user = corpus.data.user == corpus.data.user[test]
        assert corpus.data.time[test] == corpus.data.time[user].max()
    assert (corpus.validation == corpus.test - 1).all()
    held_out = {(int(corpus.start[e]), int(corpus.film[e])) for e in [*corpus.validation, *corpus.test]}
    for example, films in zip(corpus.train, corpus.labels(corpus.train, ahead=4).films, strict=True):
        assert films[0] == corpus.film[example]
        assert not held_out & {(int(corpus.start[example]), int(film)) for film in films if film >= 0}


def test_windows_stay_with_one_user_and_before_the_target(corpus: Corpus) -> None:
    for example in corpus.train[::5].tolist():
        steps = corpus.windows(np.array([example]))
        films = steps.film[steps.present].tolist()
        assert films == corpus.seen(example)[-10:].tolist()
        assert corpus.film[example] not in films


def test_labels_of_the_tasks(corpus: Corpus) -> None:
    tasks = dict(zip(TASKS, corpus.labels(corpus.test).tasks.T, strict=True))
    np.testing.assert_array_equal(tasks["engagement"], corpus.data.rating[corpus.test] >= 4)
    years = np.array([corpus.vocabulary.films[film]["year"] for film in corpus.film[corpus.test]])
    np.testing.assert_array_equal(tasks["monetization"], years >= 1996)  # the ratings are of July 1997


def test_retention_is_a_return_on_a_later_day(tmp_path: Path, write: Callable[..., None]) -> None:
    days = [0, 0, 0.5, 10, 50, 51, 100]
    write(tmp_path, rows=[(1, n + 1, 3, NINETIES + int(day * DAY)) for n, day in enumerate(days)])
    retention = Corpus(data.load(tmp_path)).tasks[:, TASKS.index("retention")]
    # From the newest day before each rating, 0 0 0 .5 10 50 51: something from 1 to 30 days on? The data ends at 100.
    assert retention.tolist() == [1, 1, 1, 1, 0, 0, 0]


# Training and the model file


def test_training_lowers_the_loss_and_repeats(corpus: Corpus) -> None:
    def cost(recommender: model.Recommender) -> float:
        inputs, labels = torch.from_numpy(corpus.inputs(corpus.train)), corpus.labels(corpus.train)
        with torch.no_grad():
            return float(train.loss(recommender(inputs), labels, 0.1))

    short, long, again = (
        train.train(corpus, TINY, train.Recipe(**{**vars(QUICK), "epochs": epochs}), quiet=True)
        for epochs in (1, 20, 20)
    )
    assert cost(long) < 0.8 * cost(short)
    assert cost(long) == cost(again)
    assert not long.training


def test_popularity_baseline_counts_by_hand(corpus: Corpus) -> None:
    figures = train.rank(None, corpus, corpus.test)
    expected = []
    for example in corpus.test.tolist():
        unseen = np.setdiff1d(np.arange(30), corpus.seen(example))
        mine = corpus.popularity[corpus.film[example]]
        expected.append((corpus.popularity[unseen] >= mine).sum() <= 10)
    assert figures["hr@10"] == pytest.approx(np.mean(expected))


def test_constant_scores_earn_nothing(corpus: Corpus) -> None:
    constant = model.Recommender(films=30, **TINY).eval()
    torch.nn.init.zeros_(constant.recommendation.weight)
    torch.nn.init.zeros_(constant.recommendation.bias)
    figures = train.rank(constant, corpus, corpus.test)
    assert figures["hr@10"] == 0 and figures["ndcg@10"] == 0


def test_area_under_the_curve() -> None:
    scores = np.array([0.1, 0.4, 0.4, 0.9], dtype=np.float32)
    assert train.area(scores, np.array([0, 0, 1, 1], dtype=np.float32)) == pytest.approx(3.5 / 4)


def test_model_file_serves_a_request_end_to_end(checkpoint: Path) -> None:
    recommender = model.get_model()
    assert not any(module.training for module in recommender.modules())
    body = {"behaviours": [{"item": i, "time": NINETIES + i} for i in range(1, 6)], "user": {"age": 30}}
    (x,) = model.preprocess(body, assets=checkpoint)
    assert x.shape == model.get_inputs(1)[0].shape and x.dtype == torch.float32
    with torch.no_grad():
        answer = json.loads(json.dumps(model.postprocess(recommender(x), body, assets=checkpoint)))
    assert len(answer["films"]) == 10
    assert not {film["item"] for film in answer["films"]} & {1, 2, 3, 4, 5}
    scores = [film["score"] for film in answer["films"]]
    assert scores == sorted(scores, reverse=True)
    assert all(film["title"] == f"Film {film['item']}" for film in answer["films"])
    assert all(0 < answer[task] < 1 for task in TASKS)


def test_postprocess_without_a_request_leaves_no_film_out(checkpoint: Path) -> None:
    outputs = {"recommendation": torch.arange(30.0)[None], **{task: torch.tensor([0.5]) for task in TASKS}}
    best = [film["score"] for film in model.postprocess(outputs, assets=checkpoint)["films"]]
    assert best == list(range(29, 19, -1))
    with pytest.raises(ValueError, match="60 scores for 30 films"):
        model.postprocess({**outputs, "recommendation": torch.zeros(2, 30)}, assets=checkpoint)


def test_rows_of_a_batch_are_independent(checkpoint: Path) -> None:
    recommender, (x,) = model.get_model(), model.get_inputs(3)
    with torch.no_grad():
        together = recommender(x)
        for i in range(3):
            for name, alone in recommender(x[i : i + 1]).items():
                torch.testing.assert_close(together[name][i : i + 1], alone, rtol=1e-4, atol=1e-6)


def test_inputs_and_calibration_are_real_and_seeded(checkpoint: Path) -> None:
    assert torch.equal(model.get_inputs(4)[0], model.get_inputs(4)[0])
    assert not torch.equal(model.get_inputs(4)[0], model.get_inputs(4, seed=1)[0])
    batches = model.calibration()
    assert sum(len(batch["labels"]) for batch in batches) == 12
    for batch in batches:
        (x,) = batch["inputs"]
        assert x.shape == (len(batch["labels"]), 10, 1024)
        assert batch["labels"].dtype == torch.int64 and batch["labels"].min() >= 0 and batch["labels"].max() < 30


def test_missing_checkpoint_says_how_to_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRC_MOVIELENS_CHECKPOINT", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"run: python examples/movielens/train\.py --size small"):
        model.get_model()
    monkeypatch.setenv("GRC_MOVIELENS_SIZE", "huge")
    with pytest.raises(ValueError, match="the sizes are seed, small"):
        model.get_model()
