"""Trace: torch.export of a model as it is, with what hides parts of it from the exporter put aside meanwhile."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from grc.graph.flat import counted_rows, flat_graph, followed_data, model_lines, quiet_export, without_fast_path
from grc.graph.model_file import Model
from grc.graph.packed_sequences import Steps, padded_sequences
from grc.graph.sizes import Size, collection, named_dims

Request = tuple[tuple[Any, ...], dict[str, Any]]


# What torch.export can name no parameter, buffer or layer of a model: the graph that it makes has these for itself.
RESERVED = {*dir(fx.GraphModule(nn.Module(), fx.Graph()))} - {*dir(nn.Module())}


class ByPosition(nn.Module):
    """A model called with its flat tensors: torch.export maps no dynamic sizes onto `**kwargs`. Its own names lie one level
    deeper, where they may be those of a graph."""

    def __init__(self, model: nn.Module, call: Any):
        super().__init__()
        self.model = model
        self.leaves, self.spec = pytree.tree_flatten(call)

    def forward(self, *tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.model(*args, **kwargs)


def trace(
    model: Model, request: Request, sizes: list[tuple[Size, ...]], mode: str
) -> tuple[fx.GraphModule, list[Steps]]:
    """The model's flat graph, traced on a request, and the packed sequences that it pads to the longest of their rows.

    Raises whatever torch.export does."""
    with followed(model.module, mode) as to_longest:
        return flat_graph(export(model, request, sizes, mode)), to_longest


def export(model: Model, request: Request, sizes: list[tuple[Size, ...]], mode: str) -> torch.export.ExportedProgram:
    if model.program is not None:
        return model.program
    args, kwargs = request
    # A tensor given twice would become one input, and a view would tie the request to the tensor behind it.
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    module = model.module
    collected = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values()) and kwargs
    if collected or not RESERVED.isdisjoint(module._parameters | module._buffers | module._modules):
        module, args, kwargs = ByPosition(module, (args, kwargs)), tuple(leaves), {}
    strict = mode == "strict"
    with torch.no_grad(), quiet_export(), model_lines(), without_fast_path(), followed_data():
        try:
            shapes = collection(leaves, sizes, named_dims(sizes))
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=strict)
        except Exception as first:  # constraints between sizes: let the exporter find them
            if not any(not size.constant for dims in sizes for size in dims):
                raise
            shapes = collection(leaves, sizes, None)
            try:
                return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=strict)
            except Exception:
                raise first from None


@contextmanager
def followed(module: nn.Module, mode: str) -> Iterator[list[Steps]]:
    """What Python makes numbers of stays symbolic meanwhile. The strict mode follows Python itself, and would follow this too.

    Gives padded_sequences'."""
    if mode != "non-strict":
        yield []
        return
    with counted_rows(module), padded_sequences() as to_longest:
        yield to_longest
