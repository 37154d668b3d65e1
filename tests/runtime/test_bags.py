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
    """A feature with offsets and weights, and one with lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.watched = nn.EmbeddingBag(ROWS, 4, mode="sum")
        self.liked = nn.EmbeddingBag(ROWS, 4, mode="mean", include_last_offset=True)

    def forward(self, watched: Tensor, starts: Tensor, weights: Tensor, liked: Tensor, lengths: Tensor) -> Tensor:
        ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return torch.cat([self.watched(watched, starts, weights), self.liked(liked, ends)], 1)


def jagged_inputs(batch: int) -> tuple[Tensor, ...]:
    make = torch.Generator().manual_seed(batch)
    first, second = (torch.randint(0, 5, (batch,), generator=make) for _ in range(2))
    watched, liked = (torch.randint(ROWS, (int(n.sum()) + 1,), generator=make) for n in (first, second))
    second[-1] += 1
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), first.cumsum(0)])[:-1]
    return watched, starts, torch.rand(len(watched), generator=make), liked, second


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
    "negative": ((4, 1, -7), 'input "lengths" has length -7 at position 1'),
}


@pytest.mark.parametrize("batch", [6, 2 * FEW])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_named(program: grc.Program, case: str, batch: int) -> None:
    inputs = jagged_inputs(batch)
    where, message = BAD[case]
    watched, starts, _, liked, lengths = inputs
    total = int(lengths.sum())
    told = {
        "end": int(starts[-1]), "last": batch - 1, "watched": len(watched), "liked": len(liked),
        "less": total - int(lengths[-1]), "more": total - int(lengths[0]) + FAR,
    }  # fmt: skip
    with pytest.raises(InputError) as caught:
        program(*spoilt(inputs, *where))
    hint = (
        "send one value for each count" if where[0] == 4 else "offsets begin with 0, ascend, and end within the values"
    )
    assert (caught.value.message, caught.value.hint) == (message.format(**told), hint)
    program(*inputs)  # the next request is answered


def test_sums_that_overflow_are_refused(program: grc.Program) -> None:
    inputs = jagged_inputs(2 * FEW)
    lengths = inputs[4].clone()
    lengths[:3] = torch.tensor([FAR, FAR, 2 + int(lengths[:3].sum())])  # in 64 bits, their sum is what it was
    assert int(lengths.sum()) == len(inputs[3])
    with pytest.raises(InputError, match='input "lengths" adds up to 18446744073709551'):
        program(*inputs[:4], lengths)


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


def test_no_values_and_no_rows(program: grc.Program) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    zeros = torch.zeros(3, dtype=torch.int64)
    assert torch.equal(program(none, zeros, torch.zeros(0), none, zeros), torch.zeros(3, 8))
    assert program(none, none, torch.zeros(0), none, none).shape == (0, 8)


NUMBERS = st.one_of(st.integers(-3, 12), st.sampled_from([FAR, -FAR - 1, 2**31, -(2**31), 2**32]))


@torch.no_grad()
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.integers(1, 5), more=st.data())
def test_any_counts_are_answered_or_refused(
    program: grc.Program, model: nn.Module, batch: int, more: st.DataObject
) -> None:
    """Whatever stands there, the process lives on, and what is answered is what the model answers."""
    watched, _, weights, liked, _ = jagged_inputs(batch)
    starts, lengths = (torch.tensor(more.draw(st.lists(NUMBERS, min_size=batch, max_size=batch))) for _ in range(2))
    given = watched, starts, weights, liked, lengths
    try:
        answer = program(*given)
    except InputError as error:
        assert error.message.startswith(('input "starts"', 'input "lengths"'))
        return
    torch.testing.assert_close(answer, model(*given))
