"""Chains of narrow layers: which layers share a kernel, what must stay outside of it, and that answers stay what they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

pytest.importorskip("triton", reason="Triton is not installed")
from grc.graph.oracle import run_fp64
from grc.kernels import layer_chain as kinds
from grc.kernels.layer_chain import decode
from grc.lowering.chains import chains, takes_chains, with_chains
from tests.kernels.bags import DEVICE
from tests.kernels.interpreter import elsewhere, passes, runs
from tests.passes.small import graph_of


def floats(*sizes: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes))).to(dtype)


def halves(**modules: nn.Module) -> dict[str, nn.Module]:
    return {name: module.half() for name, module in modules.items()}


def graph(
    function: Callable[..., Any], *inputs: Tensor, fixed: Sequence[int] = (), **modules: nn.Module
) -> fx.GraphModule:
    torch.manual_seed(1)
    for module in modules.values():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    return graph_of(function, *inputs, fixed=fixed, **modules)


def kinds_of(found: fx.GraphModule) -> list[list[int]]:
    """The steps of every chain that pays."""
    return [[part.kind for part in chain.parts.values()] for chain in chains(found) if chain.pays]


def calls(found: fx.GraphModule) -> list[fx.Node]:
    return [n for n in found.graph.nodes if getattr(n.target, "namespace", "") == "grc_cuda"]


def block(self: Any, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The second half of a Transformer layer, and the projection that begins the next."""
    x = self.norm(x + self.out(functional.silu(x)))
    x = (x + self.down(functional.gelu(self.up(x)))) * mask.unsqueeze(-1)
    return x, self.project(x)


BLOCK = {"norm": (24,), "out": (24, 24), "up": (24, 50), "down": (50, 24), "project": (24, 72)}


def block_modules() -> dict[str, nn.Module]:
    return {name: (nn.LayerNorm if name == "norm" else nn.Linear)(*sizes) for name, sizes in BLOCK.items()}


def test_layers_that_follow_each_other_are_one_call() -> None:
    inputs = floats(3, 5, 24), torch.rand(3, 5) < 0.7
    before = graph(block, *inputs, **halves(**block_modules()))
    found = with_chains(before)
    assert len(calls(found)) == 1 and takes_chains(before)
    steps = [step[0] for step in decode(calls(found)[0].args[-1])]
    assert steps.count(kinds.LINEAR) == 4 and steps.count(kinds.NORM) == 1 and steps.count(kinds.OUTPUT) == 2
    assert steps.count(kinds.ROW) == 1
    assert not [n for n in found.graph.nodes if "linear" in str(n.target) or "gelu" in str(n.target)]


def test_a_value_that_comes_back_from_outside_begins_a_chain_of_its_own() -> None:
    def forward(self, x):
        y = self.b(self.a(x))
        mixed = y.transpose(0, 1).flip(0).transpose(0, 1)  # no row stays what it was
        return self.d(self.c(mixed)) + y

    layers = {name: nn.Linear(16, 16) for name in "abcd"}
    before = graph(forward, floats(4, 3, 16), **halves(**layers))
    assert kinds_of(before) == [[kinds.LINEAR] * 2, [kinds.LINEAR, kinds.LINEAR, kinds.ADD]]
    assert len(calls(with_chains(before))) == 2


def test_two_chains_never_wait_for_each_other() -> None:
    """Each of two towers reads the other's middle through rows that are mixed: all in one chain each would be a circle."""

    def forward(self, x, y):
        p, q = self.a(x), self.b(y)
        return self.c(self.e(p) + q.flip(0)), self.d(self.f(q) + p.flip(0))

    layers = {name: nn.Linear(16, 16) for name in "abcdef"}
    inputs = floats(4, 16), floats(4, 16)
    before = graph(forward, *inputs, fixed=(0, 1), **halves(**layers))
    found = with_chains(before)
    found.graph.lint()
    order = {node: at for at, node in enumerate(found.graph.nodes)}
    assert all(order[n] < order[user] for n in order for user in n.users)


def shared(self: Any, x: Tensor) -> Tensor:
    return self.a(x) + self.b(x)


