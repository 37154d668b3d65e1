"""Cut a graph at its tables and at the end of its interaction: stages that can be served by a model each.

    inputs ──▶ embedding_service ──▶ interaction_python ──▶ gr_trt ──▶ outputs

The embedding service reads tables and pools or reshapes what it read. The last stage begins at the first dense layers that
read what came from the tables, and holds all that follows from them. The interaction is what lies between: crosses and dot
products, and the dense layers of features that never met a table. A model without tables is cut at its input layers: a
dense layer over a multi-hot row is the look-up of its ones.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from grc.errors import LoweringError
from grc.graph.ids import reads
from grc.graph.match import aten, is_op, value

NAMES = ("embedding_service", "interaction_python", "gr_trt")
CROSSING = ("embedding", "interaction", "rank")  # how the tensors that leave a stage are called
DENSE = (aten.linear, aten.addmm, aten.mm, aten.matmul, aten.bmm, aten.convolution, aten.conv1d, aten.conv2d)
SHAPING = (
    aten.reshape, aten.view, aten.squeeze, aten.unsqueeze, aten.flatten, aten.permute, aten.transpose, aten.cat, aten.stack,
    aten.sum, aten.mean, aten.amax,
)  # fmt: skip
Place = Mapping[fx.Node, int]


@dataclass(frozen=True)
class Stage:
    """A part of a graph as a graph of its own, and what its tensors are called: the model's own keep their names."""

    name: str
    graph: fx.GraphModule
    inputs: list[str]
    outputs: list[str]


def cut(graph: fx.GraphModule, inputs: Sequence[str], outputs: Sequence[str]) -> list[Stage]:
    """The stages that have work to do, in order. `inputs` and `outputs` name the graph's own.

    Every tensor between two stages has the batch first, so that requests can be merged and split by rows; what has not is
    computed again where it is needed. Raises LoweringError where there are no two stages.
    """
    place = assign(graph)
    nodes = list(graph.graph.nodes)
    results: list[fx.Node] = list(nodes[-1].args[0])  # type: ignore[arg-type]
    if len(set(results)) < len(results) or any(node not in place for node in results):
        raise LoweringError("the model returns an input, a constant or one tensor twice: it can't be cut into stages")
    given: list[list[fx.Node]] = [[n for n in results if place[n] == i] for i in range(len(NAMES))]
    taken: list[list[fx.Node]] = [[] for _ in NAMES]
    graphs: list[fx.GraphModule | None] = [None] * len(NAMES)
    crosses = crossing(graph)
    for i in reversed(
        range(len(NAMES))
    ):  # what a stage must give is known once all later ones have said what they take
        if given[i]:
            graphs[i], taken[i] = extract(graph, i, given[i], place, crosses)
        for node in taken[i]:
            if node in place and node not in given[place[node]]:
                given[place[node]].append(node)
    names = dict(zip([n for n in nodes if n.op == "placeholder"], inputs, strict=True))
    names |= dict(zip(results, outputs, strict=True))
    for i, made in enumerate(given):
        fresh = [node for node in made if node not in names]
        names |= {n: CROSSING[i] if len(fresh) == 1 else f"{CROSSING[i]}_{k}" for k, n in enumerate(fresh)}
    stages = [
        Stage(NAMES[i], piece, [names[n] for n in taken[i]], [names[n] for n in given[i]])
        for i, piece in enumerate(graphs)
        if piece is not None
    ]
    if len(stages) < 2:
        raise LoweringError("the model has no tables and no layers to cut it at", "leave out --stages")
    return stages


