"""Several ways to launch a kernel, of which a run takes one: how many rows it has may not be known when it is compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch

Way = TypeVar("Way")
Tile = TypeVar("Tile", bound=tuple[int, ...])


def by_count(count: Any, ways: Sequence[tuple[Way, int]], last: Way) -> list[tuple[Way, Any]]:
    """Every way with 1 where it is the one to take, and 0 where it is not: the first that is for as many or more, or else the
    last. Where the count is known it comes alone."""
    if isinstance(count, int):
        return [(next((way for way, most in ways if count <= most), last), 1)]
    found: list[tuple[Way, Any]] = []
    fewer: Any = 0
    for way, most in ways:
        asked = torch.sym_min(most // torch.sym_max(count, 1), 1)
        found.append((way, asked - fewer))
        fewer = asked
    return [*found, (last, 1 - fewer)]


def as_measured(count: Any, tiles: Sequence[int] | None, usual: Tile) -> list[tuple[Tile, Any]]:
    """The tiles of a kernel as `by_count` gives its ways. `tiles` were measured: the most rows that one is for, then its
    numbers, and so on, the last for all that are more; without them there is the `usual` one."""
    if not tiles:
        return [(usual, 1)]
    step, kind = 1 + len(usual), cast(Callable[..., Tile], type(usual))
    found = [(kind(*tiles[at + 1 : at + step]), tiles[at]) for at in range(0, len(tiles), step)]
    return by_count(count, found[:-1], found[-1][0])
