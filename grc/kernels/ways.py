"""Several ways to launch a kernel, of which a run takes one: how many rows it has may not be known when it is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

Way = TypeVar("Way")


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
