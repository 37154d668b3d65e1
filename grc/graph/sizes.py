"""Which sizes of the inputs follow the batch, which vary on their own, and how the exporter is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ShapesCollection

from grc.errors import ModelFileError
from grc.runtime.structure import Json


@dataclass(frozen=True)
class Size:
    """One dimension of an input or output: a constant, `scale * batch + offset`, or a free size (`batch` is False)."""

    scale: int = 0
    offset: int = 0
    free: str | None = None

    @property
    def constant(self) -> bool:
        return self.scale == 0 and self.free is None

    def json(self) -> Json:
        if self.free:
            return self.free
        if self.scale == 0:
            return self.offset
        return "batch" if (self.scale, self.offset) == (1, 0) else {"scale": self.scale, "offset": self.offset}


Bound = tuple[int, int, int]
"""A dimension of an input, and the least and the most that its size may be."""


def described(dtype: torch.dtype, sizes: Sequence[Size], bounds: Sequence[Bound] = ()) -> dict[str, Any]:
    """A tensor as the manifest has it, with the bounds of its sizes where there are any."""
    entry = {"dtype": str(dtype)[6:], "sizes": [size.json() for size in sizes]}
    return {**entry, "bounds": list(bounds)} if bounds else entry


def find_sizes(samples: dict[int, list[torch.Tensor]], names: Sequence[str]) -> list[tuple[Size, ...]]:
    """Tell constant sizes from those that follow the batch and those that vary on their own (jagged values)."""
    counts = {len(leaves) for leaves in samples.values()}
    if len(counts) != 1:
        raise ModelFileError(
            "get_inputs(batch) returns different numbers of tensors at different batch sizes",
            "return the same structure for every batch size; a feature of any length is one tensor, padded, or its values and "
            "their offsets, and no list of a tensor a row",
        )
    found: list[tuple[Size, ...]] = []
    free: dict[tuple[int, ...], str] = {}
    for i, name in enumerate(names):
        shapes = [leaves[i].shape for leaves in samples.values()]
        if len({len(shape) for shape in shapes}) != 1:
            raise ModelFileError(f"input {name} changes its rank with the batch size", "return tensors of one rank")
        if len({leaves[i].dtype for leaves in samples.values()}) != 1:
            raise ModelFileError(f"input {name} changes its dtype with the batch size", "return tensors of one dtype")
        found.append(tuple(size_of([s[d] for s in shapes], list(samples), free) for d in range(len(shapes[0]))))
    return found


def size_of(sizes: Sequence[int], batches: Sequence[int], free: dict[tuple[int, ...], str]) -> Size:
    if len(set(sizes)) == 1:
        return Size(offset=sizes[0])
    scale, rest = divmod(sizes[1] - sizes[0], batches[1] - batches[0])
    offset = sizes[0] - scale * batches[0]
    if rest == 0 and scale > 0 and all(s == scale * b + offset for s, b in zip(sizes, batches, strict=True)):
        return Size(scale=scale, offset=offset)
    return Size(free=free.setdefault(tuple(sizes), f"n{len(free)}"))


def named_by_symbol(sizes: Sequence[tuple[Size, ...]], graph: fx.GraphModule) -> list[tuple[Size, ...]]:
    """Free sizes named anew, one name for each symbol of the graph: what was built from it takes those for equal."""
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    names: dict[str, str] = {}
    return [
        tuple(
            replace(size, free=names.setdefault(str(found), f"n{len(names)}")) if size.free else size
            for size, found in zip(dims, node.meta["val"].shape, strict=True)
        )
        for dims, node in zip(sizes, inputs, strict=True)
    ]


def named_dims(sizes: list[tuple[Size, ...]]) -> dict[str, Any]:
    dims = {"batch": Dim("batch", min=1)}
    for dim in {size.free for dims_ in sizes for size in dims_ if size.free}:
        dims[dim] = Dim(dim)
    return dims


def collection(
    leaves: Sequence[torch.Tensor], sizes: list[tuple[Size, ...]], dims: dict[str, Any] | None
) -> ShapesCollection | None:
    shapes = ShapesCollection()
    dynamic = False
    for leaf, tensor_sizes in zip(leaves, sizes, strict=True):
        spec: dict[int, Any] = {}
        for i, size in enumerate(tensor_sizes):
            if size.constant:
                continue
            if dims is None:
                spec[i] = Dim.AUTO
            elif size.free:
                spec[i] = dims[size.free]
            else:
                dim = dims["batch"] if size.scale == 1 else size.scale * dims["batch"]
                spec[i] = dim + size.offset if size.offset else dim
        if spec:
            dynamic = True
            shapes[leaf] = spec
    return shapes if dynamic else None
