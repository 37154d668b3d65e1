"""Bounds: the sizes that a trace does not hold for, so that the runtime refuses them before a kernel reads what is not there.

A slice of a table of 200 positions bounds the steps by 200; the last of no steps lies before the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from grc.graph.faults import NOISE, noise
from grc.graph.oracle import largest_error
from grc.runtime.inputs import UNBOUNDED, told
from grc.runtime.structure import flatten, unflatten

if TYPE_CHECKING:
    from grc.graph.capture import Source

SMALLEST = 2  # of every symbol that torch.export makes: it tells nothing of the model
BATCH = 3  # rows of the requests whose steps are cut off


def find_bounds(source: Source) -> None:
    """Write the largest batch and the bounds of every other size into `source`, with a note for each."""
    least: dict[str | None, int] = {}
    for i, (node, sizes) in enumerate(zip(source.placeholders(), source.sizes, strict=True)):
        for dim, (size, traced) in enumerate(zip(sizes, node.meta["val"].shape, strict=True)):
            if size.constant or isinstance(traced, int) or traced.node.expr.is_number:
                continue
            found = traced.node.shape_env.bound_sympy(traced.node.expr)
            most = int(found.upper) if found.upper < UNBOUNDED else UNBOUNDED
            if size.free is None:
                largest = UNBOUNDED if most == UNBOUNDED else (most - size.offset) // size.scale
                source.max_batch = min(source.max_batch, largest)
                continue
            if size.free not in least:
                least[size.free] = int(found.lower) if found.lower > SMALLEST else least_steps(source, size.free)
            if least[size.free] or most < UNBOUNDED:
                source.bounds[i].append((dim, least[size.free], most))
                name = f"dimension {dim} of input {source.names[i]}"
                source.notes.append(f"{name} is {told(least[size.free], most)}, and another request is refused")
    if source.max_batch < UNBOUNDED:
        source.notes.append(f"the batch is up to {source.max_batch}, and a larger request is refused")


@torch.no_grad()
def least_steps(source: Source, name: str) -> int:
    """The fewest steps that model and trace agree on: 0, 1 or 2. Values of bags are none: their lengths tell how many."""
    places = [[dim for dim, size in enumerate(sizes) if size.free == name] for sizes in source.sizes]
    if any(0 in dims for dims in places):
        return 0
    for steps in (1, 0):
        inputs = source.inputs(BATCH)
        for i, dims in enumerate(places):
            for dim in dims:
                inputs[i] = inputs[i].narrow(dim, 0, steps)
        if not agree(source, inputs):
            return steps + 1
    return 0


def agree(source: Source, inputs: Sequence[torch.Tensor]) -> bool:
    """Whether model and trace both answer flat inputs, and alike."""
    args, kwargs = unflatten(source.in_structure, [tensor.clone() for tensor in inputs])
    expected: list[torch.Tensor] = []
    try:
        flatten(source.model.module(*args, **kwargs), expected)
        answers = list(source.graph.forward(*inputs))
    except Exception:  # whatever the model raises where it has no step to read
        return False
    return largest_error(answers, expected) <= max(10 * NOISE, noise(source.graph))
