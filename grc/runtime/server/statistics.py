"""Statistics of one version, as the protocol's extension reports them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Duration:
    """How often, and nanoseconds in all."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.ns += int(seconds * 1e9)

    def json(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


STAGES = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")


@dataclass
class Statistics:
    """Counted on the event loop alone, so that no lock is needed."""

    rows: int = 0
    batches: int = 0
    last: int = 0
    by_stage: dict[str, Duration] = field(default_factory=lambda: {stage: Duration() for stage in STAGES})
    by_rows: dict[int, Duration] = field(default_factory=dict)

    def batch(self, rows: int, seconds: float) -> None:
        self.batches += 1
        self.rows += rows
        self.by_rows.setdefault(rows, Duration()).add(seconds)

    def succeed(self, seconds: float) -> None:
        self.last = time.time_ns() // 1_000_000
        self.by_stage["success"].add(seconds)

    def json(self, name: str, version: str) -> dict[str, Any]:
        none = Duration().json()
        return {
            "name": name,
            "version": version,
            "last_inference": self.last,
            "inference_count": self.rows,
            "execution_count": self.batches,
            "inference_stats": {stage: duration.json() for stage, duration in self.by_stage.items()},
            "batch_stats": [
                {"batch_size": rows, "compute_input": none, "compute_infer": duration.json(), "compute_output": none}
                for rows, duration in sorted(self.by_rows.items())
            ],
            "memory_usage": [],
        }
