"""The activation unit against fp64 on every ISA, and where it applies: every activation and way of writing target attention."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grc.compiler import as_model, optimise, traced
from grc.kernels import FUSIONS, cpp
from grc.kernels.activation_unit import ACTIVATION_UNIT
from grc.kernels.activation_unit.cases import arguments
from grc.kernels.packed_linear.activations import DICE, NONE
from grc.options import Options
from grc.passes.pipeline import pipeline
from grc.precision.sites import LAYER, UNIT, find_sites
from grc.progress import Silent
from tests.kernels.contract import ISAS

STEPS, WIDTH = 9, 6


def wide(args: Any) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) else a for a in args]


def check(args: Any, isa: str) -> None:
    """At most twice the error of the reference in float32, plus the last bit of the largest score."""
    exact, plain = ACTIVATION_UNIT.reference(*wide(args)), ACTIVATION_UNIT.reference(*args)
    for _ in range(2):
        torch.full(exact.shape, torch.nan)  # the allocator hands this block out again
    found = cpp.call(ACTIVATION_UNIT, *args, isa=isa)
    assert found.shape == exact.shape and found.dtype is torch.float32
    if exact.numel():
        allowed = 2 * (plain - exact).abs().max() + 2**-23 * exact.abs().max()
        assert (found - exact).abs().max() <= allowed


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", ACTIVATION_UNIT.cases, ids=lambda case: case.name)
def test_cases(case: Any, isa: str) -> None:
    check(case.build(3), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", range(NONE, DICE + 1))
def test_every_activation(activation: int, isa: str) -> None:
    for n1, n2 in ((16, 8), (19, 3), (19, None)):
        check(arguments(activation, 3, 11, 5, n1, n2, (activation, activation)), isa)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("users", "steps"), [(1, 500), (2, 250), (40, 50), (3, 49)])
def test_blocks_over_threads(threads: int, users: int, steps: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(arguments(1, users, steps, 32, 80, 40), cpp.target_isa())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
def test_sigmoids_of_any_size(isa: str) -> None:
    """Dice of alpha 0 and scale 1 is x * sigmoid(x); in the last layer one unit lets it through."""
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e38, -3e38, torch.nan])])
    one, gate = torch.ones(1, 1), torch.tensor([[0.0], [1.0], [0.0]])
    first = torch.tensor([[1.0], [0.0]])
    args = (torch.zeros(1, 1), x.view(1, -1, 1), torch.zeros(1, 1), first, gate, one, torch.zeros(1), None,
            torch.ones(1), torch.zeros(1), DICE, 0)  # fmt: skip
    found, exact = cpp.call(ACTIVATION_UNIT, *args, isa=isa)[0], (x.double() * x.double().sigmoid())
    assert found[-1].isnan() and found[:-1].isfinite().all()
    torch.testing.assert_close(found[:-1].double(), exact[:-1], rtol=5e-7, atol=1e-35)


def test_refuses_what_does_not_fit() -> None:
    args = list(arguments(0, 3, 4, 8, 16, 8))
    for place, wrong, reason in (
        (0, args[0][:2], r"query is \[B, D\]"),
        (1, args[1][0], r"keys are \[B, S, D\]"),
        (2, args[2][:, :9], r"row is \[B, N1\]"),
        (3, args[3][:9], r"first is not a contiguous float32 \[16, 16\]"),
        (4, None, "need a gate"),
        (5, args[5].double(), r"second is not a contiguous float32 \[16, 8\]"),
        (7, args[7][:1], r"second_gate is not a contiguous float32 \[3, 8\]"),
        (8, args[8][:3], r"head is not a contiguous \[N\]"),
        (6, None, "second and second_bias come together"),
        (10, 9, "activations are 0 to 8"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            cpp.call(ACTIVATION_UNIT, *args[:place], wrong, *args[place + 1 :])


class Dice(nn.Module):
    def __init__(self, width: int, turned: bool = False, flat: bool = False):
        super().__init__()
        self.turned, self.flat = turned, flat
        self.norm = nn.BatchNorm1d(width, affine=turned)
        self.alpha = nn.Parameter(torch.randn(width, 1) if turned else torch.randn(width))
        self.norm.running_mean.normal_()  # type: ignore[union-attr]
        self.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        if turned:
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.turned:
            x = x.transpose(1, 2)
            p = torch.sigmoid(self.norm(x))
            return (self.alpha * (1 - p) * x + p * x).transpose(1, 2)
        p = torch.sigmoid(self.norm(x) if self.flat else self.norm(x.flatten(0, 1)).view_as(x))
        return x * p + x * (self.alpha * (1 - p))


class Attention(nn.Module):
    def __init__(
        self,
        join: Callable[[Tensor, Tensor], Tensor],
        columns: int,
        activation: Callable[[int], nn.Module],
        hidden: tuple[int, ...] = (10, 7),
        flat: bool = False,
    ):
        super().__init__()
        self.join, self.flat = join, flat
        layers: list[nn.Module] = []
        for given, made in pairwise((columns, *hidden)):
            layers += [nn.Linear(given, made), activation(made)]
        self.unit = nn.Sequential(*layers, nn.Linear(hidden[-1], 1))

    def forward(self, history: Tensor, target: Tensor) -> Tensor:
        pairs = self.join(history, target.unsqueeze(1).expand_as(history))
        scores = self.unit(pairs.flatten(0, 1)).view(-1, STEPS, 1) if self.flat else self.unit(pairs)
        return (scores.transpose(1, 2) @ history).squeeze(1)


JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "din": lambda h, t: torch.cat([t, h, t - h, t * h], -1),
    "product first": lambda h, t: torch.cat([h * t, h, t], -1),
    "in two parts": lambda h, t: torch.cat(
        [t, h[..., :2], h[..., 2:], t * torch.cat([h[..., :2], h[..., 2:]], -1)], -1
    ),
}
SIZES = {"din": 4, "product first": 3, "in two parts": 3}
SHAPES: dict[str, Callable[[int], nn.Module]] = {
    "dice": Dice,
    "dice of three dimensions": lambda n: Dice(n, turned=True),
    "prelu of one": lambda n: nn.PReLU(),
    "relu": lambda n: nn.ReLU(),
    "sigmoid": lambda n: nn.Sigmoid(),
    "gelu": lambda n: nn.GELU(),
    "tanh": lambda n: nn.Tanh(),
}


def rewritten(model: nn.Module) -> Any:
    """The graph and the passes' records, each pass proven against the model in double precision."""

    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        make = torch.Generator().manual_seed(batch)
        return torch.randn(batch, STEPS, WIDTH, generator=make), torch.randn(batch, WIDTH, generator=make)

    options = Options(strict=True)
    source = traced(as_model(model.eval(), inputs), Silent())
    return optimise(source, options, Silent(), pipeline(options, FUSIONS))


