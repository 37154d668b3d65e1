"""The fp64 oracle: run any module or graph with every floating-point operation in double precision.

Tables are never widened: a look-up gathers in the table's own precision and widens what it gathered, so that proving a
model of 100 GB of tables needs no 200 GB. Large weights, as of items that are ranked, are widened a block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from grc.runtime.closeness import largest_error as largest_error
from grc.runtime.closeness import within as within

aten = torch.ops.aten

GATHERS = {aten.embedding, aten.index_select, aten.index, aten.gather, aten.select, aten.slice}
VIEWS = {
    aten.view, aten._unsafe_view, aten.reshape, aten.permute, aten.transpose, aten.t, aten.expand, aten.unsqueeze,
    aten.squeeze, aten.detach, aten.alias, aten.as_strided, aten.split, aten.split_with_sizes, aten.unbind, aten.lift_fresh,
}  # fmt: skip
PRODUCTS = {aten.mm, aten.addmm}
COMPOSED = {aten.matmul, aten.linear}  # of products
BLOCK = 16 << 20  # bytes of a right factor that are widened at once
BAGS = {aten._embedding_bag, aten._embedding_bag_forward_only, aten.embedding_bag}


class Fp64(TorchDispatchMode):
    """Widen float operands, and the dtypes that casts and factories ask for, to float64, and complex ones to complex128."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in VIEWS or packet in GATHERS:
            return func(*args, **kwargs)
        if packet in BAGS:
            args = narrow_bag(args)
        if packet in PRODUCTS and is_large(args[-1]):
            return product(func, args, kwargs)
        args, kwargs = tree_map(widen, args), tree_map(widen, kwargs)
        if packet in FACTORIES and kwargs.get("dtype") is None and torch.get_default_dtype() is not torch.float64:
            result = func(*args, **kwargs)
            return tree_map(widen, result)
        if func.namespace in ("aten", "prims", "grc"):
            return func(*args, **kwargs)
        return foreign(func, args, kwargs)


def foreign(func: Any, args: Any, kwargs: Any) -> Any:
    """A library's own operator, in float32 where it has no kernel for float64."""
    try:
        return func(*args, **kwargs)
    except NotImplementedError:
        args, kwargs = tree_map(single, args), tree_map(single, kwargs)
        return tree_map(widen, func(*args, **kwargs))


def single(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype is torch.float64 else value


COMPARING = {torch.prelu, torch.tensordot, torch.conv1d, torch.conv2d, torch.bilinear}  # of torch's own functions


class Alike(TorchFunctionMode):
    """Widen the narrow operands of a call that has wide ones: some operators compare dtypes before the dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket if isinstance(func, torch._ops.OpOverload) else None
        called = packet is not None and packet not in VIEWS | GATHERS | BAGS
        if (called or func in COMPARING) and not (packet in PRODUCTS | COMPOSED and any(map(is_large, args))):
            found = [v.dtype for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
            if torch.float64 in found:
                args, kwargs = tree_map(widen, args), tree_map(widen, kwargs)
        return func(*args, **kwargs)


FACTORIES = {aten.full, aten.zeros, aten.ones, aten.arange, aten.scalar_tensor, aten.empty, aten.linspace, aten.tensor}


def widen(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        wide = widen(value.dtype)
        return value if value.dtype is wide else value.to(wide)
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else torch.complex128 if value.is_complex else value
    return value


def narrow_bag(args: Sequence[Any]) -> tuple[Any, ...]:
    """Keep only the rows that a bag reads, so that widening costs what the request costs and not the table."""
    weight, indices, *rest = args
    rows, where = torch.unique(indices, return_inverse=True)
    if len(rest) > 6 and isinstance(rest[6], int) and rest[6] >= 0:  # padding_idx must keep pointing at its row
        rows = torch.cat([rows, rows.new_tensor([rest[6]])])
        rest[6] = len(rows) - 1
        where = torch.where(rows[where] == rows[-1], len(rows) - 1, where)
    return (weight.index_select(0, rows), where.to(indices.dtype), *rest)


def is_large(value: Any) -> bool:
    narrow = isinstance(value, torch.Tensor) and value.dtype is not torch.float64
    return narrow and value.nbytes > BLOCK


def product(func: Any, args: Sequence[Any], kwargs: Any) -> torch.Tensor:
    """A matrix product, some columns of its right factor, and of what is added to it, after the others."""
    *given, right = args
    columns = right.shape[1]
    step = max(1, BLOCK // (right.shape[0] * right.element_size()))
    blocks = []
    for start in range(0, columns, step):
        added = [x[..., start : start + step] if x.shape[-1] == columns else x for x in given[:-1]]
        blocks.append(func(*map(widen, (*added, given[-1], right[:, start : start + step])), **kwargs))
    return torch.cat(blocks, 1)


@torch.no_grad()
def run_fp64(function: Callable[..., Any], *inputs: torch.Tensor, **kwargs: Any) -> Any:
    """Call `function` in double precision. Integer inputs and every integer result keep their dtype."""
    with Alike(), Fp64():
        return function(*inputs, **kwargs)
