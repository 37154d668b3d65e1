"""Rows for the tests of tables, files and plots."""

from __future__ import annotations

from typing import Any

from grc.bench.rows import Row


def row(engine: str, p50: float | None, **other: Any) -> Row:
    times = {"p50_us": p50, "p99_us": p50 and 2 * p50, "min_us": p50 and 0.9 * p50, "spread": p50 and 0.1}
    return {
        "model": "dlrm",
        "device": "cpu",
        "precision": "fp32",
        "batch": 64,
        "ids": "uniform",
        "engine": engine,
        "form": "default",
        **times,
        "calls": 10,
        "wall_p50_us": None,
        "wall_p99_us": None,
        "max_error": 1e-7,
        "overlap100": None,
        "refused": None if p50 else "it failed",
        "build_s": 1.0,
        "load_s": 0.1,
        "bytes": 100,
        "pool": 16,
        "allocator": "stock",
        "machine": "CPU, 2 threads, avx512",
        "versions": {"torch": "2"},
        "date": "2026-01-01",
        "command": "grc bench dlrm.py",
        **other,
    }