def compiled(model: nn.Module) -> tuple[list[str], list[str]]:
    """What was fused and why what wasn't."""
    fuse = next(record for record in rewritten(model).records if record.name == "fuse")
    return [c.saves for c in fuse.made], [c.missed for c in fuse.missed]


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("activation", SHAPES)
def test_applies(join: str, activation: str) -> None:
    torch.manual_seed(0)
    model = Attention(JOINS[join], SIZES[join] * WIDTH, SHAPES[activation])
    assert compiled(model) == (["10-7-1 over each step in one kernel"], [])


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("hidden", [(10, 7), (10,)])
@pytest.mark.parametrize("activation", ["dice", "prelu", "relu"])
def test_applies_to_steps_as_rows_and_to_one_hidden_layer(hidden: tuple[int, ...], flat: bool, activation: str) -> None:
    torch.manual_seed(0)
    make = {
        "dice": lambda n: Dice(n, flat=flat),
        "prelu": lambda n: nn.PReLU(n if flat else 1),
        "relu": lambda n: nn.ReLU(),
    }[activation]
    model = Attention(JOINS["din"], 4 * WIDTH, make, hidden, flat)
    nn.init.normal_(next(p for p in model.unit.parameters()))
    assert compiled(model) == ([f"{'-'.join(map(str, hidden))}-1 over each step in one kernel"], [])


def test_leaves_what_is_something_else() -> None:
    torch.manual_seed(0)

    class PerStep(nn.Module):
        """PReLU's channels are the steps here."""

        def __init__(self) -> None:
            super().__init__()
            self.prelu = nn.PReLU(STEPS)
            nn.init.normal_(self.prelu.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.prelu(x)

    for activation in (lambda n: PerStep(), lambda n: nn.Softplus()):
        assert compiled(Attention(JOINS["din"], 4 * WIDTH, activation)) == ([], [])
    one_for_all = torch.randn(1, 1, WIDTH)
    shared = Attention(lambda h, t: torch.cat([t, h, h * one_for_all], -1), 3 * WIDTH, SHAPES["relu"])
    assert compiled(shared) == ([], [])
    without_product = Attention(lambda h, t: torch.cat([t, h, t - h], -1), 3 * WIDTH, SHAPES["relu"])
    assert compiled(without_product) == ([], [])


def test_a_layer_too_large_for_a_core_is_left_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grc.kernels.activation_unit.pattern.LARGEST", 50)
    made, missed = compiled(Attention(JOINS["din"], 4 * WIDTH, SHAPES["relu"]))
    assert made == [] and missed == ["the first layer's weight of 12 x 10 leaves no room in the cache"]


def test_it_is_one_site_of_its_precision() -> None:
    sites = find_sites(rewritten(Attention(JOINS["din"], 4 * WIDTH, Dice)).graph)
    assert [(site.name, site.kind) for site in sites] == [("split_weight_1", LAYER), ("activation_unit_default", UNIT)]
    assert sites[1].elements == 10 * 2 * WIDTH + 7 * 10
