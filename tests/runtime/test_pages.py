"""Pages of memory-mapped weights are mapped ahead of their first use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from grc.runtime.pages import SMALL, map_ahead
from grc.runtime.weights import read_weights, write_weights


def resident(address: int) -> int:
    """Kilobytes of the mapping that holds an address which this process has mapped."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(part, 16) for part in head.split("-"))
            inside = low <= address < high
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1])
    return 0


def test_large_weights_are_mapped_and_small_ones_left_alone(tmp_path: Path) -> None:
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if release < (5, 14):
        pytest.skip("MADV_POPULATE_READ needs Linux 5.14")
    write_weights(tmp_path / "w.safetensors", {"table": torch.zeros(4 * SMALL // 4), "bias": torch.zeros(4)})
    weights = read_weights(tmp_path / "w.safetensors")
    assert map_ahead([weights["bias"]]) is None
    thread = map_ahead(weights.values())
    assert thread is not None
    thread.join(30)
    assert resident(weights["table"].data_ptr() + weights["table"].nbytes // 2) * 1024 >= weights["table"].nbytes
