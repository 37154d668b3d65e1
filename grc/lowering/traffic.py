"""Buckets learnt from traffic: the batch sizes whose graphs answer a log of real requests in the least expected time."""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from grc.errors import LoweringError

MOST = 8  # buckets: each holds graphs and a workspace on the device
DISTINCT = 512  # sizes to choose from; a log of more has its sizes rounded up
Seconds = Callable[[int], float]


def read_traffic(path: Path) -> Counter[int]:
    """How often each batch size occurs: a line holds a size, or a size and a count. Raises LoweringError for others."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise LoweringError(f"can't read {path}: {reason}", "give a file of batch sizes, one a line") from error
    found: Counter[int] = Counter()
    for number, line in enumerate(lines, 1):
        words = line.replace(",", " ").split()
        if not words:
            continue
        if len(words) > 2 or not all(word.isdecimal() for word in words) or int(words[0]) < 1:
            raise LoweringError(
                f"{path.name}:{number} is {line.strip()!r}, not a batch size", "write a size, or a size and a count"
            )
        found[int(words[0])] += int(words[1]) if len(words) == 2 else 1
    if not found.total():
        raise LoweringError(f"{path.name} holds no batch sizes", "write one a line, as they came")
    return found


def interpolated(measured: Mapping[int, float]) -> Seconds:
    """The time of a batch between two measured ones, on the line through them; beyond the ends, of the nearest one."""
    sizes = sorted(measured)

    def seconds(batch: int) -> float:
        at = bisect.bisect_left(sizes, batch)
        if at == len(sizes) or sizes[at] == batch or at == 0:
            return measured[sizes[min(at, len(sizes) - 1)]]
        low, high = sizes[at - 1], sizes[at]
        share = (batch - low) / (high - low)
        return measured[low] * (1 - share) + measured[high] * share

    return seconds


def pieces(traffic: Mapping[int, int], largest: int) -> Counter[int]:
    """The sizes that reach a bucket: what is larger than the largest is answered in pieces of it."""
    found: Counter[int] = Counter()
    for size, count in traffic.items():
        whole, rest = divmod(size, largest)
        found[largest] += whole * count
        if rest:
            found[rest] += count
    return +found


def expected(traffic: Mapping[int, int], buckets: Sequence[int], seconds: Seconds) -> float:
    """Seconds of a request on average, padded to the smallest bucket that holds it."""
    held = pieces(traffic, buckets[-1])
    total = sum(count * seconds(buckets[bisect.bisect_left(buckets, size)]) for size, count in held.items())
    return total / sum(traffic.values())


def learn(
    traffic: Mapping[int, int], smallest: int, largest: int, seconds: Seconds, most: int = MOST
) -> tuple[int, ...]:
    """At most `most` buckets, `largest` among them, of the least expected time.

    A bucket that is not the size of some request could be smaller, so only those are tried: the cheapest way to cover
    the first n sizes with k buckets follows from those with k - 1.
    """
    step = math.ceil(largest / DISTINCT)
    counts: Counter[int] = Counter()
    for size, count in pieces(traffic, largest).items():
        counts[min(largest, max(smallest, -(-size // step) * step if step > 1 else size))] += count
    counts[largest] += 0
    sizes = sorted(counts)
    before = [0]
    for size in sizes:
        before.append(before[-1] + counts[size])
    costs = [seconds(size) for size in sizes]
    best = [0.0, *[math.inf] * len(sizes)]
    chains: list[tuple[int, ...]] = [()] * (len(sizes) + 1)
    winner: tuple[float, tuple[int, ...]] = (math.inf, ())
    for _ in range(most):
        nearer = [math.inf] * (len(sizes) + 1)
        chained: list[tuple[int, ...]] = [()] * (len(sizes) + 1)
        for end in range(1, len(sizes) + 1):
            total, start = min(
                (best[start] + (before[end] - before[start]) * costs[end - 1], start) for start in range(end)
            )
            nearer[end], chained[end] = total, (*chains[start], sizes[end - 1])
        best, chains = nearer, chained
        winner = min(winner, (best[-1], chains[-1]), key=lambda found: found[0])
    return winner[1]


def told(traffic: Mapping[int, int], learnt: Sequence[int], usual: Sequence[int], seconds: Seconds) -> str:
    """What learning gained, for people."""
    ours, theirs = (expected(traffic, buckets, seconds) for buckets in (learnt, usual))
    count = sum(traffic.values())
    return (
        f"buckets {', '.join(map(str, learnt))} learnt from {count} requests: "
        f"{ours * 1e6:.1f} us expected, {theirs * 1e6:.1f} with {', '.join(map(str, usual))}"
    )
