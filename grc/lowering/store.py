"""The store: every weight of every part once, shared by storage, so that views of an arena cost nothing."""

from __future__ import annotations

from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from grc.errors import LoweringError
from grc.graph.faults import SPARSE_HINT
from grc.runtime.weights import write_weights


class Store:
    """Collects constants by the memory they lie in, and writes each piece of memory once."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self.tensors: dict[str, torch.Tensor] = {}

    def add(self, name: str, tensor: torch.Tensor) -> dict[str, Any]:
        """A reference to where the constant will lie: a whole tensor, or a slice of one already there.

        Raises LoweringError for a sparse one: those that meet no request are folded by normalise.
        """
        if tensor.layout is not torch.strided:
            raise LoweringError(f"{name} is a sparse tensor, which an artifact does not hold", SPARSE_HINT)
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        memory = tensor.untyped_storage()
        owner = self.names.get(memory.data_ptr())
        if owner is not None and self.tensors[owner].dtype is tensor.dtype and tensor.numel():
            whole = self.tensors[owner]
            if whole.shape == tensor.shape and whole.data_ptr() == tensor.data_ptr():
                return {"key": owner}
            return {"key": owner, "start": tensor.storage_offset(), "shape": list(tensor.shape)}
        whole = tensor
        if memory.nbytes() != tensor.nbytes and memory.nbytes() % tensor.itemsize == 0:
            whole = torch.empty(0, dtype=tensor.dtype).set_(memory)  # type: ignore[call-overload]
        unique = next(n for n in chain([name], (f"{name}.{i}" for i in count(1))) if n not in self.tensors)
        self.tensors[unique] = whole
        self.names[memory.data_ptr()] = unique
        if whole is tensor:
            return {"key": unique}
        return {"key": unique, "start": tensor.storage_offset(), "shape": list(tensor.shape)}

    def write(self, path: Path) -> None:
        write_weights(path, self.tensors)

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())
