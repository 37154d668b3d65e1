"""Give linear layers to the packed GEMM, with what follows them as its epilogue: activation, product and residual."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import fx

from grc.graph.match import attribute, value
from grc.graph.rewrite import Rewriter, copy_graph, mapped
from grc.kernels import PACKED_LINEAR, PACKED_SCORE_TOPK, QUANTISED_LINEAR, SCORE_TOPK
from grc.kernels.packed_linear import pack
from grc.kernels.quantised_linear import quantise
from grc.lowering.epilogue import Linear, layer_of

DTYPES = {"int8": torch.int8, "bf16": torch.bfloat16}


def pack_linears(
    graph: fx.GraphModule, isa: str, formats: Mapping[str, str] = MappingProxyType({}), folder: Path | None = None
) -> fx.GraphModule:
    """A copy of the graph in which fp32 linear layers of constant weights, cross layers and item tables are packed.

    `formats` names the weights that go in fewer bits: "int8" or "bf16". With a folder, large ones are written into files
    there and mapped, so that packing takes no memory that can't be given back.
    """
    packed = copy_graph(graph)
    edit = Packer(packed, isa, formats, folder)
    for node in list(packed.graph.nodes):
        found = layer_of(node)
        if found is not None:
            pack_layer(edit, *found)
        elif node.target is SCORE_TOPK.overload:
            pack_score_topk(edit, node)
    edit.finish()
    return packed


class Packer(Rewriter):
    """A Rewriter that packs each weight once, however many layers share it."""

    def __init__(self, module: fx.GraphModule, isa: str, formats: Mapping[str, str], folder: Path | None):
        super().__init__(module)
        self.isa, self.formats = isa, formats
        self.empty = torch.empty if folder is None else partial(mapped, folder)
        self.packed: dict[str, tuple[fx.Node | None, ...]] = {}

    def operands(self, weight: fx.Node, tensor: torch.Tensor) -> tuple[fx.Node | None, ...]:
        """The packed weight; followed, where it is in fewer bits, by its scales or None."""
        path = str(weight.target)
        if path not in self.packed:
            dtype = DTYPES.get(self.formats.get(path, ""))
            if dtype is None:
                self.packed[path] = (self.parameter(f"{weight.name}_packed", pack(tensor, self.isa, self.empty)),)
            else:
                made = quantise(tensor, dtype, self.isa, self.empty)
                scale = None if made.scale is None else self.parameter(f"{weight.name}_scale", made.scale)
                self.packed[path] = (self.parameter(f"{weight.name}_packed", made.packed), scale)
        return self.packed[path]


def pack_layer(edit: Packer, layer: Linear, last: fx.Node) -> None:
    """Packs what computes in float32; the layer's other operands and its weight's kinds are any."""
    tensor = attribute(edit.module, layer.weight)
    if tensor is None or tensor.dim() != 2 or value(last).dtype is not torch.float32 or value(last).dim() < 2:
        return
    operands = edit.operands(layer.weight, tensor)
    op = PACKED_LINEAR if len(operands) == 1 else QUANTISED_LINEAR
    epilogue = (layer.bias, layer.mul, layer.add, int(tensor.shape[0]), layer.activation)
    with edit.at(last):
        new = edit.call(op.overload, layer.x, *operands, *epilogue)
    edit.replace(last, new)


def pack_score_topk(edit: Packer, node: fx.Node) -> None:
    """Where a look-up reads the table too, the panels are a second copy of it: their rows are not contiguous."""
    x, weight, bias, k = node.args
    tensor = attribute(edit.module, weight)
    if tensor is None or value(x).dtype is not torch.float32:
        return
    panels, *scale = edit.operands(weight, tensor)  # type: ignore[arg-type]
    with edit.at(node):
        new = edit.call(PACKED_SCORE_TOPK.overload, x, panels, *(scale or [None]), bias, int(tensor.shape[0]), k)
    edit.replace(node, new)
