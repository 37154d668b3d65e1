"""The program: the model's own signature, every request checked, safe from many threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import grc
from grc.errors import InputError
from grc.runtime.structure import flatten, unflatten


class Ranker(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, 8) for n in (20, 30))
        self.top = nn.Linear(5 + 16, 3)

    def forward(self, dense: Tensor, ids: Tensor) -> dict[str, Tensor]:
        rows = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        scores = self.top(torch.cat([dense, *rows], 1))
        return {"scores": scores, "best": scores.argmax(1)}


def ranker_inputs(batch: int) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(batch)
    ids = torch.stack([torch.randint(n, (batch,), generator=make) for n in (20, 30)], 1)
    return torch.rand(batch, 5, generator=make), ids


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Ranker().eval()


ON_GPU = pytest.param("cuda", marks=[pytest.mark.engine, pytest.mark.gpu])


@pytest.fixture(scope="module", params=["eager", pytest.param("inductor", marks=pytest.mark.engine), ON_GPU])
def program(request: pytest.FixtureRequest, model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> grc.Program:
    output = tmp_path_factory.mktemp("program") / "ranker.grc"
    engine, device = ("auto", "cuda") if request.param == "cuda" else (request.param, "cpu")
    options = grc.Options(output=output, engine=engine, device=device, batches=(1, 8), max_batch=64)
    grc.compile(model, ranker_inputs, options)
    return grc.load(output)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_answers_as_the_model_does(program: grc.Program, model: nn.Module, batch: int) -> None:
    inputs = ranker_inputs(batch)
    expected, found = model(*inputs), program(*inputs)
    assert list(found) == ["scores", "best"]
    torch.testing.assert_close(found["scores"], expected["scores"])
    assert torch.equal(found["best"], expected["best"])


def test_takes_keywords(program: grc.Program) -> None:
    dense, ids = ranker_inputs(3)
    by_name, by_place = program(ids=ids, dense=dense), program(dense, ids)
    assert torch.equal(by_name["scores"], by_place["scores"])


@pytest.mark.parametrize(
    ("spoil", "form"), [(lambda t: t.to("meta"), "dense on meta"), (lambda t: t.to_sparse(), "sparse_coo on cpu")]
)
def test_memory_that_no_kernel_reads_is_refused(
    program: grc.Program, spoil: Callable[[Tensor], Tensor], form: str
) -> None:
    dense, ids = ranker_inputs(3)
    program(dense, ids)  # of the same dtypes and shapes
    with pytest.raises(InputError, match=f'input "dense" is {form}; the artifact takes dense tensors on cpu'):
        program(spoil(dense), ids)


def test_tensors_without_rows_or_memory_of_their_own_are_refused(program: grc.Program) -> None:
    dense, ids = ranker_inputs(3)
    program(dense, ids)
    with FakeTensorMode():
        fake = torch.zeros(3, 5)
    with pytest.raises(InputError, match='input "dense" is a FakeTensor, which no kernel reads'):
        program(fake, ids)
    with pytest.raises(InputError, match='input "dense" is nested on cpu; the artifact takes dense tensors on cpu'):
        program(torch.nested.nested_tensor(list(dense)), ids)
    assert torch.equal(program(nn.Parameter(dense), ids)["scores"], program(dense, ids)["scores"])


def test_an_input_given_twice_is_refused(program: grc.Program) -> None:
    dense, ids = ranker_inputs(3)
    with pytest.raises(grc.GrcError, match="the request has input dense twice"):
        program(dense, ids, dense=dense)
    with pytest.raises(grc.GrcError, match="misses input ids and has an unknown one, idds"):
        program(dense, idds=ids)


def test_batch_zero_is_answered_with_empty_outputs(program: grc.Program) -> None:
    dense, ids = ranker_inputs(1)
    found = program(dense[:0], ids[:0])
    assert found["scores"].shape == (0, 3) and found["best"].dtype is torch.int64


def test_strided_inputs_and_inputs_with_history_are_read_rightly(program: grc.Program) -> None:
    dense, ids = ranker_inputs(6)
    wide = torch.stack([dense, dense], -1).requires_grad_()
    expected = program(dense, ids)["scores"]
    assert torch.equal(program(wide[..., 0], ids.t().contiguous().t())["scores"], expected)


@pytest.mark.parametrize("history", [False, True])
def test_inputs_of_negated_memory_are_read_rightly(program: grc.Program, history: bool) -> None:
    """The imaginary part of a conjugate is memory with a note that its sign is the other."""
    for batch in (1, 6):
        dense, ids = ranker_inputs(batch)
        strided = torch.complex(dense, -dense).conj().imag.requires_grad_(history)
        whole = torch._neg_view(-dense).requires_grad_(history)
        assert strided.is_neg() and whole.is_neg() and whole.is_contiguous() and torch.equal(whole, dense)
        expected = program(dense, ids)["scores"]
        assert torch.equal(program(strided, ids)["scores"], expected)
        assert torch.equal(program(whole, ids)["scores"], expected)


def test_many_threads_get_their_own_answers(program: grc.Program) -> None:
    requests = [ranker_inputs(batch) for batch in (1, 3, 8, 13)]
    expected = [program(*inputs)["scores"].clone() for inputs in requests]

    def ask(turn: int) -> bool:
        return torch.equal(program(*requests[turn % 4])["scores"], expected[turn % 4])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(400)))


BAD = [
    (lambda d, i: (d.double(), i), 'input "dense" is float64; the model takes float32'),
    (lambda d, i: (d, i.int()), 'input "ids" is int32; the model takes int64'),
    (lambda d, i: (d[0], i), 'input "dense" has 1 dimensions [5]; the model takes [batch, 5]'),
    (lambda d, i: (d[:, :4], i), 'input "dense" has shape [4, 4]; the model takes [batch, 5]'),
    (lambda d, i: (d[:2], i), 'input "ids" has size 4 in dimension 0; at batch 2 it must be 2'),
    (lambda d, i: (d.repeat(20, 1), i.repeat(20, 1)), "the request has batch 80; the artifact takes up to 64"),
    (lambda d, i: (d, i + 20), 'input "ids" has id 30 at row 0, column 0; table tables.0.weight has 20 rows'),
    (lambda d, i: (d, i - 40), 'input "ids" has id -30 at row 0, column 0; table tables.0.weight has 20 rows'),
    (lambda d, i: (d, "ids"), 'input "ids" is a str, not a tensor'),
    (lambda d, i: (d,), "the request misses input ids; ranker takes dense, ids"),
    (lambda d, i: (d, i, i), "the request has too many inputs; ranker takes dense, ids"),
    (lambda d, i: (d.index_fill(1, torch.tensor([2]), torch.nan), i), 'input "dense" holds nan at [0, 2]'),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_a_bad_request_is_named(program: grc.Program, spoil: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        program(*spoil(*ranker_inputs(4)))  # type: ignore[operator]
    assert caught.value.message == message and caught.value.hint
    program(*ranker_inputs(4))  # the next request is answered


@pytest.mark.parametrize("engine", ["eager", ON_GPU])
@pytest.mark.parametrize("policy", ["zero", "clamp", "hash"])
def test_bad_ids_by_policy(model: nn.Module, tmp_path: Path, policy: str, engine: str) -> None:
    device, engine = ("cuda", "inductor") if engine == "cuda" else ("cpu", engine)
    options = grc.Options(
        tmp_path / "r.grc", device, engine, batches=(4,), buckets=(4,), max_batch=4, on_bad_id=policy  # type: ignore[arg-type]
    )  # fmt: skip
    grc.compile(model, ranker_inputs, options)
    dense, ids = ranker_inputs(4)
    bad = ids.clone()
    bad[0, 0], bad[2, 1] = 25, -3
    found = grc.load(tmp_path / "r.grc")(dense, bad)["scores"]
    rows = torch.tensor([20, 30])
    mended = {"zero": bad, "clamp": bad.clamp(min=0).minimum(rows - 1), "hash": bad.remainder(rows)}[policy]
    with torch.no_grad():
        if policy == "zero":
            looked = [t(mended[:, i].clamp(0, int(rows[i]) - 1)) for i, t in enumerate(model.tables)]  # type: ignore[arg-type]
            looked[0][0], looked[1][2] = 0, 0
            expected = model.top(torch.cat([dense, *looked], 1))  # type: ignore[operator]
        else:
            expected = model(dense, mended)["scores"]
    torch.testing.assert_close(found, expected)


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items, self.positions = nn.Embedding(30, 8), nn.Parameter(torch.randn(12, 8))

    def forward(self, history: Tensor) -> Tensor:
        return (self.items(history) + self.positions[: history.shape[1]])[:, -1]


@torch.no_grad()
@pytest.mark.parametrize("engine", ["eager", pytest.param("inductor", marks=pytest.mark.engine)])
def test_steps_without_a_position_are_refused_before_a_kernel_reads_them(engine: str, tmp_path: Path) -> None:
    model = Steps().eval()
    options = grc.Options(output=tmp_path / "steps.grc", engine=engine, batches=(1,))
    grc.compile(model, lambda batch: (torch.ones(batch, 3 + (7 * batch) % 5, dtype=torch.int64),), options)
    program = grc.load(options.output)
    for steps in (1, 2, 12):
        history = torch.randint(30, (4, steps))
        torch.testing.assert_close(program(history), model(history))
    for steps in (0, 13, 100_000):
        with pytest.raises(InputError) as caught:
            program(torch.zeros(2, steps, dtype=torch.int64))
        assert str(caught.value) == f'input "history" has size {steps} in dimension 1; the model takes 1 to 12'
    assert program(torch.zeros(0, 0, dtype=torch.int64)).shape == (0, 8)


def test_a_batch_beyond_what_was_traced_is_refused(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.shape[0] > 100 else x

    options = grc.Options(output=tmp_path / "two.grc", engine="eager", batches=(1, 1024))
    grc.compile(Two().eval(), lambda batch: (torch.ones(batch, 4),), options)
    with pytest.raises(InputError, match="the request has batch 101; the artifact takes up to 100") as caught:
        grc.load(options.output)(torch.ones(101, 4))
    assert caught.value.hint == "split the request: the model, as it was traced, takes no more"


def test_structures_survive_json() -> None:
    values = torch.rand(3, 4).topk(2)
    nested = {"a": [torch.ones(1), (torch.zeros(2), 3, None)], "b": values}
    leaves: list[Tensor] = []
    structure = flatten(nested, leaves)
    back = unflatten(structure, leaves)
    assert back["a"][1][1:] == (3, None) and type(back["b"]) is torch.return_types.topk
    assert torch.equal(back["b"].indices, values.indices)


def test_numbers_among_the_inputs_are_told_as_they_were_compiled(tmp_path: Path) -> None:
    class Best(nn.Module):
        def forward(self, x: Tensor, k: int = 4) -> Tensor:
            return x.topk(k)[0]

    options = grc.Options(output=tmp_path / "best.grc", engine="eager", batches=(4,))
    grc.compile(Best().eval(), lambda batch: (torch.randn(batch, 8), 3), options)
    program, x = grc.load(tmp_path / "best.grc"), torch.randn(2, 8)
    assert torch.equal(program(x, 3), x.topk(3)[0])
    for request, holds in (((x, 5), "x, k=5"), ((x,), "x")):
        with pytest.raises(InputError, match=f"^best takes x, k=3; the request holds {holds}$"):
            program(*request)


class Rotary(nn.Module):
    """Positions as turns of the complex plane, which is how rotary embeddings are published."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Embedding(50, 8)
        self.register_buffer("turns", torch.polar(torch.ones(6, 4), torch.rand(6, 4)))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = torch.view_as_complex(self.steps(ids).unflatten(-1, (4, 2))) * self.turns
        return torch.view_as_real(rows).flatten(-2).sum(1)


@torch.no_grad()
@pytest.mark.parametrize("engine", ["eager", pytest.param("inductor", marks=pytest.mark.engine)])
def test_complex_weights_are_stored(engine: str, tmp_path: Path) -> None:
    def inputs(batch: int) -> tuple[torch.Tensor]:
        return (torch.randint(50, (batch, 6), generator=torch.Generator().manual_seed(batch)),)

    model, output = Rotary().eval(), tmp_path / "rotary.grc"
    grc.compile(model, inputs, grc.Options(output=output, engine=engine, batches=(1, 8)))
    torch.testing.assert_close(grc.load(output)(*inputs(5)), model(*inputs(5)))
