"""Formats: what a table or a layer may be kept in, and what `--precision` allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from grc.errors import GrcError

Precision = Literal["fp32", "bf16", "fp16", "int8", "int4", "fp8", "auto"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "int8", "int4", "fp8", "auto")

BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "fp8": 8, "int4": 4}

FIRST_FP8 = 89  # compute capability

ON_GPU = {"bf16": ("bf16",), **dict.fromkeys(("fp16", "int8", "int4", "fp8", "auto"), ("fp16",))}

# What each precision allows, the smallest first. "At most this precision": what the budget refuses goes one step up. int4 is
# a format of tables; layers beside them are int8. Of an attention and an activation unit a GPU takes the operands in half
# precision; a CPU joins a unit's layers with each user's query, in float32.
FORMATS: Mapping[str, Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "layer": {
        "cpu": {
            "bf16": ("bf16",),
            "int8": ("int8", "bf16"),
            "int4": ("int8", "bf16"),
            "auto": ("int8", "bf16"),
        },
        "cuda": {
            "bf16": ("bf16",),
            "fp16": ("fp16",),
            "int8": ("int8", "fp16"),
            "int4": ("int8", "fp16"),
            "fp8": ("fp8", "fp16"),
            "auto": ("int8", "fp16"),
        },
    },
    # Items whose best are kept: our kernel for a GPU takes them in half precision.
    "ranking": {
        "cpu": {"bf16": ("bf16",), **dict.fromkeys(("int8", "int4", "auto"), ("int8", "bf16"))},
        "cuda": ON_GPU,
    },
    "table": {
        "cpu": {
            "bf16": ("bf16",),
            "fp16": ("fp16",),
            "int8": ("int8", "fp16"),
            "int4": ("int4", "int8", "fp16"),
            "auto": ("int4", "int8", "fp16"),
        },
        "cuda": {
            "bf16": ("bf16",),
            "fp16": ("fp16",),
            "int8": ("int8", "fp16"),
            "int4": ("int4", "int8", "fp16"),
            "fp8": ("fp16",),
            "auto": ("int4", "int8", "fp16"),
        },
    },
    "attention": {"cpu": {}, "cuda": ON_GPU},
    "activation unit": {"cpu": {}, "cuda": ON_GPU},
}


def check_precision(precision: str, device: str, gpu: str | None = None) -> None:
    """Raise GrcError for a precision that does not exist, or that this device (a GPU by its name, "sm_90") does not have."""
    if precision not in PRECISIONS:
        raise GrcError(f"there is no precision {precision}", f"choose one of {', '.join(PRECISIONS)}")
    if device == "cpu" and precision == "fp8":
        raise GrcError("no CPU has fp8", "choose --precision int8 or bf16, or --device cuda")
    if precision == "fp8" and gpu is not None and int(gpu[3:]) < FIRST_FP8:
        raise GrcError(f"{gpu} has no fp8, which begins with sm_{FIRST_FP8}", "choose --precision int8 or fp16")
