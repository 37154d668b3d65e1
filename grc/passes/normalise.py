"""Bring the many ways of writing the same mathematics to one form, so that few patterns match many models."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from grc.graph.match import argument, aten, attribute, constant_list, is_op, same_shape, same_size, shape, static, value
from grc.graph.rewrite import Rewriter
from grc.passes.manager import Change, Pass

FOLD_BYTES = 1 << 20  # constants up to this size are folded; weights stay as they are
END = 2**63 - 1
Rule = Callable[[Rewriter, fx.Node], fx.Node | None]


@dataclass(frozen=True)
class Normalise(Pass):
    """Aliases, shapes, products, look-ups and constants in one form each; dead values dropped."""

    name = "normalise"

    def run(self, graph: fx.GraphModule) -> list[Change]:
        edit = Rewriter(graph)
        before = len(graph.graph.nodes)
        counts: dict[str, int] = {}
        for _ in range(4):  # a rule may open the way for another; four rounds reach the fixed point of every zoo model
            changed = 0
            for node in list(graph.graph.nodes):
                if node.op == "call_function":
                    changed += self.apply(edit, node, counts)
            edit.finish()
            if not changed:
                break
        after = len(graph.graph.nodes)
        made = [Change(f"{name} {count}") for name, count in counts.items()]
        if after < before:
            made.append(Change(f"dead {before - after}"))
        return made

    def apply(self, edit: Rewriter, node: fx.Node, counts: dict[str, int]) -> int:
        for rule in RULES:
            with edit.at(node):
                new = rule(edit, node)
            if new is not None and new is not node:
                edit.replace(node, new)
                counts[rule.__name__.replace("_", "-")] = counts.get(rule.__name__.replace("_", "-"), 0) + 1
                return 1
        return 0


def drop_alias(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """Operators that give their argument back."""
    if is_op(node, aten._assert_tensor_metadata) and not node.users:
        edit.graph.erase_node(node)
        return None
    if is_op(node, aten.alias, aten.detach, aten.lift_fresh_copy, aten.contiguous, aten.clone):
        return node.args[0]  # type: ignore[return-value]
    if is_op(node, aten.dropout, aten.native_dropout, aten.feature_dropout) and argument(node, "train") is False:
        return node.args[0]  # type: ignore[return-value]
    if is_op(node, aten.slice):
        whole = argument(node, "start") in (None, 0) and argument(node, "step") == 1
        if whole and (argument(node, "end") in (None, END) or same_shape(node, node.args[0])):  # type: ignore[arg-type]
            return node.args[0]  # type: ignore[return-value]
    same_kind = is_op(node, aten.to, aten._to_copy, aten.expand, aten.type_as)
    if (
        same_kind
        and value(node).dtype == value(node.args[0]).dtype
        and value(node).device == value(node.args[0]).device
    ):
        if same_shape(node, node.args[0]):  # type: ignore[arg-type]
            return node.args[0]  # type: ignore[return-value]
    return None


def fold_constant(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """Compute what depends on no input."""
    if not isinstance(node.target, torch._ops.OpOverload) and node.target is not operator.getitem:
        return None
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target.namespace != "aten" or torch.Tag.nondeterministic_seeded in node.target.tags:
            return None
    inputs = node.all_input_nodes
    result = value(node)
    if not isinstance(result, torch.Tensor) or not all(static(s) for s in result.shape):
        return None
    if result.numel() * result.itemsize > FOLD_BYTES:
        return None
    source = node
    if node.target is operator.getitem:
        source = node.args[0]  # type: ignore[assignment]
        inputs = source.all_input_nodes
        if not isinstance(source.target, torch._ops.OpOverload) or source.target.namespace != "aten":
            return None
    tensors = [attribute(edit.module, n) for n in inputs]
    if any(t is None or t.numel() * t.itemsize > FOLD_BYTES or isinstance(t, torch.nn.Parameter) for t in tensors):
        return None
    known = dict(zip(inputs, tensors, strict=True))
    args = fx.map_arg(source.args, lambda n: known[n])
    kwargs = fx.map_arg(source.kwargs, lambda n: known[n])
    with torch.no_grad():
        folded = source.target(*args, **kwargs)  # type: ignore[operator]
        folded = folded[node.args[1]] if source is not node else folded
    return edit.parameter("constant", folded.detach().clone().contiguous())


def canonical_reshape(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """view, flatten, squeeze, unsqueeze and chains of them: one reshape, with -1 for the only symbolic size."""
    if not is_op(
        node, aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.squeeze, aten.unsqueeze, aten.unflatten
    ):
        return None
    source: Any = node.args[0]
    if is_op(source, aten.reshape):
        source = source.args[0]
    if same_shape(node, source):
        return source
    sizes = inferred_sizes(shape(node))
    if sizes is None or (is_op(node, aten.reshape) and list(node.args[1]) == sizes and source is node.args[0]):  # type: ignore[arg-type]
        return None
    if is_op(node, aten.unsqueeze, aten.squeeze) and len(shape(node)) == 0:
        return None
    return edit.call(aten.reshape.default, source, sizes)


def inferred_sizes(sizes: tuple[Any, ...]) -> list[int] | None:
    """Sizes with -1 for the one that is symbolic; None where two are, or where a zero leaves -1 undefined."""
    symbolic = [i for i, s in enumerate(sizes) if not static(s)]
    if len(symbolic) > 1 or (symbolic and any(s == 0 for s in sizes if static(s))):
        return None
    return [-1 if i in symbolic else int(s) for i, s in enumerate(sizes)]


def stack_to_cat(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """stack of `[B, D]` along 1, and cat of `[B, k, D]` along 1: a reshape of one cat of `[B, k*D]`."""
    if is_op(node, aten.stack):
        parts = list(node.args[0])  # type: ignore[arg-type]
        dim = argument(node, "dim") % (value(parts[0]).dim() + 1)
        if dim != 1 or any(value(p).dim() != 2 for p in parts):
            return None
    elif is_op(node, aten.cat):
        parts = list(node.args[0])  # type: ignore[arg-type]
        if value(node).dim() != 3 or any(value(p).dim() != 3 for p in parts) or argument(node, "dim") % 3 != 1:
            return None
    else:
        return None
    sizes = inferred_sizes(shape(node))
    if sizes is None or sizes[1] == -1 or sizes[2] == -1:
        return None
    if not all(static(s) for p in parts for s in shape(p)[1:]):
        return None
    flat = [p if value(p).dim() == 2 else flat_rows(edit, p) for p in parts]
    joined = flat[0] if len(flat) == 1 else edit.call(aten.cat.default, flat, 1)
    return edit.call(aten.reshape.default, joined, sizes)


def flat_rows(edit: Rewriter, node: fx.Node) -> fx.Node:
    """`[B, k, D]` as `[B, k*D]`, looking through a reshape that came from there."""
    width = int(shape(node)[1]) * int(shape(node)[2])
    if is_op(node, aten.reshape):
        inner = node.args[0]
        if value(inner).dim() == 2 and same_size(shape(inner)[1], width) and same_size(shape(inner)[0], shape(node)[0]):  # type: ignore[arg-type]
            return inner  # type: ignore[return-value]
    return edit.reshape(node, -1, width)


def flatten_cat(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """A cat of cats along the same dimension is one cat; a cat of one value is that value."""
    if not is_op(node, aten.cat):
        return None
    dim = argument(node, "dim") % value(node).dim()
    parts = list(node.args[0])  # type: ignore[arg-type]
    if len(parts) == 1:
        return parts[0]
    if not any(is_op(p, aten.cat) and argument(p, "dim") % value(p).dim() == dim for p in parts):
        return None
    flat: list[fx.Node] = []
    for part in parts:
        inner = is_op(part, aten.cat) and argument(part, "dim") % value(part).dim() == dim
        flat += list(part.args[0]) if inner else [part]
    return edit.call(aten.cat.default, flat, dim)


def one_product(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """einsum, matmul, mm and addmm: bmm for batches, linear where one side is a weight."""
    if is_op(node, aten.einsum):
        equation = str(node.args[0]).replace(" ", "")
        operands = list(node.args[1])  # type: ignore[arg-type]
        return einsum_product(edit, equation, operands)
    if is_op(node, aten.matmul):
        a, b = node.args[:2]
        dims = value(a).dim(), value(b).dim()
        if dims == (3, 3) and same_size(shape(a)[0], shape(b)[0]):  # type: ignore[arg-type]
            return edit.call(aten.bmm.default, a, b)
        if dims[1] == 2 and dims[0] >= 2:
            return linear_of(edit, a, b, None)
    if is_op(node, aten.mm):
        return linear_of(edit, node.args[0], node.args[1], None)
    if is_op(node, aten.addmm) and argument(node, "beta") == 1 and argument(node, "alpha") == 1:
        bias, a, b = node.args[:3]
        if value(bias).dim() == 1:
            return linear_of(edit, a, b, bias)
    return None


def linear_of(edit: Rewriter, x: Any, weight: Any, bias: Any) -> fx.Node | None:
    """x @ W as a linear layer where W is a constant: an nn.Linear holds W transposed."""
    if is_op(weight, aten.t, aten.transpose, aten.permute) and value(weight).dim() == 2:
        inner = weight.args[0]
        if attribute(edit.module, inner) is not None:
            return edit.call(aten.linear.default, x, inner, bias)
    tensor = attribute(edit.module, weight)
    if tensor is None or tensor.dim() != 2:
        return None
    transposed = edit.parameter(f"{weight.name}_t", tensor.detach().t().contiguous())
    return edit.call(aten.linear.default, x, transposed, bias)


def einsum_product(edit: Rewriter, equation: str, operands: list[fx.Node]) -> fx.Node | None:
    """Two-operand einsums over one batch letter: `bnd,bmd->bnm` and its transposes become bmm."""
    if len(operands) != 2 or "->" not in equation or "." in equation:
        return None
    left, right = equation.partition("->")[0].split(",")
    out = equation.partition("->")[2]
    if not (len(left) == len(right) == len(out) == 3) or len(set(left)) != 3 or len(set(right)) != 3:
        return None
    batch = [c for c in left if c in right and c in out]
    summed = [c for c in left if c in right and c not in out]
    if len(batch) != 1 or len(summed) != 1 or {out[0]} != set(batch):
        return None
    b, k = batch[0], summed[0]
    n, m = (next(c for c in side if c not in (b, k)) for side in (left, right))
    first = permuted(edit, operands[0], left, b + n + k)
    second = permuted(edit, operands[1], right, b + k + m)
    product = edit.call(aten.bmm.default, first, second)
    return permuted(edit, product, b + n + m, out)


def permuted(edit: Rewriter, node: fx.Node, have: str, want: str) -> fx.Node:
    if have == want:
        return node
    order = [have.index(c) for c in want]
    if order == [0, 2, 1]:
        return edit.call(aten.transpose.int, node, 1, 2)
    return edit.call(aten.permute.default, node, order)


def one_transpose(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """Every swap of the last two of three dimensions is transpose(x, 1, 2)."""
    if is_op(node, aten.permute) and value(node).dim() == 3 and [d % 3 for d in node.args[1]] == [0, 2, 1]:  # type: ignore[union-attr]
        return edit.call(aten.transpose.int, node.args[0], 1, 2)
    if is_op(node, aten.transpose) and value(node).dim() == 3:
        dims = [argument(node, "dim0") % 3, argument(node, "dim1") % 3]
        if sorted(dims) == [1, 2] and list(node.args[1:]) != [1, 2]:
            return edit.call(aten.transpose.int, node.args[0], 1, 2)
    return None


def square(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """pow(x, 2) and square(x) are x * x; x / c is x * (1 / c) for a power of two, which is exact."""
    if is_op(node, aten.square) or (is_op(node, aten.pow) and len(node.args) > 1 and node.args[1] in (2, 2.0)):
        base = node.args[0]
        return (
            edit.call(aten.mul.Tensor, base, base)
            if isinstance(base, fx.Node) and value(base).is_floating_point()
            else None
        )
    if (
        is_op(node, aten.div)
        and isinstance(node.args[1], (int, float))
        and argument_or_none(node, "rounding_mode") is None
    ):
        divisor = float(node.args[1])
        if divisor in (2.0, 4.0, 0.5) and value(node).dtype == value(node.args[0]).dtype:
            return edit.call(aten.mul.Tensor, node.args[0], 1.0 / divisor)
    return None


def argument_or_none(node: fx.Node, name: str) -> Any:
    try:
        return argument(node, name)
    except KeyError:
        return None


def one_hot_product(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """one_hot(ids) @ W reads rows of W: an embedding."""
    if not is_op(node, aten.linear) or node.args[0] is None or argument(node, "bias") is not None:
        return None
    hot: Any = node.args[0]
    while is_op(hot, aten.to, aten._to_copy):
        hot = hot.args[0]
    tensor = attribute(edit.module, node.args[1])
    if not is_op(hot, aten.one_hot) or tensor is None or not same_size(shape(hot)[-1], tensor.shape[1]):
        return None
    table = edit.parameter("one_hot_table", tensor.detach().t().contiguous())
    return edit.call(aten.embedding.default, table, hot.args[0])


def gather_to_embedding(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """index_select(W, 0, ids) and W[ids] of a two-dimensional constant: an embedding."""
    if is_op(node, aten.index_select) and argument(node, "dim") == 0:
        table, ids = node.args[0], node.args[2]
    elif is_op(node, aten.index) and len(node.args[1]) == 1:  # type: ignore[arg-type]
        table, ids = node.args[0], node.args[1][0]  # type: ignore[index]
    else:
        return None
    tensor = attribute(edit.module, table)
    if (
        tensor is None
        or tensor.dim() != 2
        or not tensor.is_floating_point()
        or value(ids).dtype not in (torch.int32, torch.int64)
    ):
        return None
    if constant_list(edit.module, ids) is not None or (is_op(node, aten.index) and negative_possible(ids)):
        return None
    return edit.call(aten.embedding.default, table, ids)


def negative_possible(ids: fx.Node) -> bool:
    """Indexing wraps negative ids where an embedding refuses them; only plain inputs are taken to be ids."""
    while is_op(ids, aten.reshape, aten.slice, aten.select, aten.to, aten._to_copy, aten.cat):
        ids = ids.args[0] if not isinstance(ids.args[0], (list, tuple)) else ids.args[0][0]  # type: ignore[assignment]
    return ids.op != "placeholder"


RULES: tuple[Rule, ...] = (
    drop_alias,
    fold_constant,
    canonical_reshape,
    stack_to_cat,
    flatten_cat,
    one_product,
    one_transpose,
    square,
    one_hot_product,
    gather_to_embedding,
)
