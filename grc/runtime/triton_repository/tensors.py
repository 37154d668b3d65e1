"""How a model's tensors look to Triton: their names, types and dims, and the way between its rows and the model's shapes.

Triton takes the first dimension of every tensor for the batch, and wants at least one more. A model's `[B]` becomes
`[B, 1]`, and `[26 * B, D]` becomes `[B, 26, D]`. A model whose tensors can't be brought to this form is served one
request at a time, with its own shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grc.runtime.structure import output_names

TYPES = {
    "bool": "BOOL", "uint8": "UINT8", "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "bfloat16": "BF16", "float32": "FP32", "float64": "FP64",
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """One input or output. `dims` are as in config.pbtxt. `scale` tells how many entries of the first dimension a row has,
    and the batch is then not among the dims; 0 where rows can't be told apart."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    sizes: tuple[Any, ...]
    scale: int = 0

    @property
    def triton_type(self) -> str:
        return TYPES[self.dtype]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def ragged(self) -> bool:
        return self.scale > 0 and -1 in self.dims

    def to_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """From the model's shape to Triton's."""
        if self.scale == 0:
            return tensor if tensor.dim() else tensor.reshape(1)
        return tensor.reshape(tensor.shape[0] // self.scale, *of_row(tuple(tensor.shape[1:]), self.scale))

    def to_model(self, tensor: torch.Tensor) -> torch.Tensor:
        """From Triton's shape to the model's."""
        if self.scale == 0:
            return tensor if self.sizes else tensor.reshape(())
        rest = tensor.shape[2:] if self.scale > 1 else tensor.shape[1:] if len(self.sizes) > 1 else ()
        return tensor.reshape(tensor.shape[0] * self.scale, *rest)


def of_row(rest: tuple[int, ...], scale: int) -> tuple[int, ...]:
    """The dims of one row, of which there must be at least one."""
    return (scale, *rest) if scale > 1 else rest or (1,)


@dataclass(frozen=True)
class Interface:
    """The inputs and outputs of a model. `max_batch` is 0 where Triton must not merge its requests."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    max_batch: int

    @property
    def merges(self) -> bool:
        return self.max_batch > 0


def interface(manifest: Mapping[str, Any], max_batch: int | None = None) -> Interface:
    """From an artifact's manifest. `max_batch` lowers the artifact's own.

    Requests are merged where every tensor has rows, unless the manifest says that rows read each other ("rows": False).
    """
    names = output_names(manifest["structure"]["outputs"])
    taken = [(entry["name"], entry) for entry in manifest["inputs"]]
    given = list(zip(names, manifest["outputs"], strict=True))
    rows = manifest.get("rows", True) and all(scale_of(entry["sizes"]) for _, entry in [*taken, *given])
    largest = min(manifest["batch"]["max"], max_batch or manifest["batch"]["max"])
    return Interface(
        tuple(tensor(name, entry, rows) for name, entry in taken),
        tuple(tensor(name, entry, rows) for name, entry in given),
        largest if rows else 0,
    )


def scale_of(sizes: Sequence[Any]) -> int:
    """How many entries of the first dimension belong to one row; 0 where the rows can't be told apart."""
    if not sizes or any(size == "batch" or isinstance(size, dict) for size in sizes[1:]):
        return 0
    if sizes[0] == "batch":
        return 1
    first = sizes[0]
    return first["scale"] if isinstance(first, dict) and first["offset"] == 0 else 0


def tensor(name: str, entry: Mapping[str, Any], rows: bool) -> Tensor:
    sizes = tuple(entry["sizes"])
    dims = tuple(size if isinstance(size, int) else -1 for size in sizes)
    if not rows:
        return Tensor(name, entry["dtype"], dims or (1,), sizes)
    scale = scale_of(sizes)
    return Tensor(name, entry["dtype"], of_row(dims[1:], scale), sizes, scale)
