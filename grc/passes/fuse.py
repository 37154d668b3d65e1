"""Apply the declared fusions: walk the graph from its end, so that the largest pattern around an anchor wins."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from grc.graph.lookups import is_table
from grc.graph.match import Miss, aten, attribute, is_op, shape, source_text, static, where
from grc.graph.rewrite import Rewriter
from grc.passes.manager import Change, Pass

# Measured beside a look-up of its own on CPUs: as fast under a linear layer, and 1.2 to 1.3 times as fast where the
# gather is fused with what reads the rows (an attention over a history, a product of two rows) at batch 64 and 1024.
GATHERED = (
    "no look-up stands beside it in a cat and nothing pools its rows: what reads them gathers them, which is as fast"
)
OFFSETS = (
    "its rows are summed, but each column of ids has a part of the table to itself, and a bag has one part: what sums them "
    "gathers them"
)
WIDE = "its table is {}: kernels read rows of float32, float16 and bfloat16"
COMPUTED = "its table is computed: only a parameter or buffer [rows, width] has rows to read"


@dataclass(frozen=True)
class Fuse(Pass):
    """Replace every place where a fusion matches by its fused op, and record why the others did not match."""

    name = "fuse"
    fusions: tuple[Any, ...] = ()
    tells: bool = True  # which look-ups no fusion took

    def parts(self) -> list[Pass]:
        if len(self.fusions) < 2:
            return []
        return [*(Fuse((fusion,), False) for fusion in self.fusions), Fuse()]

    def run(self, graph: fx.GraphModule) -> list[Change]:
        edit = Rewriter(graph)
        changes: list[Change] = []
        for fusion in self.fusions:
            for node in list(reversed(graph.graph.nodes)):
                if node.op != "call_function" or not is_op(node, *fusion.anchors) or not alive(node):
                    continue
                line, text = where(node), source_text(node)
                try:
                    with edit.at(node):
                        fused = fusion.fuse(edit, node)
                except Miss as miss:
                    changes.append(Change(fusion.name, line, text, missed=str(miss)))
                    continue
                if fused is not None:
                    edit.replace(fused.old, fused.new)
                    changes.append(Change(fusion.name, line, text, fused.saves))
        edit.finish()
        return [*changes, *(left_alone(graph) if self.tells else ())]


def alive(node: fx.Node) -> bool:
    return bool(node.users)


def left_alone(graph: fx.GraphModule) -> Iterable[Change]:
    """The look-ups of a request's ids that stay as they are, with the reason."""
    for node in graph.graph.nodes:
        if not is_op(node, aten.embedding, aten.embedding_bag) or all(static(size) for size in shape(node.args[1])):
            continue
        yield Change("look-up", where(node), source_text(node), missed=why_alone(graph, node))


def why_alone(graph: fx.GraphModule, node: fx.Node) -> str:
    table = attribute(graph, node.args[0])
    if table is None or table.dim() != 2:
        return COMPUTED
    if not is_table(graph, node.args[0]):
        return WIDE.format(str(table.dtype).removeprefix("torch."))
    summed = any(is_op(user, aten.sum, aten.mean) for user in node.users)
    return OFFSETS if summed and is_op(node.args[1], aten.add) else GATHERED
