"""Features of users: what preprocess made of a user's behaviours, kept until the user's version changes.

A request names its user and the version of the user's behaviours, a number that grows with every change. Features are
kept for the newest version alone, and given to requests of the very body that they were made of. Computing them takes time
in which others may come and go: what was computed for a version that is no longer the newest, or for a user that was
forgotten meanwhile, is used for its own request and not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from grc.runtime.server.cache import Cache

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class User:
    """Whose features, in which version of the user's behaviours, for a request of which body: its digest."""

    name: str
    version: int
    body: bytes


@dataclass(eq=False)
class Making:
    """Features that are being computed; `stale` once their user was forgotten or has moved on."""

    key: tuple[str, str, str]
    user: User
    stale: bool = False


class Features:
    def __init__(self, cache: Cache):
        self.cache = cache
        self.making: dict[tuple[str, str, str], set[Making]] = {}

    def get(self, model: str, number: str, user: User) -> Tensors | None:
        """The features of this very version of the user, made of this very body; there is nothing for any other."""
        found = self.cache.get((model, number, user.name))
        if found is None:
            return None
        kept, features = found
        if kept == user:
            return features
        self.cache.hits -= 1  # there, but of no use
        if kept.version == user.version:
            self.cache.changed += 1
        else:
            self.cache.misses += 1
        return None

    def begin(self, model: str, number: str, user: User) -> Making:
        """Say that features are about to be computed, which makes those of older versions stale."""
        making = Making((model, number, user.name), user)
        others = self.making.setdefault(making.key, set())
        for other in others:
            other.stale |= other.user.version < user.version
            making.stale |= other.user.version > user.version
        others.add(making)
        return making

    def end(self, making: Making, features: Tensors | None) -> None:
        """Keep what was computed, if it is still the newest; None where computing it failed."""
        others = self.making[making.key]
        others.discard(making)
        if not others:
            del self.making[making.key]
        if making.stale or features is None:
            return
        kept = self.cache.entries.get(making.key)
        if kept is not None and kept[0][0].version > making.user.version and kept[2] > self.cache.clock():
            return
        own = [tensor.clone() for tensor in features]  # not a view of something larger that would be kept with it
        self.cache.put(making.key, (making.user, own), sum(t.nbytes for t in own))

    def forget(self, model: str, user: str) -> None:
        """Drop a user's features in every version of the model, and those that are being computed now."""
        mine: Callable[[tuple[str, str, str]], bool] = lambda key: key[0] == model and key[2] == user  # noqa: E731
        for key in [key for key in self.cache.entries if mine(key)]:  # type: ignore[arg-type]
            self.cache.discard(key)
        for key, others in self.making.items():
            if mine(key):
                for making in others:
                    making.stale = True
