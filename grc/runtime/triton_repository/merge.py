"""Answer many requests by one call of the model: what every program model of a repository does with what Triton merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from grc.errors import InputError
from grc.runtime.triton_repository.tensors import Interface

Tensors = Sequence[torch.Tensor]
Run = Callable[[list[torch.Tensor]], Tensors]


def answer_all(run: Run, interface: Interface, requests: Sequence[Tensors]) -> list[Tensors | InputError]:
    """The answer to each request, in Triton's shapes, or the error of that request alone.

    Requests of equal shapes are concatenated and answered by one call; histories of different lengths are not padded,
    because only the model knows whether padding is masked. Where a merged call is refused, each of its requests is
    asked by itself, so that a bad one fails alone.
    """
    answers: dict[int, Tensors | InputError] = {}
    for group in groups(interface, requests):
        try:
            parts: Sequence[Tensors | InputError] = merged(run, interface, [requests[i] for i in group])
        except InputError as error:
            parts = [error] if len(group) == 1 else [alone(run, interface, requests[i]) for i in group]
        answers |= zip(group, parts, strict=True)
    return [answers[i] for i in range(len(requests))]


def groups(interface: Interface, requests: Sequence[Tensors]) -> list[list[int]]:
    """Requests that can be concatenated: those whose tensors differ in their rows only."""
    if not interface.merges:
        return [[i] for i in range(len(requests))]
    found: dict[tuple[torch.Size, ...], list[int]] = {}
    for i, request in enumerate(requests):
        found.setdefault(tuple(tensor.shape[1:] for tensor in request), []).append(i)
    return list(found.values())


def alone(run: Run, interface: Interface, request: Tensors) -> Tensors | InputError:
    try:
        return merged(run, interface, [request])[0]
    except InputError as error:
        return error


def merged(run: Run, interface: Interface, requests: Sequence[Tensors]) -> list[Tensors]:
    """One call for requests of equal shapes. Raises InputError where the model refuses it."""
    columns = list(zip(*requests, strict=True))
    inputs = [
        entry.to_model(column[0] if len(column) == 1 else torch.cat(column))
        for entry, column in zip(interface.inputs, columns, strict=True)
    ]
    outputs = run(inputs)
    rows = [entry.to_rows(tensor).contiguous() for entry, tensor in zip(interface.outputs, outputs, strict=True)]
    if len(requests) == 1:
        return [rows]
    counts = [request[0].shape[0] for request in requests]
    return list(zip(*(tensor.split(counts) for tensor in rows), strict=True))
