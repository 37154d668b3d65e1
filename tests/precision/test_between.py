"""What lies between layers of 16 bits: kept in 16 bits where numbers keep their size, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from grc import compiler
from grc.errors import BudgetError
from grc.graph.match import value
from grc.lowering.choose import Candidate, Choice
from grc.lowering.engine import Built
from grc.options import Options
from grc.precision.apply import FLOATS_BETWEEN, HALVES_BETWEEN, graphs_of
from grc.precision.between import with_halves_between
from grc.precision.calibration import calibration_of
from grc.precision.gpu import narrowed
from grc.precision.quality import budget
from grc.precision.search import Search
from grc.precision.sites import find_sites
from grc.progress import Silent
from tests.precision.models import Ranker, captured, doubled, doubled_inputs, ranker_inputs

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Residual(nn.Module):
    """Residual blocks over steps that a flag leaves out, with every operator that lets 16 bits through among them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.gates, self.head = (
            nn.Linear(*s) for s in ((24, 24), (24, 24), (24, 48), (48, 3))
        )
        self.norm, self.slope = nn.LayerNorm(24), nn.PReLU()
        self.positions = nn.Parameter(torch.randn(6, 24))

    def forward(self, steps: Tensor) -> Tensor:
        x = self.first(steps) + self.positions
        x = x * (steps.abs().sum(2, keepdim=True) > 0).to(torch.float32)
        x = x + functional.silu(self.second(self.norm(x)))
        up, gate = self.gates(x).split(24, dim=2)
        x = torch.stack([self.slope(up), torch.tanh(gate) - gate], 2).flatten(2)
        return self.head(functional.gelu(x).mean(1)) * 2


def steps(batch: int) -> tuple[Tensor]:
    make = torch.Generator().manual_seed(batch)
    return (torch.randn(batch, 6, 24, generator=make) * (torch.rand(batch, 6, 1, generator=make) > 0.2),)


def halves(model: nn.Module, inputs, precision: str = "fp16") -> tuple[fx.GraphModule, fx.GraphModule]:
    """A graph with layers of 16 bits, and the same with 16 bits between them."""
    torch.manual_seed(0)
    _, graph = captured(model, inputs)
    sites = find_sites(graph)
    narrow = narrowed(graph, sites, {site.name: precision for site in sites})
    between = with_halves_between(narrow)
    assert between is not None
    return narrow, between


def wide(graph: fx.GraphModule) -> list[str]:
    """The calls that answer in float32."""
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    return [n.name for n in calls if isinstance(value(n), Tensor) and value(n).dtype is torch.float32]


@pytest.mark.parametrize("precision", HALF)
def test_nothing_between_layers_is_wide(precision: str) -> None:
    narrow, between = halves(Residual(), steps, precision)
    casts = [node for node in between.graph.nodes if node.target is torch.ops.aten.to.dtype]
    # Of the request, of the flags that are made from it, and of the answer.
    assert [node.args[1] for node in casts].count(torch.float32) == 2 and len(casts) == 4
    assert len(wide(between)) < len(wide(narrow)) / 2
    for batch in (1, 9):
        (truth,), (found,) = answers(narrow, batch), answers(between, batch)
        assert found.dtype is torch.float32
        assert (found - truth).abs().max() <= (0.003 if precision == "fp16" else 0.03) * truth.abs().max()


def answers(graph: fx.GraphModule, batch: int) -> list[Tensor]:
    with torch.no_grad():
        return list(graph(*steps(batch)))


