"""Apply the declared fusions: walk the graph from its end, so that the largest pattern around an anchor wins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from grc.graph.match import Miss, is_op, source_text, where
from grc.graph.rewrite import Rewriter
from grc.passes.manager import Change, Pass


@dataclass(frozen=True)
class Fuse(Pass):
    """Replace every place where a fusion matches by its fused op, and record why the others did not match."""

    name = "fuse"
    fusions: tuple[Any, ...] = ()

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
        return changes


def alive(node: fx.Node) -> bool:
    return bool(node.users)
