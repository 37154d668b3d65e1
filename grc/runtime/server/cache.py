"""A cache of bounded memory: the least recently used goes first, and nothing is given out after its time to live."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

ENTRY = 256  # bytes that an entry costs beside its value: the key, the record and its place in the order


class Cache:
    """Used on the event loop alone, so that no lock is needed. `limit` counts bytes; 0 keeps nothing. `changed` counts entries
    that were there, but made of something else than what was asked for."""

    def __init__(self, limit: int, ttl: float, clock: Callable[[], float] = time.monotonic):
        self.limit, self.ttl, self.clock = limit, ttl, clock
        self.entries: OrderedDict[Hashable, tuple[Any, int, float]] = OrderedDict()
        self.bytes = self.hits = self.misses = self.changed = self.evicted = 0

    @property
    def on(self) -> bool:
        return self.limit > 0

    def get(self, key: Hashable) -> Any:
        """The value, or None where there is none or it is too old."""
        entry = self.entries.get(key)
        if entry is not None and entry[2] <= self.clock():
            self.discard(key)
            entry = None
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self.entries.move_to_end(key)
        return entry[0]

    def put(self, key: Hashable, value: Any, size: int) -> None:
        """Keep a value of `size` bytes; one larger than the whole cache is not kept."""
        self.discard(key)
        size += ENTRY
        if size > self.limit:
            return
        self.entries[key] = value, size, self.clock() + self.ttl
        self.bytes += size
        while self.bytes > self.limit:
            _, (_, freed, _) = self.entries.popitem(last=False)
            self.bytes -= freed
            self.evicted += 1

    def discard(self, key: Hashable) -> None:
        entry = self.entries.pop(key, None)
        if entry is not None:
            self.bytes -= entry[1]
