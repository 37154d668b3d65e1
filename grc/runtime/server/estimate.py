"""How long a batch will take: what was measured when the artifact was built, corrected by what this server sees."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from typing import Any

LEARNING = 0.2  # the weight of the newest batch: a changed load is believed after some five batches
UNKNOWN = 1e-3  # seconds of a batch where the artifact holds no measurement


class Estimate:
    """Seconds by rows, between and beyond the batch sizes that were measured."""

    def __init__(self, manifest: Mapping[str, Any]):
        engines = {part["engine"] for part in manifest["parts"]}
        best: dict[int, float] = {}
        for row in manifest["measured"]:
            if row["engine"] in engines:
                best[row["batch"]] = min(best.get(row["batch"], float("inf")), row["p50_us"] / 1e6)
        self.points = sorted(best.items()) or [(1, UNKNOWN)]
        self.factor = 1.0

    def seconds(self, rows: int) -> float:
        return self.factor * self.measured(rows)

    def learn(self, rows: int, seconds: float) -> None:
        """One stall must not close the door to all who come after it: a batch counts as at most ten times as slow as
        is believed now."""
        seen = min(seconds / self.measured(rows), 10 * self.factor)
        self.factor += LEARNING * (seen - self.factor)

    def measured(self, rows: int) -> float:
        points = self.points
        at = bisect.bisect_left(points, (rows, 0.0))
        if at == 0:
            return points[0][1]
        if at == len(points):
            return points[-1][1] * rows / points[-1][0]
        (low, start), (high, end) = points[at - 1], points[at]
        return start + (end - start) * (rows - low) / (high - low)
