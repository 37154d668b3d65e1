"""Jagged requests: lengths and offsets that do not fit their values are refused by name, whichever engine runs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import grc
from grc.errors import InputError
from grc.runtime.inputs import FEW

ROWS = 20
FAR = 2**63 - 1


class Jagged(nn.Module):
    """A feature with the starts of its bags and weights, one with lengths, and one with offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.watched = nn.EmbeddingBag(ROWS, 4, mode="sum")
        self.liked = nn.EmbeddingBag(ROWS, 4, mode="mean", include_last_offset=True)
        self.seen = nn.EmbeddingBag(ROWS, 6, mode="max", padding_idx=3, include_last_offset=True)

    def forward(
        self,
        watched: Tensor,
        starts: Tensor,
        weights: Tensor,
        liked: Tensor,
        lengths: Tensor,
        seen: Tensor,
        ends: Tensor,
    ) -> Tensor:
        own = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return torch.cat([self.watched(watched, starts, weights), self.liked(liked, own), self.seen(seen, ends)], 1)


def jagged_inputs(batch: int) -> tuple[Tensor, ...]:
    make = torch.Generator().manual_seed(batch)
    zero = torch.zeros(1, dtype=torch.int64)
    first, second, third = (torch.randint(0, 5, (batch,), generator=make) for _ in range(3))
    for lengths in (first, second, third):
        lengths[-1] += 1
    watched, liked, seen = (torch.randint(ROWS, (int(n.sum()),), generator=make) for n in (first, second, third))
    starts, ends = torch.cat([zero, first.cumsum(0)])[:-1], torch.cat([zero, third.cumsum(0)])
    return watched, starts, torch.rand(len(watched), generator=make), liked, second, seen, ends


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Jagged().eval()


ENGINES = ["eager", *(pytest.param(name, marks=pytest.mark.engine) for name in ("inductor", "aoti"))]


@pytest.fixture(scope="module", params=ENGINES)
def program(request: pytest.FixtureRequest, model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> grc.Program:
    output = tmp_path_factory.mktemp("bags") / "jagged.grc"
    grc.compile(model, jagged_inputs, grc.Options(output=output, engine=request.param, batches=(4,), max_batch=128))
    return grc.load(output)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 7, 33, 100])
def test_answers_as_the_model_does(program: grc.Program, model: nn.Module, batch: int) -> None:
    inputs = jagged_inputs(batch)
    torch.testing.assert_close(program(*inputs), model(*inputs))


def spoilt(inputs: Sequence[Tensor], index: int, position: int, number: int) -> list[Tensor]:
    changed = [tensor.clone() for tensor in inputs]
    changed[index][position] = number
    return changed


BAD = {
    "starts late": ((1, 0, 1), 'input "starts" begins with 1, not with 0'),
    "starts before": ((1, 0, -1), 'input "starts" begins with -1, not with 0'),
    "falls": ((1, -2, 1000), 'input "starts" falls from 1000 to {end} at position {last}'),
    "ends behind": ((1, -1, FAR), f'input "starts" ends with {FAR}; input "watched" has {{watched}} values'),
    "too short": ((4, -1, 0), 'input "lengths" adds up to {less}; input "liked" has {liked} values'),
    "too long": ((4, 0, FAR), 'input "lengths" adds up to {more}; input "liked" has {liked} values'),
    "ends early": ((6, -1, 0), 'input "ends" falls from {before} to 0 at position {batch}'),
    "ends late": ((6, -1, 777), 'input "ends" ends with 777; input "seen" has {seen} values'),
    "negative": ((4, 1, -7), 'input "lengths" has length -7 at position 1'),
}


HINTS = {
    1: "offsets must begin with 0, never fall, and end within the values",
    4: "the lengths of all bags must add up to the number of values",
    6: "offsets must begin with 0, never fall, and end with the number of values",
}


@pytest.mark.parametrize("batch", [6, 2 * FEW])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_named(program: grc.Program, case: str, batch: int) -> None:
    inputs = jagged_inputs(batch)
    where, message = BAD[case]
    watched, starts, _, liked, lengths, seen, ends = inputs
    total = int(lengths.sum())
    told = {
        "end": int(starts[-1]), "last": batch - 1, "watched": len(watched), "liked": len(liked),
        "less": total - int(lengths[-1]), "more": total - int(lengths[0]) + FAR,
        "before": int(ends[-2]), "batch": batch, "seen": len(seen),
    }  # fmt: skip
    with pytest.raises(InputError) as caught:
        program(*spoilt(inputs, *where))
    assert (caught.value.message, caught.value.hint) == (message.format(**told), HINTS[where[0]])
    program(*inputs)  # the next request is answered


def test_sums_that_overflow_are_refused(program: grc.Program) -> None:
    inputs = jagged_inputs(2 * FEW)
    lengths = inputs[4].clone()
    lengths[:3] = torch.tensor([FAR, FAR, 2 + int(lengths[:3].sum())])  # in 64 bits, their sum is what it was
    assert int(lengths.sum()) == len(inputs[3])
    with pytest.raises(InputError, match='input "lengths" adds up to 18446744073709551'):
        program(*inputs[:4], lengths, *inputs[5:])


def test_weights_have_one_for_each_value(program: grc.Program) -> None:
    inputs = list(jagged_inputs(4))
    count = len(inputs[0])
    inputs[2] = inputs[2][:-1]
    with pytest.raises(InputError) as caught:
        program(*inputs)
    told = (
        f'input "weights" has size {count - 1} in dimension 0; it must be {count}, as in dimension 0 of input "watched"'
    )
    assert caught.value.message == told


@torch.no_grad()
def test_offsets_end_with_the_values(program: grc.Program) -> None:
    inputs = list(jagged_inputs(3))
    inputs[5] = torch.cat([inputs[5], torch.tensor([1])])
    with pytest.raises(InputError) as caught:
        program(*inputs)
    count = len(inputs[5])
    assert caught.value.message == f'input "ends" ends with {count - 1}; input "seen" has {count} values'


def test_no_values_and_no_rows(program: grc.Program) -> None:
    none, no_weights = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    zeros = torch.zeros(3, dtype=torch.int64)
    empty = program(none, zeros, no_weights, none, zeros, none, torch.zeros(4, dtype=torch.int64))
    assert torch.equal(empty, torch.zeros(3, 14))
    assert program(none, none, no_weights, none, none, none, zeros[:1]).shape == (0, 14)


NUMBERS = st.one_of(st.integers(-3, 12), st.sampled_from([FAR, -FAR - 1, 2**31, -(2**31), 2**32]))


def numbers(drawn: st.DataObject, count: int) -> Tensor:
    """Often sorted from 0 on, because little else is answered."""
    found = drawn.draw(st.lists(NUMBERS, min_size=count, max_size=count))
    return torch.tensor([0, *sorted(found)[1:]] if drawn.draw(st.booleans()) else found)


@torch.no_grad()
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.integers(1, 5), drawn=st.data())
def test_any_counts_are_answered_or_refused(
    program: grc.Program, model: nn.Module, batch: int, drawn: st.DataObject
) -> None:
    """Whatever stands there, the process lives on, and what is answered is what the model answers."""
    inputs = list(jagged_inputs(batch))
    for index in drawn.draw(st.sampled_from([(1,), (4,), (6,), (1, 4, 6)])):
        inputs[index] = numbers(drawn, len(inputs[index]))
    try:
        answer = program(*inputs)
    except InputError as error:
        assert error.message.startswith(('input "starts"', 'input "lengths"', 'input "ends"'))
        return
    torch.testing.assert_close(answer, model(*inputs))
