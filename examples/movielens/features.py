"""Behaviours -> features. Needs numpy and the vocabulary that training wrote, and no training code.

A request becomes [10, 1024] float32, every value from 0 to 1: the 10 most recent behaviours, oldest first; when there
are fewer, the rows in front are zero. TABLE below says what the 1024 columns mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from movielens.schema import DEVICES, INTERACTIONS, Request

STEPS = 10
WIDTH = 1024
AGES = (18, 25, 35, 45, 50, 56)  # the age groups of MovieLens-1M
YEARS = (1940, 1960, 1970, 1980, 1990, 1995, 1996, 1997, 1998)
GAPS = (1, 10, 60, 600, 3600, 86_400)  # seconds

# name, columns, meaning
TABLE = (
    ("film", 768, "1 in the film's own column, for the 768 films rated most often"),
    ("code", 128, "two columns for any other film: a pair that no other film has"),
    ("unknown_film", 1, "the film is not in the vocabulary"),
    ("genre", 20, "the film's genres, in the vocabulary's order"),
    ("year", 10, "year of release, parted at YEARS; none set if not known"),
    ("watched", 1, "the watch signal itself"),
    ("watched_fifth", 5, "which fifth the watch signal is in: for MovieLens the number of stars"),
    ("interaction", 6, "one of INTERACTIONS"),
    ("gap", 8, "seconds since the behaviour before, parted at GAPS; the last column if there is none before"),
    ("since", 7, "seconds from here to the newest behaviour, parted at GAPS"),
    ("hour", 8, "hour of the day in UTC, by threes"),
    ("weekday", 7, "Monday first"),
    ("position", STEPS, "how many behaviours came after, 0 to 9"),
    ("device", 5, "one of DEVICES"),
    ("age", 8, "the user's age, parted at AGES; the last column if not known"),
    ("occupation", 22, "the user's occupation, in the vocabulary's order; the last column if not known"),
    ("present", 1, "1 where there is a behaviour, 0 in the rows in front"),
    ("spare", 9, "always 0"),
)


def _layout() -> dict[str, slice]:
    layout, start = {}, 0
    for name, width, _ in TABLE:
        layout[name] = slice(start, start + width)
        start += width
    return layout


LAYOUT = _layout()
_FILM_WIDTH = LAYOUT["year"].stop


@dataclass(frozen=True)
class Steps:
    """A batch of windows, as arrays [B, 10] (age and occupation [B]); -1 means not known or none."""

    film: NDArray[np.int64]
    present: NDArray[np.bool_]
    watched: NDArray[np.float32]
    interaction: NDArray[np.int64]
    time: NDArray[np.int64]
    gap: NDArray[np.int64]
    device: NDArray[np.int64]
    age: NDArray[np.int64]
    occupation: NDArray[np.int64]


class Vocabulary:
    """The films, genres and occupations that the model knows; films in falling order of popularity."""

    def __init__(self, films: Sequence[Mapping[str, Any]], genres: Sequence[str], occupations: Sequence[str]):
        limits = (("genres", genres, 20), ("occupations", occupations, 21))
        for what, values, most in limits:
            if len(values) > most:
                raise ValueError(f"{len(values)} {what}, but the layout has room for {most}")
        self.films = list(films)
        self.genres = list(genres)
        self.occupations = list(occupations)
        self.index = {int(film["id"]): i for i, film in enumerate(self.films)}
        self.table = self._film_table()

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        body = {"films": self.films, "genres": self.genres, "occupations": self.occupations}
        path.write_text(json.dumps(body, ensure_ascii=False, indent=0), encoding="utf-8")

    def _film_table(self) -> NDArray[np.float32]:
        """[films + 1, columns up to `year`]: what a film alone decides; the last row is the unknown film."""
        own, code = LAYOUT["film"], LAYOUT["code"]
        own_width, code_width = own.stop - own.start, code.stop - code.start
        pairs = [(i, (i + step) % code_width) for step in range(1, code_width // 2) for i in range(code_width)]
        if len(self.films) > own_width + len(pairs):
            raise ValueError(f"{len(self.films)} films, but the layout tells {own_width + len(pairs)} apart")
        table = np.zeros((len(self.films) + 1, _FILM_WIDTH), dtype=np.float32)
        for i, film in enumerate(self.films):
            if i < own_width:
                table[i, own.start + i] = 1
            else:
                table[i, [code.start + place for place in pairs[i - own_width]]] = 1
            table[i, [LAYOUT["genre"].start + self.genres.index(genre) for genre in film["genres"]]] = 1
            if film["year"] is not None:
                table[i, LAYOUT["year"].start + np.searchsorted(YEARS, film["year"], side="right")] = 1
        table[-1, LAYOUT["unknown_film"]] = 1
        return table


def encode(vocabulary: Vocabulary, steps: Steps) -> NDArray[np.float32]:
    """Windows -> features [B, 10, 1024]."""
    batch = len(steps.film)
    features = np.zeros((batch, STEPS, WIDTH), dtype=np.float32)
    features[..., :_FILM_WIDTH] = vocabulary.table[steps.film]

    def one_hot(name: str, value: NDArray[Any]) -> None:
        columns = LAYOUT[name]
        place = np.where(value < 0, columns.stop - 1, columns.start + value)
        np.put_along_axis(features, np.broadcast_to(place, (batch, STEPS))[..., None], 1, axis=2)

    features[..., LAYOUT["watched"].start] = steps.watched
    one_hot("watched_fifth", np.clip(np.ceil(steps.watched * 5 - 1e-4).astype(np.int64) - 1, 0, 4))
    one_hot("interaction", steps.interaction)
    one_hot("gap", np.where(steps.gap < 0, -1, np.searchsorted(GAPS, steps.gap, side="right")))
    one_hot("since", np.searchsorted(GAPS, steps.time[:, -1:] - steps.time, side="right"))
    one_hot("hour", steps.time // 3600 % 24 // 3)
    one_hot("weekday", (steps.time // 86_400 + 3) % 7)  # 1 January 1970 was a Thursday
    one_hot("position", np.arange(STEPS - 1, -1, -1))
    one_hot("device", steps.device)
    age = np.where(steps.age < 0, -1, np.searchsorted(AGES, steps.age, side="right"))
    one_hot("age", age[:, None])
    one_hot("occupation", steps.occupation[:, None])
    features[..., LAYOUT["present"].start] = 1
    features *= steps.present[..., None]
    return features


def windows(vocabulary: Vocabulary, requests: Sequence[Request]) -> Steps:
    """The 10 most recent behaviours of each request, as arrays."""
    shape = (len(requests), STEPS)
    film, interaction, time, gap, device = (np.zeros(shape, dtype=np.int64) for _ in range(5))
    present, watched = np.zeros(shape, dtype=np.bool_), np.zeros(shape, dtype=np.float32)
    age, occupation = (np.full(len(requests), -1, dtype=np.int64) for _ in range(2))
    for b, request in enumerate(requests):
        done = request.behaviours
        first = max(0, len(done) - STEPS)
        for i in range(first, len(done)):
            s = STEPS - len(done) + i
            present[b, s] = True
            film[b, s] = vocabulary.index.get(done[i].item, -1)
            watched[b, s] = done[i].watched
            interaction[b, s] = INTERACTIONS.index(done[i].interaction)
            device[b, s] = DEVICES.index(done[i].device)
            time[b, s] = done[i].time
            gap[b, s] = done[i].time - done[i - 1].time if i else -1
        if request.user.age is not None:
            age[b] = request.user.age
        if request.user.occupation in vocabulary.occupations:
            occupation[b] = vocabulary.occupations.index(request.user.occupation)
    return Steps(film, present, watched, interaction, time, gap, device, age, occupation)


def preprocess(vocabulary: Vocabulary, request: object) -> NDArray[np.float32]:
    """A request as JSON -> features [1, 10, 1024]. Raises RequestError on a request that breaks the schema."""
    return encode(vocabulary, windows(vocabulary, [Request.from_json(request)]))


def postprocess(
    vocabulary: Vocabulary, outputs: Mapping[str, Any], request: object | None = None, count: int = 10
) -> dict[str, Any]:
    """The model's outputs for one request -> its best films and the three task scores, ready for JSON.

    Films that the request's behaviours name are left out; without a request nothing is.
    """
    scores = np.asarray(outputs["recommendation"], dtype=np.float64).reshape(-1)
    if len(scores) != len(vocabulary.films):
        raise ValueError(f"{len(scores)} scores for {len(vocabulary.films)} films: one request at a time")
    seen = set() if request is None else {behaviour.item for behaviour in Request.from_json(request).behaviours}
    order = (i for i in np.argsort(-scores, kind="stable") if vocabulary.films[i]["id"] not in seen)
    best = [i for i, _ in zip(order, range(count), strict=False)]
    tasks = {
        name: float(np.asarray(outputs[name]).reshape(-1)[0]) for name in ("engagement", "retention", "monetization")
    }
    films = [
        {"item": vocabulary.films[i]["id"], "title": vocabulary.films[i]["title"], "score": float(scores[i])}
        for i in best
    ]
    return {"films": films, **tasks}
