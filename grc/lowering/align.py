"""Align linear layers for the GPU: rows that begin on 16 bytes are read in whole vectors, and tensor cores take no others."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn import functional

from grc.graph.match import aten, attribute, is_op, value
from grc.graph.rewrite import copy_graph

VECTOR = 16  # bytes
WIDE = 64  # columns: a narrower layer costs less than the kernel that would pad its input


def aligned(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph with Triton twins in which linear layers of constant weights have inputs of whole vectors.

    Weights get columns of zeros. An input that our own kernel writes is written that wide; others are padded, in half
    precision only: cuBLAS has no tensor core kernel for an odd width, and in float32 it needs none.
    """
    copy = copy_graph(graph)
    for node in list(copy.graph.nodes):
        weight = attribute(copy, node.args[1]) if is_op(node, aten.linear) else None
        if weight is None or weight.dim() != 2:
            continue
        x, width = node.args[0], int(weight.shape[1])
        extra = -width % (VECTOR // weight.itemsize)
        if not extra:
            continue
        if from_own_kernel(x):
            x.args = (*x.args, width + extra)
        elif weight.itemsize == 2 and width >= WIDE and value(x).dim() == 2:
            with copy.graph.inserting_before(node):
                narrow, x = x, copy.graph.call_function(aten.constant_pad_nd.default, (x, [0, extra]))
            x.meta = {**narrow.meta, "val": functional.pad(value(narrow), (0, extra))}
        else:
            continue
        name = f"{node.name}_aligned"
        wide = functional.pad(weight.detach(), (0, extra))
        copy.register_parameter(name, torch.nn.Parameter(wide, requires_grad=False))
        with copy.graph.inserting_before(next(iter(copy.graph.nodes))):
            padded = copy.graph.get_attr(name)
        node.args = (x, padded, *node.args[2:])
    copy.graph.eliminate_dead_code()
    copy.recompile()
    return copy


def from_own_kernel(x: Any) -> bool:
    """Whether x is the answer of the Triton bag_dot to this layer alone: that kernel pads rows as it writes them."""
    own = getattr(x.target, "namespace", "") == "grc_cuda" and x.target._opname == "bag_dot"
    return own and len(x.users) == 1
