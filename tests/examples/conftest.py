"""A made-up MovieLens for the tests of the examples, small enough to train on in a second."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

from movielens import data, train
from movielens.corpus import DAY, Corpus

NINETIES = 870_000_000
TINY = {"width": 16, "heads": 2, "ffn": 32, "layers": 1}
QUICK = train.Recipe(epochs=2, ahead=2, batch=32, rate=1e-2, dropout=0.1, decay=0.1)


def sample(films: int = 30, users: int = 12, ratings: int = 15) -> tuple[list, list, list]:
    """Rows of the three files. User u rates films u, u + 1, ... a minute apart, and the last two a day later each."""
    items = [(f, f"Film {f}", 1990 + f % 9, "Comedy" if f % 2 else "Drama War") for f in range(1, films + 1)]
    people = [(u, 15 + 3 * u, "M", "student" if u % 2 else "writer", "00000") for u in range(1, users + 1)]
    rows = []
    for u in range(1, users + 1):
        for n in range(ratings):
            late = max(0, n - ratings + 3)
            rows.append((u, (u + n) % films + 1, 1 + (u + n) % 5, NINETIES + 1000 * u + 60 * n + 2 * late * DAY))
    return items, people, rows


def write_atomic(folder: Path, items: list, people: list, rows: list) -> None:
    headers = {
        "item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
        "user": "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token",
        "inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float",
    }
    for ending, table in (("item", items), ("user", people), ("inter", rows)):
        lines = [headers[ending], *("\t".join(map(str, row)) for row in table)]
        (folder / f"ml-100k.{ending}").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_grouplens(folder: Path, items: list, people: list, rows: list) -> None:
    lines = []
    for item, title, year, genres in items:
        flags = ["1" if genre in genres.split() else "0" for genre in data.GENRES]
        lines.append("|".join([str(item), f"{title} ({year})", f"01-Jan-{year}", "", "http://film", *flags]))
    (folder / "u.item").write_text("\n".join(lines) + "\n", encoding="latin-1")
    (folder / "u.user").write_text("".join("|".join(map(str, row)) + "\n" for row in people))
    (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))


@pytest.fixture
def write() -> Callable[..., None]:
    """Write the sample as `form` ("atomic" or "grouplens"); `rows` replaces its ratings, `more` adds to them."""

    def write(folder: Path, form: str = "atomic", rows: list | None = None, more: tuple = ()) -> None:
        items, people, ratings = sample()
        writer = {"atomic": write_atomic, "grouplens": write_grouplens}[form]
        writer(folder, items, people, [*(rows or ratings), *more])

    return write


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    write_atomic(tmp_path, *sample())
    return Corpus(data.load(tmp_path))


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Corpus) -> Path:
    folder = tmp_path / "checkpoint"
    train.save(train.train(corpus, TINY, QUICK, quiet=True), corpus, TINY, {}, folder)
    monkeypatch.setenv("GRC_MOVIELENS_CHECKPOINT", str(folder))
    return folder