@pytest.mark.parametrize(
    ("change", "modules"),
    [
        ("float32", {"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)}),
        ("too wide to hold", {"a": nn.Linear(300, 16), "b": nn.Linear(300, 16)}),
    ],
)
def test_what_the_kernel_does_not_hold_is_left_alone(change: str, modules: dict[str, nn.Module]) -> None:
    half = change != "float32"
    width = modules["a"].in_features
    x = floats(4, width, dtype=torch.float16 if half else torch.float32)
    before = graph(shared, x, **(halves(**modules) if half else modules))
    assert not takes_chains(before)


def test_a_layer_alone_is_left_to_cublas() -> None:
    before = graph(lambda self, x: torch.relu(self.a(x)), floats(4, 16), **halves(a=nn.Linear(16, 16)))
    assert not takes_chains(before)


def test_a_comparison_of_ids_is_made_where_its_mask_is_read() -> None:
    def forward(self, ids, x):
        mask = (ids != 0).unsqueeze(-1)
        last = self.b(self.a(x) * mask)
        return last, self.norm(x[:, -1:] * mask[:, -1:])

    ids = torch.randint(0, 3, (4, 6))
    modules = halves(a=nn.Linear(16, 16), b=nn.Linear(16, 16), norm=nn.LayerNorm(16))
    found = with_chains(graph(forward, ids, floats(4, 6, 16), **modules))
    (call,) = calls(found)
    laid = [n for n in call.args[0] if "as_strided" in str(n.target)]
    assert len(laid) == 1 and laid[0].args[0].op == "placeholder" and laid[0].meta["val"].dtype == torch.int64


WIDE = {"norm": (40,), "wide": (40, 520), "a": (40, 40)}


def wide(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = self.norm(self.a(x) * 0.5 + self.a.bias)
    return x, functional.silu(self.wide(x))


def head(self: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(self.c(self.p(self.b(self.q(self.a(x))).float().half() + 1.5)))


def compared(self: Any, x: Tensor, ids: Tensor) -> Tensor:
    mask = (ids != 2).unsqueeze(-1)
    return self.b(self.a(x) * mask) * mask


CASES: dict[str, tuple[Any, tuple[Tensor, ...], dict[str, nn.Module]]] = {
    "block": (block, (floats(3, 5, 24), torch.rand(3, 5) < 0.7), block_modules()),
    "many rows": (block, (floats(70, 50, 24), torch.rand(70, 50) < 0.7), block_modules()),
    "wide": (
        wide,
        (floats(7, 40),),
        {n: (nn.LayerNorm if n == "norm" else nn.Linear)(*sizes) for n, sizes in WIDE.items()},
    ),
    "head": (
        head,
        (floats(9, 33),),
        dict(a=nn.Linear(33, 70), q=nn.PReLU(), b=nn.Linear(70, 20, bias=False), p=nn.PReLU(20), c=nn.Linear(20, 1)),
    ),
    "compared": (
        compared,
        (floats(4, 6, 16), torch.randint(0, 4, (4, 6), generator=torch.Generator().manual_seed(3))),
        dict(a=nn.Linear(16, 16), b=nn.Linear(16, 16)),
    ),
}


@runs
@pytest.mark.parametrize("fixed", [False, True], ids=["any batch", "one batch"])
@pytest.mark.parametrize("name", CASES)
def test_answers_are_as_exact_as_those_of_single_layers(name: str, fixed: bool) -> None:
    function, inputs, modules = CASES[name]
    if fixed and name == "many rows":
        pytest.skip("the same program as with any batch")
    inputs = tuple(tensor.to(DEVICE) for tensor in inputs)
    modules = {name: module.to(DEVICE) for name, module in halves(**modules).items()}
    before = graph(function, *inputs, fixed=tuple(range(len(inputs))) if fixed else (), **modules)
    found = with_chains(before)
    assert calls(found)
    with torch.no_grad():
        plain, ours, exact = before(*inputs), found(*inputs), run_fp64(before, *inputs)
    for mine, theirs, want in zip(ours, plain, exact, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        error, bound = ((t.double() - want).abs().max().item() for t in (mine, theirs))
        assert error <= 2 * bound + torch.finfo(torch.float16).eps * want.abs().max().item(), (error, bound)


@elsewhere
def test_in_the_interpreter() -> None:
    passes(__file__, least=16)
