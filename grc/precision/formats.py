"""Formats: what a table or a layer may be kept in, and what `--precision` allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from grc.errors import GrcError

Precision = Literal["fp32", "bf16", "fp16", "int8", "int4", "fp8", "auto"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "int8", "int4", "fp8", "auto")

BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 4}

# What each precision allows, the smallest first. "At most this precision": what the budget refuses goes one step up. int4 is
# a format of tables; layers beside them are int8. On a GPU what is not in half precision stays in float32.
LAYERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "cpu": {
        "bf16": ("bf16",),
        "int8": ("int8", "bf16"),
        "int4": ("int8", "bf16"),
        "auto": ("int8", "bf16"),
    },
    "cuda": {"bf16": ("bf16",), "fp16": ("fp16",), "auto": ("fp16",)},
}
TABLES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "cpu": {
        "bf16": ("bf16",),
        "fp16": ("fp16",),
        "int8": ("int8", "fp16"),
        "int4": ("int4", "int8", "fp16"),
        "auto": ("int4", "int8", "fp16"),
    },
    "cuda": {"bf16": ("bf16",), "fp16": ("fp16",), "auto": ("fp16",)},
}


def check_precision(precision: str, device: str) -> None:
    """Raise GrcError for a precision that does not exist, or that has no kernels on this device."""
    if precision not in PRECISIONS:
        raise GrcError(f"there is no precision {precision}", f"choose one of {', '.join(PRECISIONS)}")
    if device == "cpu" and precision == "fp8":
        raise GrcError("no CPU has fp8", "choose --precision int8 or bf16, or --device cuda")
    if device == "cuda" and precision in ("int8", "int4", "fp8"):
        raise GrcError(f"--precision {precision} has no kernels for a GPU so far", "choose --precision fp16 or bf16")
