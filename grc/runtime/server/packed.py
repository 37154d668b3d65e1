"""Packed: a request's inputs as the bytes they came as. A batch is made of its requests' bytes by one copy for each input,
where a tensor for every request would cost more than computing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Tensors = list[torch.Tensor]
Shape = tuple[int, ...]


@dataclass(slots=True, eq=False)
class Packed:
    """Little-endian bytes and shape of each input, in the model's order; they were checked against the model."""

    data: Sequence[bytes]
    shapes: tuple[Shape, ...]
    dtypes: Sequence[torch.dtype]
    rows: int

    def tensors(self) -> Tensors:
        return [joined([data], *about) for data, *about in zip(self.data, self.shapes, self.dtypes, strict=True)]


def joined(data: Sequence[bytes], shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """One tensor of all the bytes, aligned as compiled code wants it and a body's middle is not."""
    together = bytearray().join(data)
    return torch.frombuffer(together, dtype=dtype).view(shape) if together else torch.empty(shape, dtype=dtype)


def tensors_of(inputs: Packed | Tensors) -> Tensors:
    return inputs.tensors() if isinstance(inputs, Packed) else inputs
