"""What a request to the recommender holds: the behaviours of one user, and who the user is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

INTERACTIONS = ("view", "like", "dislike", "save", "share", "skip")
DEVICES = ("unknown", "phone", "tablet", "computer", "tv")


class RequestError(ValueError):
    """A request does not follow the schema; the message names the field, what it held, and what it may hold."""


@dataclass(frozen=True)
class Behaviour:
    """One thing a user did to one film.

    `item` is the film's id in the data, `time` is in seconds since 1970 UTC, and `watched` says how much of the film
    was watched, from 0 to 1. MovieLens knows ratings only: there the rating over 5 stands in for `watched`, 4 and 5
    stars for "like", 1 and 2 for "dislike", 3 for "view", and the device is "unknown".
    """

    item: int
    time: int
    watched: float = 1.0
    interaction: str = "view"
    device: str = "unknown"

    def __post_init__(self) -> None:
        _integer("item", self.item, at_least=0)
        _integer("time", self.time, at_least=0)
        if isinstance(self.watched, bool) or not isinstance(self.watched, int | float):
            raise RequestError(f"watched must be a number from 0 to 1, not {self.watched!r}")
        if not math.isfinite(self.watched) or not 0 <= self.watched <= 1:
            raise RequestError(f"watched must be from 0 to 1, not {self.watched!r}")
        _one_of("interaction", self.interaction, INTERACTIONS)
        _one_of("device", self.device, DEVICES)


@dataclass(frozen=True)
class User:
    """Who asks. Both facts may be missing; an occupation that training never met counts as missing."""

    age: int | None = None
    occupation: str | None = None

    def __post_init__(self) -> None:
        if self.age is not None:
            _integer("age", self.age, at_least=0)
            if self.age > 130:
                raise RequestError(f"age must be at most 130, not {self.age}")
        if self.occupation is not None and not isinstance(self.occupation, str):
            raise RequestError(f"occupation must be a string, not {self.occupation!r}")


@dataclass(frozen=True)
class Request:
    """Behaviours in the order of their times (equal times keep the order given), and the user."""

    behaviours: tuple[Behaviour, ...]
    user: User = field(default_factory=User)

    @classmethod
    def from_json(cls, request: object) -> Request:
        """Read `{"behaviours": [{"item": 50, "time": 881250949, ...}, ...], "user": {"age": 24}}`.

        Raises RequestError, which names the behaviour at fault by its place in the list.
        """
        body = _mapping("the request", request)
        _known("the request", body, ("behaviours", "user"))
        listed = body.get("behaviours")
        if not isinstance(listed, list) or not listed:
            raise RequestError("behaviours must be a list with at least one behaviour")
        behaviours = []
        for i, entry in enumerate(listed):
            try:
                behaviours.append(_build(Behaviour, entry))
            except RequestError as error:
                raise RequestError(f"behaviours[{i}]: {error}") from None
        try:
            user = _build(User, body.get("user") or {})
        except RequestError as error:
            raise RequestError(f"user: {error}") from None
        return cls(tuple(sorted(behaviours, key=lambda behaviour: behaviour.time)), user)


def _build(kind: type, value: object) -> Any:
    names = tuple(entry.name for entry in fields(kind))
    values = _mapping(kind.__name__.lower(), value)
    _known(kind.__name__.lower(), values, names)
    missing = [name for name in ("item", "time") if name in names and name not in values]
    if missing:
        raise RequestError(f"{missing[0]} is missing")
    return kind(**values)


def _mapping(what: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RequestError(f"{what} must be an object, not {type(value).__name__}")
    return value


def _known(what: str, values: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for name in values:
        if name not in names:
            raise RequestError(f"{what} has no field {name!r}; it has {', '.join(names)}")


def _integer(name: str, value: object, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be an integer, not {value!r}")
    if not at_least <= value < 2**63:
        raise RequestError(f"{name} must be from {at_least} to 2**63 - 1, not {value}")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RequestError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