class Counts(nn.Module):
    """Counts that float16 has no numbers for, before a layer and beside one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, counts: Tensor) -> Tensor:
        x = torch.relu(self.first(torch.log1p(counts * 2)))
        return self.head(x).squeeze(1) + (counts + x).mean(1)


def test_what_comes_from_the_request_stays_wide() -> None:
    narrow, between = halves(Counts(), lambda batch: (torch.full((batch, 8), 1e6),))
    with torch.no_grad():
        truth, found = (graph(torch.full((3, 8), 1e6))[0] for graph in (narrow, between))
    assert torch.isfinite(found).all() and torch.allclose(found, truth, rtol=1e-3)


class Beside(nn.Module):
    """A layer's answer with something beside it, and another layer."""

    def __init__(self, join) -> None:
        super().__init__()
        self.first, self.head, self.join = nn.Linear(8, 8), nn.Linear(8, 4), join

    def forward(self, x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        y = self.join(self.first(x), counts)
        return y, self.head(torch.relu(self.first(x) * 2))


@pytest.mark.parametrize(
    "join",
    [
        lambda y, counts: y * counts,
        lambda y, counts: torch.cat([y, counts], 1),
        lambda y, counts: y + counts.double(),
        lambda y, counts: y + torch.tensor([1e6]),
    ],
    ids=["times whole numbers", "beside whole numbers", "plus float64", "plus a large constant"],
)
def test_numbers_that_are_not_of_a_layer_are_not_rounded(join) -> None:
    """In 16 bits a million is infinite, and a float64 answer stays one."""
    narrow, between = halves(Beside(join), lambda batch: (torch.rand(batch, 8), torch.full((batch, 8), 1_000_003)))
    with torch.no_grad():
        given = torch.rand(3, 8), torch.full((3, 8), 1_000_003)
        truth, found = narrow(*given)[0], between(*given)[0]
    assert torch.isfinite(found).all() and torch.equal(found, truth) and found.dtype is truth.dtype


class Candidates(nn.Module):
    """A user's row repeated for candidates that vary in number."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, user: Tensor, items: Tensor) -> Tensor:
        repeated = self.user(user).unsqueeze(1).expand(-1, items.shape[1], -1)
        return self.head(torch.relu(repeated + self.item(items)) * items.shape[1])


def test_sizes_that_vary_are_no_numbers_to_round() -> None:
    narrow, between = halves(Candidates(), lambda batch: (torch.rand(batch, 8), torch.rand(batch, 3 + batch % 4, 8)))
    given = torch.rand(5, 8), torch.rand(5, 9, 8)
    with torch.no_grad():
        (truth,), (found,) = narrow(*given), between(*given)
    assert found.shape == truth.shape and (found - truth).abs().max() <= 0.003 * truth.abs().max()
    assert len(wide(between)) < len(wide(narrow))


class Ids(nn.Module):
    """A bucket of a layer's answer: rounded, it is another one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x).squeeze(1)
        return torch.bucketize(y, torch.tensor([0.0, 0.5])), torch.exp(y)


def test_operators_that_may_change_a_size_or_a_number_take_float32() -> None:
    _, between = halves(Ids(), lambda batch: (torch.randn(batch, 8),))
    assert {
        value(n.args[0]).dtype for n in between.graph.nodes if "bucketize" in n.name or n.name.startswith("exp")
    } == {torch.float32}


def test_a_graph_without_anything_between_is_left_alone() -> None:
    _, graph = captured(Ranker(), ranker_inputs)
    assert with_halves_between(graph) is None


@pytest.mark.parametrize("size", [1.0, 40000.0])
def test_a_sum_that_overflows_leaves_the_floats_for_a_second_try(size: float, tmp_path: Path) -> None:
    """No layer writes what float16 has no number for; their sum is one, which no trial of layers sees."""
    source, graph = captured(doubled(size), doubled_inputs)
    search = Search(
        graph, find_sites(graph), calibration_of(source, None), budget(()), "fp16", lambda text: None, "cuda"
    )
    found = search.run()
    assert {decision.format for decision in found.decisions} == {"fp16"}
    (inputs,) = doubled_inputs(30)
    tries = list(graphs_of(found, search.sites, graph, "cuda", tmp_path))
    assert [notes for _, notes in tries] == [[HALVES_BETWEEN], [FLOATS_BETWEEN]]
    finite = [bool(torch.isfinite(graphs[""](inputs)[0]).all()) for graphs, _ in tries]
    assert finite == [size == 1.0, True]


def test_where_no_engine_is_inside_of_the_budget_floats_are_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried: list[fx.GraphModule] = []

    def lower(source, plain, optimised, graphs, options, folder, progress, found):
        (folder / "parts").mkdir()
        tried.append(graphs[""])
        if len(tried) == 1:
            raise BudgetError("no engine can be used", "allow more")
        candidate = Candidate(Built("inductor", "inductor.pt2", {}), list, 0.0)
        return Choice([candidate], {}, {}, [(8, candidate)]), None, {}

    monkeypatch.setattr(compiler, "lower", lower)
    source = compiler.traced(compiler.as_model(doubled(1.0), doubled_inputs), Silent())
    options = Options(tmp_path / "low.grc", "cuda", precision="fp16")
    optimised = compiler.optimise(source, options, Silent())
    found, _ = compiler.lower_in_fewer_bits(source, source.graph, optimised, options, tmp_path, Silent())
    assert [len(wide(graph)) for graph in tried] == sorted({len(wide(graph)) for graph in tried})
    assert FLOATS_BETWEEN in found.notes and HALVES_BETWEEN not in found.notes
