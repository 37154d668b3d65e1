"""MovieLens as training examples: which window predicts which film, and what happened next.

Split: each user's last rating is for the test, the one before for validation, all others for training (leave one out,
in the order of time). Labels, all of the rating that follows the window:

film          the film itself
engagement    it is rated 4 or 5 stars
retention     the user rates something between 1 and 30 days after the window's newest rating; not known (-1) in the
              last 30 days of the data
monetization  a proxy, for MovieLens knows no sales: the film was released in the year of the rating or the year before,
              as a new release is what a shop earns most with
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from movielens import features
from movielens.data import MovieLens, behaviour
from movielens.schema import DEVICES, INTERACTIONS, Request

DAY = 86_400
TASKS = ("engagement", "retention", "monetization")
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Labels:
    """films [B, ahead] int64, -1 where the user rated fewer; tasks [B, 3] float32 as TASKS, -1 where not known."""

    films: Index
    tasks: NDArray[np.float32]


class Corpus:
    """Every rating is an example, named by its place in the data: the ratings of the user before it predict it."""

    def __init__(self, data: MovieLens):
        self.data = data
        starts = np.flatnonzero(np.diff(data.user, prepend=-1))
        lengths = np.diff(starts, append=len(data.user))
        self.start = np.repeat(starts, lengths)
        place = np.arange(len(data.user)) - self.start
        left = np.repeat(lengths, lengths) - place
        long_enough = np.repeat(lengths, lengths) >= 4
        self.train = np.flatnonzero((place > 0) & (left > 2) & long_enough)
        self.validation = np.flatnonzero((left == 2) & long_enough)
        self.test = np.flatnonzero((left == 1) & long_enough)
        self.train_end = starts.repeat(lengths) + np.repeat(lengths, lengths) - 2
        held_out = np.concatenate([self.validation, self.test])
        self.vocabulary = self._vocabulary(np.delete(data.item, held_out))
        self.film = np.array([self.vocabulary.index[item] for item in data.item.tolist()])
        self.popularity = np.bincount(np.delete(self.film, held_out), minlength=len(self.vocabulary.films))
        self._columns()

    def _vocabulary(self, items: Index) -> features.Vocabulary:
        """All films, those that training met most often first, so that the common ones get a column of their own."""
        ids, counts = np.unique(items, return_counts=True)
        met = dict(zip(ids.tolist(), counts.tolist(), strict=True))
        order = sorted(self.data.films, key=lambda item: (-met.get(item, 0), item))
        films = []
        for item in order:
            film = self.data.films[item]
            films.append({"id": item, "title": film.title, "year": film.year, "genres": list(film.genres)})
        genres = sorted({genre for film in self.data.films.values() for genre in film.genres})
        occupations = sorted({user.occupation for user in self.data.users.values() if user.occupation})
        return features.Vocabulary(films, genres, occupations)

    def _columns(self) -> None:
        data, vocabulary = self.data, self.vocabulary
        rated = zip(data.item.tolist(), data.rating.tolist(), data.time.tolist(), strict=True)
        behaviours = [behaviour(item, rating, time) for item, rating, time in rated]
        self.watched = np.array([b.watched for b in behaviours], dtype=np.float32)
        self.interaction = np.array([INTERACTIONS.index(b.interaction) for b in behaviours])
        self.device = np.array([DEVICES.index(b.device) for b in behaviours])
        people = [data.users[user] for user in data.user.tolist()]
        self.age = np.array([-1 if person.age is None else person.age for person in people])
        self.occupation = np.array([vocabulary.occupations.index(p.occupation) if p.occupation else -1 for p in people])
        self.gap = np.where(np.arange(len(data.time)) == self.start, -1, np.diff(data.time, prepend=0))
        self.tasks = np.stack([data.rating >= 4, self._returns(), self._new_release()], axis=1).astype(np.float32)

    def _returns(self) -> NDArray[np.float32]:
        time, last_known = self.data.time, self.data.time.max() - 30 * DAY
        returns = np.zeros(len(time), dtype=np.float32)
        for start in np.unique(self.start):
            mine = slice(start, start + np.count_nonzero(self.start == start))
            newest = np.concatenate([time[mine][:1], time[mine][:-1]])
            first_later = np.searchsorted(time[mine], newest + DAY, side="right")
            until = np.searchsorted(time[mine], newest + 30 * DAY, side="right")
            returns[mine] = np.where(newest > last_known, -1, until > first_later)
        return returns

    def _new_release(self) -> NDArray[np.bool_]:
        rated = np.array([datetime.fromtimestamp(time, UTC).year for time in self.data.time.tolist()])
        released = np.array([self.vocabulary.films[film]["year"] or 0 for film in self.film])
        return released >= rated - 1

    def windows(self, examples: Index) -> features.Steps:
        """The up to 10 ratings before each example."""
        at = examples[:, None] + np.arange(-features.STEPS, 0)
        present = at >= self.start[examples][:, None]
        at = np.where(present, at, 0)
        return features.Steps(
            film=self.film[at],
            present=present,
            watched=self.watched[at],
            interaction=self.interaction[at],
            time=self.data.time[at],
            gap=self.gap[at],
            device=self.device[at],
            age=self.age[examples],
            occupation=self.occupation[examples],
        )

    def inputs(self, examples: Index) -> NDArray[np.float32]:
        """Features [B, 10, 1024], by the code that serving runs."""
        return features.encode(self.vocabulary, self.windows(examples))

    def labels(self, examples: Index, ahead: int = 1) -> Labels:
        """What followed each window: the next `ahead` films, none of them held out, and the tasks of the first."""
        at = examples[:, None] + np.arange(ahead)
        inside = at < np.maximum(self.train_end[examples], examples + 1)[:, None]
        return Labels(np.where(inside, self.film[np.where(inside, at, 0)], -1), self.tasks[examples])

    def seen(self, example: int) -> Index:
        """The films that the user rated before the example."""
        return self.film[self.start[example] : example]

    def request(self, example: int) -> Request:
        """The example's window as the request that serving would get."""
        data = self.data
        at = range(max(self.start[example], example - features.STEPS - 1), example)
        behaviours = tuple(behaviour(int(data.item[i]), float(data.rating[i]), int(data.time[i])) for i in at)
        return Request(behaviours, data.users[int(data.user[example])])
