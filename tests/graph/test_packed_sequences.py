"""Recurrent layers over packed sequences: the same answers from padded steps, for every layer and every kind of row."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from grc.graph.packed_sequences import padded_sequences
from tests.graph.test_capture import captured

LENGTHS = {True: [7, 5, 5, 3, 2, 1], False: [2, 7, 1, 4, 4, 3]}


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
@pytest.mark.parametrize(("layers", "both_ways"), list(product((1, 2), (False, True))))
def test_padded_steps_give_what_packed_ones_give(kind: type[nn.RNNBase], layers: int, both_ways: bool) -> None:
    torch.manual_seed(0)
    options: list[dict[str, Any]] = [{}, {"bias": False}]
    options += [{"proj_size": 3}] if kind is nn.LSTM else [{"nonlinearity": "relu"}] if kind is nn.RNN else []
    ways = layers * (2 if both_ways else 1)
    for extra, is_sorted, batch_first, given in product(options, (True, False), (True, False), (True, False)):
        layer = kind(5, 8, layers, batch_first=batch_first, bidirectional=both_ways, **extra).eval()
        steps, lengths = torch.randn(6, 7, 5), torch.tensor(LENGTHS[is_sorted])
        state: Any = torch.randn(ways, 6, extra.get("proj_size", 8))
        state = (state, torch.randn(ways, 6, 8)) if kind is nn.LSTM else state

        def answers() -> list[Tensor]:
            x = steps if batch_first else steps.transpose(0, 1)  # noqa: B023
            packed = pack_padded_sequence(x, lengths, batch_first, is_sorted)  # noqa: B023
            states, last = layer(packed, state if given else None)  # noqa: B023
            states = PackedSequence(2 * states.data, *states[1:])
            padded = pad_packed_sequence(states, batch_first, padding_value=-1.0, total_length=9)  # noqa: B023
            return [*padded, *(last if isinstance(last, tuple) else (last,))]

        with torch.no_grad():
            expected = answers()
            with padded_sequences() as to_longest:
                found = answers()
        assert not to_longest
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape and torch.allclose(a, b, atol=1e-6)


def test_rows_without_steps_and_rows_that_are_too_long_read_nothing_else() -> None:
    layer, steps = nn.LSTM(5, 8, batch_first=True).eval(), torch.randn(3, 7, 5)
    start = (torch.randn(1, 3, 8), torch.randn(1, 3, 8))
    with torch.no_grad(), padded_sequences():
        _, last = layer(pack_padded_sequence(steps, torch.tensor([99, 7, 0]), batch_first=True), start)
        whole = layer(pack_padded_sequence(steps, torch.tensor([7, 7, 7]), batch_first=True), start)[1]
    for part, first, all_steps in zip(last, start, whole, strict=True):
        assert torch.equal(part[0, 2], first[0, 2]) and torch.equal(part[0, :2], all_steps[0, :2])


class Sessions(nn.Module):
    """The last state and an attention over all of them, of sessions of one to nine items."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.items = nn.Embedding(50, 8, padding_idx=0)
        self.layer, self.score = kind(8, 6, batch_first=True, bidirectional=True), nn.Linear(12, 1)

    def forward(self, items: Tensor) -> Tensor:
        mask = items != 0
        packed = pack_padded_sequence(self.items(items), mask.sum(1).to("cpu"), batch_first=True, enforce_sorted=False)
        states, last = self.layer(packed)
        last = last[0] if isinstance(last, tuple) else last
        states, _ = pad_packed_sequence(states, batch_first=True)
        weights = torch.exp(self.score(states)) * mask.unsqueeze(-1)
        return torch.cat([last[-1], (weights / weights.sum(1, keepdim=True) * states).sum(1)], 1)


def sessions(batch: int) -> tuple[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    items = torch.randint(1, 50, (batch, 9), generator=generator)
    lengths = torch.randint(1, 10, (batch, 1), generator=generator)
    lengths[0] = 9  # one row that has them all, as the mask of this model wants
    return (items.where(torch.arange(9) < lengths, 0),)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_model_with_packed_sessions_is_captured(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    model = Sessions(kind).eval()
    source = captured(model, sessions)
    assert source.notes == [] and source.mode == "non-strict"
    (items,) = sessions(6)
    with torch.no_grad():
        assert torch.allclose(source.graph(items)[0], model(items), atol=1e-6)


def test_the_last_step_of_each_row_is_read_by_a_number_of_rows() -> None:
    """`len()` of a tensor is a number to Python, and would fix the batch."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(4, 3, batch_first=True)

        def forward(self, steps: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(steps, lengths, batch_first=True, enforce_sorted=False)
            states, counts = pad_packed_sequence(self.layer(packed)[0], batch_first=True, total_length=5)
            return states[torch.arange(len(counts)), counts - 1]

    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, 5, 4, generator=torch.Generator().manual_seed(batch)), torch.arange(batch) % 5 + 1

    torch.manual_seed(0)
    assert captured(Last().eval(), inputs).mode == "non-strict"
