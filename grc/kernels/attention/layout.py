"""Where a view comes from: follow a value through reshapes, transposes and selections, element by element.

Exported attention moves heads and steps through half a dozen views, and the copies between them can't be read off
strides. Replayed on the positions 0, 1, 2, ... of the value that the views begin at, any chain of them shows where each
element comes from. Sizes that vary are replaced by small primes, so that no two of them are alike by chance.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from grc.graph.match import aten, attribute, is_op, same_size, shape, value
from grc.graph.rewrite import Rewriter

VIEWS = (
    aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.unflatten, aten.transpose, aten.permute, aten.t,
    aten.select, aten.slice, aten.squeeze, aten.unsqueeze, aten.expand, aten.contiguous, aten.clone, aten.alias,
)  # fmt: skip
PARTS = (aten.split, aten.split_with_sizes, aten.chunk, aten.unbind)
PRIMES = (13, 17, 19, 23, 29, 31)
FOLD_BYTES = 8 << 20  # a relative position bias of 1024 steps, and a slice of a projection's weight


def is_view(node: Any) -> bool:
    if isinstance(node, fx.Node) and node.target is operator.getitem:
        return is_op(node.args[0], *PARTS)
    return is_op(node, *VIEWS)


def scaled(node: Any) -> float | None:
    """The number that a tensor is multiplied with, or None."""
    if not is_op(node, aten.mul, aten.div) or len(node.args) != 2 or node.kwargs:
        return None
    tensor, number = node.args
    if not isinstance(tensor, fx.Node) or isinstance(number, bool) or not isinstance(number, (int, float)):
        return None
    if is_op(node, aten.mul):
        return float(number)
    return 1.0 / number if number else None


def leads(node: fx.Node) -> bool:
    """A view that leaves queries and keys as they are: heads split from users, or joined with them."""
    if not is_op(node, aten.view, aten.reshape, aten._unsafe_view, aten.unflatten, aten.flatten, aten.contiguous):
        return False
    a, b = shape(node), shape(node.args[0])  # type: ignore[arg-type]
    return len(a) > 2 and len(b) > 2 and all(same_size(x, y) for x, y in zip(a[-2:], b[-2:], strict=True))


def origin(node: fx.Node) -> tuple[fx.Node, float]:
    """The value that a chain of views begins at, and the product of the numbers it is multiplied with on the way."""
    scale = 1.0
    while True:
        factor = scaled(node)
        if factor is None and not is_view(node) and not is_op(node, *PARTS):
            return node, scale
        scale *= 1.0 if factor is None else factor
        node = node.args[0]  # type: ignore[assignment]


@dataclass
class Sizes:
    """A number for every size that varies."""

    symbols: dict[Any, int] = field(default_factory=dict)

    def of(self, size: Any) -> int:
        if isinstance(size, fx.Node):
            size = value(size)
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            self.symbols.setdefault(symbol, PRIMES[len(self.symbols) % len(PRIMES)])
        return int(expression.subs(self.symbols))

    def shape(self, node: fx.Node) -> list[int]:
        return [self.of(size) for size in value(node).shape]

    def count(self, node: fx.Node) -> Tensor:
        """0, 1, 2, ... in the shape of a value."""
        shape = self.shape(node)
        return torch.arange(torch.Size(shape).numel(), dtype=torch.int32).view(shape)

    def step(self, node: fx.Node, source: Any) -> Any:
        """One view, of numbers."""
        if scaled(node) is not None:
            return source
        if node.target is operator.getitem:
            return source[node.args[1]]

        def known(arg: Any) -> Any:
            return self.of(arg) if isinstance(arg, (torch.SymInt, fx.Node)) else arg

        args = fx.node.map_aggregate(tuple(node.args[1:]), known)
        kwargs = fx.node.map_aggregate(dict(node.kwargs), known)
        # A view fits the strides that its input had in the model; positions lie in an order of their own.
        target = aten.reshape.default if is_op(node, aten.view, aten._unsafe_view) else node.target
        return target(source, *args, **kwargs)  # type: ignore[operator, misc]

    def positions(self, node: fx.Node, start: fx.Node) -> Tensor:
        """Which element of `start` each element of `node` is, a view of it or a multiple of one."""
        chain: list[fx.Node] = []
        while node is not start:
            chain.append(node)
            node = node.args[0]  # type: ignore[assignment]
        positions: Any = self.count(start)
        for view in reversed(chain):
            positions = self.step(view, positions)
        return positions


@dataclass(frozen=True)
class Affine:
    """Element (i, j, ...) lies at offset + i * strides[0] + j * strides[1] + ... A size of 1 has stride None."""

    offset: int
    strides: tuple[int | None, ...]


def affine(positions: Tensor) -> Affine | None:
    """Offset and strides of positions, or None where they don't step evenly."""
    if positions.numel() == 0:
        return None
    first = positions[(0,) * positions.dim()]
    strides: list[int | None] = []
    expected = first.clone()
    for d, size in enumerate(positions.shape):
        line = positions[tuple(slice(None) if e == d else 0 for e in range(positions.dim()))]
        strides.append(int(line[1] - line[0]) if size > 1 else None)
        steps = torch.arange(size, dtype=torch.int32) * (strides[-1] or 0)
        expected = expected.unsqueeze(-1) + steps
    return Affine(int(first), tuple(strides)) if torch.equal(expected, positions) else None


def constant(module: fx.GraphModule, node: Any) -> Tensor | None:
    """The value of a node that depends on no input."""
    if not isinstance(node, fx.Node):
        return None
    found = attribute(module, node)
    if found is not None:
        return found.detach()
    target = node.target
    known = isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"
    if node.op != "call_function" or not (known or target is operator.getitem):
        return None
    if known and torch.Tag.nondeterministic_seeded in target.tags:  # type: ignore[union-attr]
        return None
    inputs = {n: constant(module, n) for n in node.all_input_nodes}
    if not inputs or any(tensor is None for tensor in inputs.values()):
        return None
    args, kwargs = fx.map_arg(node.args, lambda n: inputs[n]), fx.map_arg(node.kwargs, lambda n: inputs[n])
    with torch.no_grad():
        result = target(*args, **kwargs)  # type: ignore[operator]
    oversized = isinstance(result, Tensor) and result.numel() * result.itemsize > FOLD_BYTES
    return None if oversized else result


def folded(edit: Rewriter, node: fx.Node) -> fx.Node:
    """The node as a constant of the graph where it depends on no input."""
    if node.op == "get_attr":
        return node
    tensor = constant(edit.module, node)
    return node if tensor is None else edit.parameter(f"{origin(node)[0].name}_part", tensor.clone().contiguous())
