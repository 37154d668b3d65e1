"""Give linear layers to the packed GEMM, with what follows them as its epilogue: activation, product and residual."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from grc.graph.match import argument, aten, attribute, is_op, only_user, same_shape, value
from grc.graph.rewrite import Rewriter, copy_graph
from grc.kernels import CROSS, PACKED_LINEAR, PACKED_SCORE_TOPK, QUANTISED_LINEAR, SCORE_TOPK
from grc.kernels.packed_linear import pack
from grc.kernels.quantised_linear import quantise

DTYPES = {"int8": torch.int8, "bf16": torch.bfloat16}
NONE, RELU, GELU, GELU_TANH, SILU, SIGMOID, TANH = range(7)
ACTIVATIONS = {aten.relu: RELU, aten.silu: SILU, aten.sigmoid: SIGMOID, aten.tanh: TANH}


def pack_linears(graph: fx.GraphModule, isa: str, formats: Mapping[str, str] = MappingProxyType({})) -> fx.GraphModule:
    """A copy of the graph in which fp32 linear layers of constant weights, cross layers and item tables are packed.

    `formats` names the weights that go in fewer bits: "int8" or "bf16".
    """
    packed = copy_graph(graph)
    edit = Packer(packed, isa, formats)
    for node in list(packed.graph.nodes):
        if is_op(node, aten.linear):
            pack_linear(edit, node)
        elif node.target is CROSS.overload:
            pack_cross(edit, node)
        elif node.target is SCORE_TOPK.overload:
            pack_score_topk(edit, node)
    edit.finish()
    return packed


class Packer(Rewriter):
    """A Rewriter that packs each weight once, however many layers share it."""

    def __init__(self, module: fx.GraphModule, isa: str, formats: Mapping[str, str]):
        super().__init__(module)
        self.isa, self.formats = isa, formats
        self.packed: dict[str, tuple[fx.Node | None, ...]] = {}

    def operands(self, weight: fx.Node, tensor: torch.Tensor) -> tuple[fx.Node | None, ...]:
        """The packed weight; followed, where it is in fewer bits, by its scales or None."""
        path = str(weight.target)
        if path not in self.packed:
            dtype = DTYPES.get(self.formats.get(path, ""))
            if dtype is None:
                self.packed[path] = (self.parameter(f"{weight.name}_packed", pack(tensor.detach(), self.isa)),)
            else:
                made = quantise(tensor.detach(), dtype, self.isa)
                scale = None if made.scale is None else self.parameter(f"{weight.name}_scale", made.scale)
                self.packed[path] = (self.parameter(f"{weight.name}_packed", made.packed), scale)
        return self.packed[path]


def pack_linear(edit: Packer, node: fx.Node) -> None:
    x, weight = node.args[:2]
    tensor = attribute(edit.module, weight)
    if tensor is None or tensor.dim() != 2 or value(node).dtype is not torch.float32 or value(node).dim() < 2:
        return
    activation, last = activation_of(node)
    last, residual = residual_of(last) if activation == NONE else (last, None)
    replace(edit, last, x, weight, argument(node, "bias"), None, residual, activation)


def pack_cross(edit: Packer, node: fx.Node) -> None:
    x0, y, weight, bias, x = node.args
    if value(node).dtype is torch.float32:
        replace(edit, node, y, weight, bias, x0, x, NONE)


def pack_score_topk(edit: Packer, node: fx.Node) -> None:
    """Where a look-up reads the table too, the panels are a second copy of it: their rows are not contiguous."""
    x, weight, bias, k = node.args
    tensor = attribute(edit.module, weight)
    if tensor is None or value(x).dtype is not torch.float32:
        return
    panels = edit.parameter(f"{weight.name}_packed", pack(tensor.detach(), edit.isa))  # type: ignore[union-attr]
    with edit.at(node):
        new = edit.call(PACKED_SCORE_TOPK.overload, x, panels, bias, int(tensor.shape[0]), k)
    edit.replace(node, new)


def replace(edit: Packer, old: fx.Node, x: Any, weight: Any, bias: Any, mul: Any, add: Any, activation: int) -> None:
    tensor = attribute(edit.module, weight)
    assert tensor is not None
    operands = edit.operands(weight, tensor)
    op = PACKED_LINEAR if len(operands) == 1 else QUANTISED_LINEAR
    with edit.at(old):
        new = edit.call(op.overload, x, *operands, bias, mul, add, int(tensor.shape[0]), activation)
    edit.replace(old, new)


def activation_of(node: fx.Node) -> tuple[int, fx.Node]:
    """The activation that alone reads a linear layer, and the node that ends the pair."""
    user = only_user(node)
    if user is not None and is_op(user, *ACTIVATIONS):
        return next(code for op, code in ACTIVATIONS.items() if is_op(user, op)), user
    if user is not None and is_op(user, aten.gelu):
        return (GELU if argument(user, "approximate") == "none" else GELU_TANH), user
    return NONE, node


def residual_of(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """`linear + x` with x of the same shape: the sum, and x."""
    user = only_user(node)
    if user is None or not is_op(user, aten.add) or len(user.args) != 2 or argument(user, "alpha") != 1:
        return node, None
    other = user.args[1] if user.args[0] is node else user.args[0]
    fits = isinstance(other, fx.Node) and other is not node and other.op != "get_attr"
    if (
        fits
        and isinstance(value(other), torch.Tensor)
        and same_shape(other, node)
        and value(other).dtype is torch.float32
    ):  # type: ignore[arg-type]
        return user, other  # type: ignore[return-value]
    return node, None
