"""Rules for products: einsum, matmul, mm and addmm as bmm or linear, with the bias that follows them."""

from __future__ import annotations

from itertools import permutations
from typing import Any

from torch import Tensor, fx
from torch.nn import Parameter

from grc.graph.match import (
    argument,
    aten,
    attribute,
    is_op,
    only_user,
    same_shape,
    same_size,
    shape,
    value,
)
from grc.graph.rewrite import Rewriter
from grc.passes.pieces import inferred_sizes

ARITHMETIC = (aten.add, aten.sub, aten.mul)
ACTIVATIONS = (aten.relu, aten.gelu, aten.silu, aten.sigmoid, aten.tanh)
FEW = 1 << 12  # numbers of a constant that is looked through for zeros


def one_product(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """einsum, matmul, mm and addmm: bmm for batches, linear where one side is a weight."""
    if is_op(node, aten.einsum):
        equation = str(node.args[0]).replace(" ", "")
        operands = list(node.args[1])  # type: ignore[arg-type]
        return (
            einsum_product(edit, equation, operands)
            or einsum_layer(edit, equation, operands)
            or einsum_layers(edit, node, equation, operands)
        )
    if is_op(node, aten.matmul):
        a, b = node.args[:2]
        dims = value(a).dim(), value(b).dim()
        if dims == (3, 3) and same_size(shape(a)[0], shape(b)[0]):  # type: ignore[arg-type]
            return edit.call(aten.bmm.default, a, b)
        if dims == (2, 3) and same_size(shape(b)[2], 1):  # type: ignore[arg-type]
            return column_product(edit, a, b)
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
    if swaps(weight) and attribute(edit.module, weight.args[0]) is not None:
        return edit.call(aten.linear.default, x, weight.args[0], bias)
    tensor = attribute(edit.module, weight)
    if tensor is None or tensor.dim() != 2:
        return None
    transposed = edit.parameter(f"{weight.name}_t", tensor.detach().t().contiguous())
    return edit.call(aten.linear.default, x, transposed, bias)


def swaps(node: Any) -> bool:
    """Whether a matrix is another one with rows and columns swapped."""
    if not is_op(node, aten.t, aten.transpose, aten.permute) or value(node).dim() != 2:
        return False
    if is_op(node, aten.permute):
        return [d % 2 for d in node.args[1]] == [1, 0]
    return is_op(node, aten.t) or (argument(node, "dim0") - argument(node, "dim1")) % 2 == 1


def column_product(edit: Rewriter, weight: Any, x: Any) -> fx.Node | None:
    """W @ x with x of `[B, D, 1]`: a linear layer over `[B, D]`, as a column again."""
    tensor = attribute(edit.module, weight)
    if tensor is None or not isinstance(shape(x)[1], int):
        return None
    product = edit.call(aten.linear.default, edit.reshape(x, -1, shape(x)[1]), weight)
    return edit.reshape(product, -1, int(tensor.shape[0]), 1)


def column_arithmetic(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """Sums and products of columns `[B, D, 1]` are those of the rows `[B, D]` that they were made from."""
    if not is_op(node, *ARITHMETIC) or len(node.args) < 2 or value(node).dim() != 3:
        return None
    width = shape(node)[1]
    if not same_size(shape(node)[2], 1) or not isinstance(width, int):
        return None
    if not any(is_column(a) for a in node.args[:2]):
        return None
    flat: list[Any] = []
    for operand in node.args[:2]:
        tensor = attribute(edit.module, operand)
        if is_column(operand):
            flat.append(operand.args[0])  # type: ignore[union-attr]
        elif not isinstance(operand, fx.Node):
            flat.append(operand)
        elif tensor is not None and tensor.numel() == width and tensor.shape[-2:] == (width, 1):
            flat.append(edit.parameter(operand.name, tensor.detach().reshape(width)))
        elif value(operand).dim() == 3 and same_shape(operand, node):
            flat.append(edit.reshape(operand, -1, width))
        else:
            return None
    return edit.reshape(edit.call(node.target, *flat, *node.args[2:], **node.kwargs), -1, width, 1)


def is_column(node: Any) -> bool:
    """True for `[B, D]` as `[B, D, 1]`."""
    if not is_op(node, aten.reshape) or value(node).dim() != 3 or value(node.args[0]).dim() != 2:
        return False
    return same_size(shape(node)[2], 1) and same_size(shape(node)[1], shape(node.args[0])[1])


def bias_of_linear(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """linear(x, W) + b with a constant b: a linear layer with a bias."""
    if not is_op(node, aten.add) or len(node.args) != 2 or argument(node, "alpha") != 1:
        return None
    for product, other in (node.args, node.args[::-1]):
        if (layers := bias_of_layers(edit, product, other)) is not None:
            return layers
        if not is_op(product, aten.linear) or argument(product, "bias") is not None or only_user(product) is None:  # type: ignore[arg-type]
            continue
        bias = attribute(edit.module, other)
        if bias is None or bias.shape != value(product).shape[-1:] or bias.dtype != value(product).dtype:
            continue
        return edit.call(aten.linear.default, *product.args[:2], other)  # type: ignore[union-attr]
    return None


def bias_of_layers(edit: Rewriter, layers: Any, other: Any) -> fx.Node | None:
    """`[B, E, O]` that one linear layer gives, plus a constant `[E, O]`: its bias."""
    if not is_op(layers, aten.reshape) or not is_op(layers.args[0], aten.linear) or len(shape(layers)) < 3:
        return None
    layer, bias = layers.args[0], attribute(edit.module, other)
    alone = only_user(layer) is layers and only_user(layers) is not None and argument(layer, "bias") is None
    if not alone or value(layer).dim() != 2 or bias is None or bias.dtype != value(layer).dtype:
        return None
    if bias.shape != shape(layers)[1:]:
        return None
    flat = edit.parameter(f"{other.name}_flat", bias.detach().reshape(-1))
    return edit.call(aten.reshape.default, edit.call(aten.linear.default, *layer.args[:2], flat), layers.args[1])


def activated_layers(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """An activation of `[B, E, O]` that one linear layer gives is that layer's, which computes it as it stores its rows."""
    layers: Any = node.args[0] if is_op(node, *ACTIVATIONS) else None
    if not is_op(layers, aten.reshape) or only_user(layers) is None or not is_op(layers.args[0], aten.linear):
        return None
    layer: Any = layers.args[0]
    if only_user(layer) is not layers or value(layer).dim() != 2 or value(layers).dim() != 3:
        return None
    active = edit.call(node.target, layer, *node.args[1:], **node.kwargs)  # type: ignore[arg-type]
    return edit.call(aten.reshape.default, active, layers.args[1])  # type: ignore[union-attr]


def one_column(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """A linear layer of a single number, as numeric features get their vectors: that number times a row of weights."""
    weight = attribute(edit.module, node.args[1]) if is_op(node, aten.linear) else None
    if weight is None or weight.dim() != 2 or weight.shape[1] != 1:
        return None
    row = edit.parameter(f"{node.args[1].name}_row", weight.detach()[:, 0].contiguous())  # type: ignore[union-attr]
    product = edit.call(aten.mul.Tensor, node.args[0], row)
    bias = argument(node, "bias")
    return product if bias is None else edit.call(aten.add.Tensor, product, bias)


def multiply_add(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """addcmul(x, a, b) is x + a * b."""
    if not is_op(node, aten.addcmul) or argument(node, "value") != 1:
        return None
    x, a, b = node.args[:3]
    return edit.call(aten.add.Tensor, x, edit.call(aten.mul.Tensor, a, b))


def einsum_product(edit: Rewriter, equation: str, operands: list[fx.Node]) -> fx.Node | None:
    """Two-operand einsums over one batch letter: `bnd,bmd->bnm` and its transposes become bmm."""
    if len(operands) != 2 or "->" not in equation or "." in equation:
        return None
    left, right = equation.partition("->")[0].split(",")
    out = equation.partition("->")[2]
    if {len(left), len(right)} == {2, 3}:
        return einsum_rows(edit, *((operands, left, right) if len(left) == 2 else (operands[::-1], right, left)), out)
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


def einsum_rows(edit: Rewriter, operands: list[fx.Node], weights: str, rows: str, out: str) -> fx.Node | None:
    """`bs,bsd->bd`, a weighted sum of rows."""
    if len(set(rows)) != 3 or weights != rows[:2] or out != rows[0] + rows[2]:
        return None
    steps, width = shape(operands[1])[1:]
    broadcast = not all(same_size(a, b) for a, b in zip(shape(operands[0]), shape(operands[1])[:2], strict=True))
    if broadcast or not isinstance(steps, int) or not isinstance(width, int):
        return None
    return edit.reshape(weighted_rows(edit, *operands), -1, width)


def weighted_rows(edit: Rewriter, weights: fx.Node, rows: fx.Node) -> fx.Node:
    """`[B, 1, S] @ [B, S, D]`, of weights `[B, S]` or, where their number varies, `[B, S, 1]`."""
    steps = shape(rows)[1]
    fixed = isinstance(steps, int)
    turned = edit.reshape(weights, -1, 1, steps) if fixed else edit.call(aten.transpose.int, weights, 1, 2)
    return edit.call(aten.bmm.default, turned, rows)


def einsum_layer(edit: Rewriter, equation: str, operands: list[fx.Node]) -> fx.Node | None:
    """`bsk,kn->bsn` and `bsk,nk->bsn` with a constant second operand: a linear layer."""
    if len(operands) != 2 or "->" not in equation:
        return None
    sides, out = equation.split("->")
    left, right = sides.split(",")
    first, second = operands
    for x, mine, weight, its in ((first, left, second, right), (second, right, first, left)):
        rows, k = mine[:-1], mine[-1:]
        n = its.replace(k, "", 1)
        whole = len(set(mine)) == len(mine) >= 2 and len(its) == 2 and len(n) == 1 and n not in mine and out == rows + n
        if whole and its[0] == k and (layer := linear_of(edit, x, weight, None)) is not None:
            return layer
        if whole and its[1] == k and attribute(edit.module, weight) is not None:
            return edit.call(aten.linear.default, x, weight, None)
    return None


def einsum_layers(edit: Rewriter, node: fx.Node, equation: str, operands: list[fx.Node]) -> fx.Node | None:
    """`bi,eio->beo` with a constant second operand, and `bei,eio->beo` of one row for all e: a linear layer for all e.

    Experts and heads are written so (MMoE, Ma et al. 2018; the experts of DCNv2, Wang et al. 2021). Torch would multiply
    e times, after it has turned the weight or stored a row for each e.
    """
    if len(operands) != 2 or "->" not in equation or "." in equation:
        return None
    sides, out = equation.split("->")
    for (x, mine), (weight, its) in permutations(zip(operands, sides.split(","), strict=True)):
        tensor, one = attribute(edit.module, weight), repeated_row(x)
        if one is not None and mine[1:2] in its and mine[1:2] in out:
            x, mine = one, mine[0] + mine[2:]
        rows, k = mine[:-1], mine[-1:]
        made = out[len(rows) :]
        distinct = len(set(mine)) == len(mine) and not set(rows) & set(its)
        if tensor is None or len(made) < 2 or not distinct or out != rows + made or sorted(its) != sorted(made + k):
            continue
        sizes = inferred_sizes(shape(node))
        if sizes is None or len(set(its)) != len(its):
            continue
        turned = tensor.detach().permute([its.index(letter) for letter in made + k]).flatten(0, -2).contiguous()
        layer = edit.call(aten.linear.default, x, edit.parameter(f"{weight.name}_layers", turned))
        return edit.call(aten.reshape.default, layer, sizes)
    return None


def repeated_row(node: fx.Node) -> fx.Node | None:
    """`[B, K]` of `[B, E, K]` that holds it E times."""
    source: Any = node.args[0] if is_op(node, aten.reshape, aten.expand, aten.repeat) else None
    row: Any = None
    if is_op(node, aten.reshape) and is_op(source, aten.cat) and len(set(source.args[0])) == 1:
        row = source.args[0][0] if argument(source, "dim") in (1, -1) else None
    elif is_op(node, aten.expand, aten.repeat) and is_op(source, aten.reshape) and value(source).dim() == 3:
        row = source.args[0] if same_size(shape(source)[1], 1) else None
    if row is None or value(node).dim() != 3 or value(row).dim() != 2:
        return None
    batch, _, width = shape(node)
    return row if same_size(shape(row)[0], batch) and same_size(shape(row)[1], width) else None


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
        if isinstance(base, fx.Node) and value(base).is_floating_point():
            return edit.call(aten.mul.Tensor, base, base)
        return None
    if not is_op(node, aten.div) or not isinstance(node.args[1], (int, float)) or node.kwargs.get("rounding_mode"):
        return None
    divisor = float(node.args[1])
    if divisor in (2.0, 4.0, 0.5) and value(node).dtype == value(node.args[0]).dtype:
        return edit.call(aten.mul.Tensor, node.args[0], 1.0 / divisor)
    return None


def drop_zero(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """x + 0 of x's dtype is x, in the shape of the sum: sums that begin with an accumulator of zeros."""
    if not is_op(node, aten.add) or len(node.args) != 2 or argument(node, "alpha") != 1:
        return None
    for zero, other in (node.args, node.args[::-1]):
        tensors = isinstance(other, fx.Node) and isinstance(value(other), Tensor)
        if not tensors or value(other).dtype is not value(node).dtype or not is_zero(edit, zero):
            continue
        if same_shape(other, node):
            return other
        if is_op(zero, aten.zeros, aten.full) and same_shape(zero, node):
            return edit.call(aten.expand.default, other, argument(zero, "size"))
    return None


def is_zero(edit: Rewriter, node: Any) -> bool:
    """A number, zeros that a call makes, or that are a small constant; parameters may only happen to be zeros."""
    if not isinstance(node, fx.Node):
        return node == 0
    if is_op(node, aten.new_zeros, aten.zeros, aten.zeros_like):
        return True
    tensor = attribute(edit.module, node)
    if tensor is not None:
        return not isinstance(tensor, Parameter) and tensor.numel() <= FEW and not tensor.any()
    if is_op(node, aten.scalar_tensor):
        return argument(node, "s") == 0
    return is_op(node, aten.full, aten.full_like, aten.new_full) and argument(node, "fill_value") == 0