def assign(graph: fx.GraphModule) -> dict[fx.Node, int]:
    """The stage of every value that depends on the request by more than its sizes."""
    nodes = list(graph.graph.nodes)
    crosses = crossing(graph)
    inputs = (n for n in nodes if n.op == "placeholder")
    live = reached(inputs, lambda node: () if is_op(node, aten.sym_size) else node.users)
    ordered = [n for n in nodes if n in live and n.op == "call_function"]
    dense = {n for n in ordered if is_op(n, *DENSE) and any(constant(a, live) for a in n.all_input_nodes)}
    after = below(user for n in dense for user in n.users)
    first = dense - after
    tables = [n for n in ordered if any(True for _ in reads(graph, n)) and n not in after | dense]
    tables = [n for n in tables if any(crosses(v) for v in (n, *n.users))]
    sources = set(tables) or first
    met = below(sources)
    tail = below(n for n in dense & met if n not in sources) or {n for n in ordered if is_result(n)} & met - sources
    head = above(sources) & live
    shaped = set(sources)
    for node in ordered:
        if node in head or node in tail or not (is_op(node, *SHAPING) or node.target is operator.getitem):
            continue
        read = [n for n in node.all_input_nodes if n in live]
        if any(n in shaped for n in read) and all(n in head or not tensor(n) for n in read):
            head.add(node)
            shaped.add(node)
    return {n: 0 if n in head else 2 if n in tail else 1 for n in ordered}


def extract(
    graph: fx.GraphModule, index: int, results: Sequence[fx.Node], place: Place, crosses: Callable[[fx.Node], bool]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """One stage as a graph, and the values that it takes."""
    needed: set[fx.Node] = set()
    entering: set[fx.Node] = set()
    waiting = list(results)
    while waiting:
        node = waiting.pop()
        if node in needed or node in entering:
            continue
        if node.op == "placeholder" or (place.get(node, index) < index and crosses(node)):
            entering.add(node)
        else:
            needed.add(node)
            waiting += node.all_input_nodes
    piece = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    nodes = [n for n in graph.graph.nodes if n in needed or n in entering]
    for node in sorted(nodes, key=lambda n: n not in entering):  # a stable sort: inputs first, each in its old order
        copies[node] = copy(piece, node, copies, node in entering)
    piece.output(tuple(copies[node] for node in results))
    share_sizes(piece)
    for node in list(entering):
        if not copies[node].users:
            piece.erase_node(copies[node])
            entering.discard(node)
    module = fx.GraphModule(graph, piece)
    return module, [n for n in graph.graph.nodes if n in entering]


def copy(piece: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node], enters: bool) -> fx.Node:
    if not enters:
        return piece.node_copy(node, lambda n: copies[n])
    made = piece.placeholder(node.name)
    made.meta = {"val": node.meta["val"]}
    return made


def share_sizes(piece: fx.Graph) -> None:
    """Read each size from the first input that has it, so that no tensor is sent to a stage for its size alone."""
    inputs = [n for n in piece.nodes if n.op == "placeholder"]
    asked = [n for n in piece.nodes if is_op(n, aten.sym_size)]
    used = [n for n in inputs if any(user not in asked for user in n.users)]
    for node in asked:
        size = str(value(node))
        for other in used:
            dims = [str(s) for s in other.meta["val"].shape]
            if size in dims:
                node.args = (other, dims.index(size))
                break


def crossing(graph: fx.GraphModule) -> Callable[[fx.Node], bool]:
    """Whether a value has the batch first, once or a constant number of times a row, and nowhere else."""
    first = next((n for n in graph.graph.nodes if n.op == "placeholder"), None)
    sizes: list[Any] = list(first.meta["val"].shape) if first is not None else []
    if not sizes or isinstance(sizes[0], int):
        raise LoweringError("the model's first input does not begin with the batch: it can't be cut into stages")
    batch = sizes[0].node.expr

    def crosses(node: fx.Node) -> bool:
        made = value(node)
        if not isinstance(made, torch.Tensor) or made.dim() == 0 or isinstance(made.shape[0], int):
            return False
        times = made.shape[0].node.expr / batch
        rest = [size.node.expr for size in made.shape[1:] if not isinstance(size, int)]
        return bool(times.is_Integer) and not any(batch.free_symbols & size.free_symbols for size in rest)

    return crosses


def below(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and all that depends on them."""
    return reached(nodes, lambda node: node.users)


def above(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and all that they depend on."""
    return reached(nodes, lambda node: node.all_input_nodes)


def reached(nodes: Iterable[fx.Node], further: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += further(node)
    return found


def constant(node: fx.Node, live: set[fx.Node]) -> bool:
    made: Any = value(node)
    return node not in live and isinstance(made, torch.Tensor) and made.dim() >= 2


def tensor(node: fx.Node) -> bool:
    return isinstance(value(node), torch.Tensor)


def is_result(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)
