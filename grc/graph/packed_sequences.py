"""Packed sequences as padded ones: how many steps a row has is a value, and no export follows sizes that depend on values.

While a model is captured, `pack_padded_sequence` keeps the padded steps and recurrent layers run over all of them. What a layer
puts out past a row's end is read by nobody, and its last state is read where the row ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import _VF, Tensor, nn

SHUT = 1e4  # a gate's logistic function is 0 or 1 here, in every dtype


class Steps:
    """What stands in a PackedSequence for its batch sizes: each row's length, the number of steps and that of rows."""

    device = torch.device("cpu")

    def __init__(self, lengths: Tensor, steps: int, rows: Any):
        self.lengths, self.steps, self.rows = lengths, steps, rows

    def size(self, _: int) -> int:
        return Longest(self.steps)

    def __getitem__(self, _: int) -> Any:
        return self.rows

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("forward loops over the batch sizes of a packed sequence")


class Longest(int):
    """The steps that `pad_packed_sequence` pads to where it is given no total_length."""


@contextmanager
def padded_sequences() -> Iterator[list[Steps]]:
    """Packed sequences hold their padded steps meanwhile. Gives those that were padded again to no length in particular, which
    is that of the longest row."""
    to_longest: list[Steps] = []

    def pack(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Steps]:
        x = x if batch_first else x.transpose(0, 1)
        return x, Steps(lengths.clamp(max=x.shape[1]), x.shape[1], x.shape[0])

    def pad(x: Tensor, steps: Steps, batch_first: bool, value: float, total: int) -> tuple[Tensor, Tensor]:
        if isinstance(total, Longest):
            to_longest.append(steps)
        past = torch.arange(steps.steps, device=x.device) >= steps.lengths[:, None].to(x.device)
        x = x.masked_fill(past.view(*past.shape, *[1] * (x.dim() - 2)), value)
        if total != steps.steps:
            x = torch.cat([x, x.new_full((x.shape[0], total - steps.steps, *x.shape[2:]), value)], 1)
        return x if batch_first else x.transpose(0, 1), steps.lengths

    def either(layer: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: run(layer, *given) if isinstance(given[1], Steps) else layer(*given)

    with ExitStack() as patches:
        own = {"_pack_padded_sequence": pack, "_pad_packed_sequence": pad}
        own |= {name: either(getattr(_VF, name)) for name in ("gru", "lstm", "rnn_tanh", "rnn_relu")}
        for name, function in own.items():
            patches.enter_context(mock.patch.object(_VF, name, function, create=True))
        for layer in (nn.RNNBase, nn.LSTM):  # they make a Python number of the rows
            patches.enter_context(mock.patch.object(layer, "check_forward_args", lambda *_: None))
        yield to_longest


def run(
    layer: Callable[..., Any], x: Tensor, steps: Steps, state: Tensor | tuple[Tensor, Tensor], weights: Sequence[Tensor],
    bias: bool, layers: int, dropout: float, train: bool, both_ways: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """A recurrent layer over padded steps [rows, steps, width], with what it gives for packed ones: all states [rows, steps,
    states], the last [layers * ways, rows, state] and, of an LSTM, the cells.

    The way back is a way forth over each row's steps in reverse. An LSTM gives its cells of the last step alone, so its gates
    shut past a row's end, by one more column of input that is 1 there.
    """
    ways, state = 2 if both_ways else 1, state if isinstance(state, tuple) else (state,)
    each, cell = len(weights) // (layers * ways), len(state) == 2
    lengths, at = steps.lengths.to(x.device)[:, None], torch.arange(steps.steps, device=x.device)
    past = (at >= lengths).to(x.dtype)[:, :, None]
    reverse, final = torch.where(at < lengths, lengths - 1 - at, at), (lengths - 1).clamp(min=0)
    ended: list[tuple[Tensor, ...]] = []
    for first in range(0, layers * ways, ways):
        made = []
        for way in range(ways):
            own = list(weights[(first + way) * each : (first + way + 1) * each])
            start = [part[first + way] for part in state]
            given = picked(x, reverse) if way else x
            if cell:
                own[0], given = torch.cat([own[0], shut(own[0])], 1), torch.cat([given, past], 2)
            hidden = tuple(part[None] for part in start)
            out, _, *cells = layer(given, hidden if cell else hidden[0], own, bias, 1, dropout, train, False, True)
            last = torch.where(lengths > 0, picked(out, final)[:, 0], start[0])
            ended.append((last, *(part[0] for part in cells)))
            made.append(picked(out, reverse) if way else out)
        x = torch.cat(made, 2) if both_ways else made[0]
    return x, *(torch.stack(parts) for parts in zip(*ended, strict=True))


def picked(x: Tensor, at: Tensor) -> Tensor:
    """x[row, at[row]] for each row of [rows, steps, width]."""
    return x.gather(1, at[:, :, None].expand(-1, -1, x.shape[2]))


def shut(weight: Tensor) -> Tensor:
    """A column for the gates of an LSTM, input, forget, cell, output: nothing comes in, nothing is forgotten."""
    gate = torch.tensor([-SHUT, SHUT, 0.0, 0.0], dtype=weight.dtype, device=weight.device)
    return gate.repeat_interleave(weight.shape[0] // 4)[:, None]
