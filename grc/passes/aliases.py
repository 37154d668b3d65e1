"""Other names of operators: NumPy's, torch.special's and the long ones, which export keeps as they were written."""

from __future__ import annotations

from torch import fx

from grc.graph.match import aten, is_op, value
from grc.graph.rewrite import Rewriter

# Each takes the arguments of the other, in every overload that both have.
ALIASES = {
    aten.concat: aten.cat, aten.concatenate: aten.cat, aten.row_stack: aten.vstack, aten.moveaxis: aten.movedim,
    aten.subtract: aten.sub, aten.multiply: aten.mul, aten.divide: aten.div, aten.true_divide: aten.div,
    aten.absolute: aten.abs, aten.negative: aten.neg, aten.clip: aten.clamp, aten.linalg_matmul: aten.matmul,
    aten.special_expit: aten.sigmoid, aten.special_erf: aten.erf, aten.special_logsumexp: aten.logsumexp,
    aten.not_equal: aten.ne, aten.greater: aten.gt, aten.greater_equal: aten.ge, aten.less: aten.lt,
    aten.less_equal: aten.le,
}  # fmt: skip
# What torch itself makes of other operators, in few of them.
COMPOSITE = (
    aten.hstack, aten.vstack, aten.column_stack, aten.dstack, aten.tile, aten.inner, aten.tensordot, aten.linalg_vecdot,
    aten.swapaxes, aten.swapdims, aten.movedim,
)  # fmt: skip


def one_name(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """concat is cat, subtract is sub, ..."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in ALIASES:
        return None
    overload = getattr(ALIASES[packet], node.target._overloadname, None)  # type: ignore[union-attr]
    return None if overload is None else edit.call(overload, *node.args, **node.kwargs)


def composite(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """hstack is a cat, inner and tensordot are products, ..."""
    if not is_op(node, *COMPOSITE):
        return None
    if is_op(node, aten.inner, aten.tensordot) and (side := summed_of_matrix(node)) is not None:
        x, weight = node.args[:2]
        return edit.call(aten.matmul.default, x, weight if side == 0 else edit.call(aten.t.default, weight))
    target, kwargs = node.target, node.kwargs
    found = edit.inline(lambda *args: target(*args, **kwargs), *node.args)  # type: ignore[operator]
    return found if isinstance(found, fx.Node) else None


def summed_of_matrix(node: fx.Node) -> int | None:
    """Which dimension of a matrix is summed with the last one of the tensor before it, or None where it is another sum."""
    tensor, matrix = (value(arg) for arg in node.args[:2])
    if matrix.dim() != 2 or tensor.dim() < 2:
        return None
    if is_op(node, aten.inner):
        return 1
    (first, second), last = node.args[2:4], tensor.dim() - 1  # type: ignore[misc]
    return second[0] % 2 if len(first) == 1 and first[0] % tensor.dim() == last else None
