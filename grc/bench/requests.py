"""Requests: a pool of different inputs of one batch size, larger than the last-level cache where that is possible."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from grc.graph.capture import Source, flat_tensors
from grc.graph.model_file import Model, calling, run_file, split_spec

FEWEST, MOST = 16, 4096
SEED = 1  # not the seed that models are compiled and proven with

Draw = Callable[[int, int], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Request:
    """One call of the model, and its tensors in the order of the graph's inputs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[torch.Tensor]

    @property
    def bytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves)


def draws(model: Model, spec: str) -> dict[str, Draw]:
    """How to draw inputs, by how their ids are spread: functions of the batch size and a seed.

    A model file whose `get_inputs` takes `ids` offers "uniform" and "zipf"; any other offers "uniform", which is then
    whatever it returns. A `seed` parameter is used where there is one.
    """
    get_inputs = declared_inputs(model, spec)
    parameters = inspect.signature(get_inputs).parameters if get_inputs else {}
    kinds = ("uniform", "zipf") if "ids" in parameters else ("uniform",)
    if get_inputs is None or not {"seed", "ids"} & set(parameters):
        return {"uniform": lambda batch, seed: model.inputs(batch)}

    def drawn(kind: str) -> Draw:
        def draw(batch: int, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
            named = {"seed": seed, "ids": kind}
            chosen = {name: value for name, value in named.items() if name in parameters}
            return calling(model.module, lambda size: get_inputs(size, **chosen), model.file)(batch)

        return draw

    return {kind: drawn(kind) for kind in kinds}


def declared_inputs(model: Model, spec: str) -> Callable[..., Any] | None:
    """The file's own `get_inputs`: a Model keeps only its use with one argument."""
    if model.file is None or model.file.suffix != ".py":
        return None
    module = run_file(model.file)
    suffix = (split_spec(spec)[1] or "get_model").removeprefix("get_model").removeprefix("get")
    return getattr(module, f"get_inputs{suffix}", None) or module.get_inputs


def pool(draw: Draw, source: Source, batch: int, bytes: int) -> list[Request]:
    """At least 16 and at most 4096 requests of `batch` rows, of `bytes` in all where that lies between.

    Rows are cut from one large draw where every input is rows, which also makes different requests of a `get_inputs`
    that knows no seed; other models are asked again for each request.
    """
    first = request(*draw(batch, SEED))
    count = min(max(bytes // max(first.bytes, 1), FEWEST), MOST)
    if not cuttable(source):
        return [first, *(request(*draw(batch, SEED + i)) for i in range(1, min(count, 4 * FEWEST)))]
    drawn = draw(batch * count, SEED)
    leaves, spec = pytree.tree_flatten(drawn)
    # A cut is copied: a view may start where no vector load is aligned, and would keep the whole draw alive.
    cuts = [leaf.split(batch) if isinstance(leaf, torch.Tensor) else itertools.repeat(leaf, count) for leaf in leaves]
    found = []
    for parts in zip(*cuts, strict=True):
        own = [part.clone() if isinstance(part, torch.Tensor) else part for part in parts]
        args, kwargs = pytree.tree_unflatten(own, spec)
        found.append(request(args, kwargs))
    return found


def cuttable(source: Source) -> bool:
    """Whether row r of every input belongs to row r of the request, and nothing else varies with the batch."""
    return source.dynamic and all(
        sizes and (sizes[0].scale, sizes[0].offset) == (1, 0) and all(size.constant for size in sizes[1:])
        for sizes in source.sizes
    )


def request(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Request:
    return Request(args, kwargs, flat_tensors((args, kwargs))[0])
