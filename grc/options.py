"""Options: what a compilation may choose. Every field is also a flag of `grc compile`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from grc.errors import GrcError

DEVICES = ("cpu", "cuda")
BadIdPolicy = Literal["error", "zero", "clamp", "hash"]
BAD_ID_POLICIES: tuple[BadIdPolicy, ...] = ("error", "zero", "clamp", "hash")
ENGINES = ("auto", "inductor", "inductor-float-layers", "aoti", "onnxruntime", "onnxruntime-static", "eager")
ONLY_FLOAT = ("aoti", "eager")  # engines that can't keep weights in fewer bits
ONLY_LOWER = ("inductor-float-layers", "onnxruntime-static")  # and those that are for nothing else


@dataclass(frozen=True)
class Options:
    """What to build, for which host, and how strictly to prove it."""

    output: Path | None = None
    """Folder of the artifact; None writes `NAME.grc` beside the current directory."""
    device: str = "cpu"
    """Where the artifact will run: `cpu` or `cuda`."""
    engine: str = "auto"
    """`auto` builds every usable engine and keeps the fastest; a name forces that one."""
    batches: tuple[int, ...] = (1, 64, 1024)
    """Batch sizes at which the candidates are measured on a CPU; each may have its own winner. On a GPU those are `buckets`."""
    max_batch: int = 4096
    """Largest batch a request may have."""
    buckets: tuple[int, ...] = ()
    """On a GPU: batch sizes with a CUDA graph of their own; others are padded up. Empty: 1, 8, 32, 128, … up to max_batch."""
    traffic: Path | None = None
    """On a GPU: a file of batch sizes of real requests, one a line; `buckets` are then learnt from it."""
    streams: int = 1
    """On a GPU: requests that run at once, each with graphs and buffers of its own."""
    static_buckets: bool = False
    """On a GPU: also build for each of `batches` alone, max-autotuned, which makes it a bucket; minutes of build, kept only
    where faster."""
    on_bad_id: BadIdPolicy = "error"
    """An id outside its table: refuse the request, read zeros, clamp to the table, or hash into it."""
    precision: str = "fp32"
    """The least precision that tables and layers may be kept in, where the budget allows: see grc/precision/formats.py."""
    budget: tuple[str, ...] = ()
    """Limits of what fewer bits may cost, such as `max-error=0.02` or `topk-overlap@100=0.99`; empty: the first of these."""
    calibration: Path | None = None
    """Rows of real requests (npz, jsonl, parquet), with `label` for labels; None: the model file's calibration()."""
    stages: bool = False
    """Also build the model in stages, cut at its tables and its interaction, for `grc export-triton --layout stages`."""
    disable: tuple[str, ...] = ()
    """Passes to leave out."""
    bisect_limit: int | None = None
    """Stop after this many passes have changed something: halve it to find the pass that breaks a model."""
    strict: bool = False
    """A pass that fails its proof is an error instead of being rolled back."""
    force: bool = False
    """Replace an artifact that is already there."""

    def __post_init__(self) -> None:
        """Raises GrcError for a value that no compilation can have."""
        for name in ("output", "traffic", "calibration"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, Path(getattr(self, name)))
        if isinstance(self.budget, str):
            object.__setattr__(self, "budget", (self.budget,))
        if self.device not in DEVICES:
            raise GrcError(f"there is no device {self.device!r}", f"choose one of {', '.join(DEVICES)}")
        if self.on_bad_id not in BAD_ID_POLICIES:
            raise GrcError(f"there is no policy {self.on_bad_id!r}", f"choose one of {', '.join(BAD_ID_POLICIES)}")
        absent = ONLY_LOWER if self.precision == "fp32" else ONLY_FLOAT
        if self.engine in absent:
            others = ", ".join(name for name in ENGINES if name not in absent)
            raise GrcError(
                f"there is no engine {self.engine} for precision {self.precision}", f"choose one of {others}"
            )
        if self.max_batch < 1 or not self.batches or min(self.batches) < 1:
            raise GrcError("batch sizes are numbers from 1 up", "give max_batch and at least one of batches so")
