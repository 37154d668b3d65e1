"""Chains of narrow layers, each given to one kernel of the GPU: what they hand on stays in registers."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.nn import functional

from grc.graph.match import argument, aten, attribute, is_op, only_user, same_shape, same_size, shape, static, value
from grc.graph.rewrite import Rewriter, copy_graph
from grc.kernels import layer_chain as kinds
from grc.kernels.attention.layout import is_view
from grc.kernels.layer_chain import INPUTS, OUTPUTS, Step, encode
from grc.kernels.packed_linear.activations import NONE, activation_code
from grc.kernels.tiles import lanes
from grc.lowering.in_place import laid, layout_in

WIDEST = 256  # columns of a value, which lies in registers
WIDE = 1024  # columns of a layer that is written as it is made
WEIGHTS = 256 << 10  # bytes: every program reads them all
AT_ONCE = 1 << 14  # numbers of a weight that a program holds
SAME = -1  # the kind of what changes neither rows nor columns: a cast, another shape of the rows
HALVES = (torch.float16, torch.bfloat16)
BINARY = {aten.add: (kinds.ADD, kinds.SHIFT, kinds.COLUMN_ADD), aten.mul: (kinds.MUL, kinds.SCALE, kinds.COLUMN_MUL)}


class Part(NamedTuple):
    """One node as a step of a chain: the rows that it reads, and its parameters."""

    kind: int
    rows: tuple[fx.Node, ...]
    numbers: tuple[float, ...] = ()
    weight: torch.Tensor | None = None  # [n, k]
    vectors: tuple[torch.Tensor | None, ...] = ()
    row: fx.Node | None = None  # one number for each row
    within: fx.Node | None = None  # a node that this one stands for too, and nothing else reads

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        return self.rows if self.row is None else (*self.rows, self.row)

    @property
    def bytes(self) -> int:
        return 0 if self.weight is None else 2 * lanes(self.weight.shape[1]) * lanes(self.weight.shape[0])


@dataclass(eq=False)
class Chain:
    """Nodes that become one kernel, in their order, and the chains whose results it needs."""

    number: int
    parts: dict[fx.Node, Part] = field(default_factory=dict)
    needs: set[Chain] = field(default_factory=set)

    def inputs(self) -> list[fx.Node]:
        """What is read of other nodes, each once."""
        return list(dict.fromkeys(n for part in self.parts.values() for n in part.operands if n not in self.parts))

    def outputs(self) -> list[fx.Node]:
        """What other nodes read."""
        own = {*self.parts, *(part.within for part in self.parts.values())}
        return [node for node in self.parts if not own.issuperset(node.users)]

    @property
    def pays(self) -> bool:
        """Whether it saves a launch: of a single layer, what precedes or follows would be a second one."""
        layers = sum(part.weight is not None for part in self.parts.values())
        saves = layers > 1 or (layers == 1 and any(part.kind == kinds.NORM for part in self.parts.values()))
        return saves and len(self.outputs()) <= OUTPUTS


def takes_chains(graph: fx.GraphModule) -> bool:
    return any(chain.pays for chain in chains(graph))


def with_chains(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph for the GPU in which each chain of narrow layers is one call of `grc_cuda::layer_chain`."""
    from grc.kernels.layer_chain.triton import register

    copy, op = copy_graph(graph), register()
    replaced: dict[fx.Node, fx.Node] = {}
    for number, chain in enumerate([chain for chain in chains(copy) if chain.pays]):
        emit(copy, chain, op, f"chain_{number}", replaced)
    edit = Rewriter(copy)
    edit.sort()
    edit.finish()
    return copy


def chains(graph: fx.GraphModule) -> list[Chain]:
    """The chains of a graph: from its top, every layer joins a chain that it reads from or shares an input with."""
    found: list[Chain] = []
    chain_of: dict[fx.Node, Chain] = {}
    behind: dict[fx.Node, set[Chain]] = {}  # the chains whose results a node outside of all of them needs
    readers: dict[fx.Node, list[Chain]] = {}

    def sources(node: fx.Node) -> set[Chain]:
        return {chain_of[node]} if node in chain_of else behind[node]

    for node in graph.graph.nodes:
        part = part_of(graph, node)
        if part is None:
            behind[node] = set().union(*map(sources, node.all_input_nodes))
            continue
        near = [chain_of[n] for n in part.operands if n in chain_of]
        sharing = [chain for n in part.operands for chain in readers.get(n, ())]
        options = dict.fromkeys([*sorted(near, key=lambda chain: -chain.number), *reversed(sharing)])
        chain = next((option for option in options if fits(option, part, chain_of, behind)), None)
        if chain is None:
            found.append(chain := Chain(len(found)))
        chain.parts[node], chain_of[node] = part, chain
        for operand in part.operands:
            if operand not in chain.parts and chain not in readers.setdefault(operand, []):
                readers[operand].append(chain)
        chain.needs |= set().union(*map(sources, part.operands)) - {chain}
    return found


def need(chains: set[Chain], other: Chain) -> bool:
    """Whether one of these chains needs another one, or is it."""
    seen, waiting = set(chains), list(chains)
    while waiting:
        chain = waiting.pop()
        if chain is other:
            return True
        waiting += chain.needs - seen
        seen |= chain.needs
    return False


def fits(chain: Chain, part: Part, chain_of: dict[fx.Node, Chain], behind: dict[fx.Node, set[Chain]]) -> bool:
    """Whether a chain can take one more step: what it reads is in registers or does not wait for the chain."""
    for operand in part.operands:
        if operand in chain.parts:
            if chain.parts[operand].kind == kinds.WIDE or operand is part.row:
                return False
        elif need({chain_of[operand]} if operand in chain_of else behind[operand], chain):
            return False
    parts = [*chain.parts.values(), part]
    dtypes = {p.weight.dtype for p in parts if p.weight is not None}
    reads = len({*chain.inputs(), *(n for n in part.operands if n not in chain.parts)})
    # A value that is read elsewhere may still lose that reader to the chain: outputs are counted when all is known.
    return len(dtypes) <= 1 and sum(p.bytes for p in parts) <= WEIGHTS and reads <= INPUTS


def part_of(graph: fx.GraphModule, node: fx.Node) -> Part | None:
    """A node as a step, or None where it is none."""
    made = value(node)
    if node.op != "call_function" or not isinstance(made, torch.Tensor) or not rows_are_plain(node):
        return None
    part = (
        layer(graph, node) or same(node) or norm(graph, node) or binary(graph, node) or activation(node)
        or prelu(graph, node)
    )  # fmt: skip
    if part is None or not all(rows_are_plain(operand) for operand in part.rows):
        return None
    narrow = part.kind == kinds.WIDE or int(shape(node)[-1]) <= WIDEST
    return part if narrow else None


def rows_are_plain(node: fx.Node) -> bool:
    """[..., n] of floats with a constant n, and no other size unknown but one."""
    made = value(node)
    if not isinstance(made, torch.Tensor) or made.dtype not in (*HALVES, torch.float32) or made.dim() < 2:
        return False
    *lead, last = shape(node)
    return static(last) and 0 < int(last) <= WIDE and sum(not static(size) for size in lead) <= 1


def layer(graph: fx.GraphModule, node: fx.Node) -> Part | None:
    """A linear layer; one too wide for registers together with the activation that alone reads it."""
    code = activation_code(node)
    linear = node.args[0] if code != NONE else node
    if not is_op(linear, aten.linear):
        return None
    weight, bias = attribute(graph, linear.args[1]), argument(linear, "bias")
    if weight is None or weight.dim() != 2 or weight.dtype not in HALVES or weight.shape[1] > WIDEST:
        return None
    shift = None if bias is None else attribute(graph, bias)
    wide = weight.shape[0] > WIDEST
    if not wide and lanes(weight.shape[0]) * lanes(weight.shape[1]) > AT_ONCE:
        return None
    if (bias is not None and shift is None) or (code != NONE and not (wide and only_user(linear) is node)):
        return None
    if wide and code == NONE and activation_code(only_user(node)) != NONE:
        return None  # its activation is the step
    kind = kinds.WIDE if wide else kinds.LINEAR
    within = None if linear is node else linear
    return Part(kind, (linear.args[0],), (code,) if wide else (), weight, (shift,), within=within)


def same(node: fx.Node) -> Part | None:
    """A cast between floats, or the same rows in another shape."""
    if not is_op(node, aten.to, aten.reshape, aten.unsqueeze, aten.squeeze, aten.flatten, aten.contiguous):
        return None
    inner = node.args[0]
    return Part(SAME, (inner,)) if same_size(shape(inner)[-1], shape(node)[-1]) else None  # type: ignore[arg-type]


def norm(graph: fx.GraphModule, node: fx.Node) -> Part | None:
    if not is_op(node, aten.layer_norm) or list(node.args[1]) != [shape(node)[-1]]:  # type: ignore[arg-type]
        return None
    given = [argument(node, name) for name in ("weight", "bias")]
    vectors = [None if g is None else attribute(graph, g) for g in given]
    if any(g is not None and v is None for g, v in zip(given, vectors, strict=True)):
        return None
    return Part(kinds.NORM, (node.args[0],), (float(argument(node, "eps")),), vectors=tuple(vectors))  # type: ignore[arg-type]


def binary(graph: fx.GraphModule, node: fx.Node) -> Part | None:
    """A sum or product of two values, or of a value and a number, a number for each column, a number for each row."""
    found = next((codes for op, codes in BINARY.items() if is_op(node, op)), None)
    if found is None or len(node.args) != 2 or (is_op(node, aten.add) and argument(node, "alpha") != 1):
        return None
    both, number, column = found
    for one, other in (node.args, node.args[::-1]):
        if not isinstance(one, fx.Node) or not isinstance(value(one), torch.Tensor) or not same_shape(one, node):
            continue
        if isinstance(other, (int, float)):
            return Part(number, (one,), (float(other),))
        if not isinstance(other, fx.Node) or not isinstance(value(other), torch.Tensor):
            continue
        constant = attribute(graph, other)
        if constant is not None and constant.dim() > 0 and constant.shape[-1] == constant.numel() == shape(node)[-1]:
            return Part(column, (one,), vectors=(constant.flatten(),))
        if constant is None and same_shape(other, node):
            return Part(both, (one, other))
        lead = shape(other)[:-1] if value(other).dim() == value(node).dim() else ()
        alike = lead and all(same_size(a, b) for a, b in zip(lead, shape(node)[:-1], strict=True))
        if is_op(node, aten.mul) and alike and same_size(shape(other)[-1], 1):
            compared = unequal(other)
            if compared is None:
                return Part(kinds.ROW, (one,), row=other)
            return Part(kinds.UNEQUAL, (one,), (compared.args[1],), row=other)  # type: ignore[arg-type]
    return None


def unequal(mask: fx.Node) -> fx.Node | None:
    """The comparison of integers with a number that a mask is, or is rows of that lie evenly, and whose operand lies in
    one piece: it is read in the place of the mask, which nothing need make then."""
    node: Any = mask
    while is_view(node):
        node = node.args[0]
    if not is_op(node, aten.ne) or not isinstance(node.args[1], int) or node.args[0].op != "placeholder":
        return None
    whole = value(node.args[0])
    plain = not whole.is_floating_point() and whole.is_contiguous()
    return node if plain and layout_in(mask, node) is not None else None


def activation(node: fx.Node) -> Part | None:
    code = activation_code(node)
    return None if code == NONE else Part(kinds.ACTIVATION, (node.args[0],), (code,))  # type: ignore[arg-type]


def prelu(graph: fx.GraphModule, node: fx.Node) -> Part | None:
    if not is_op(node, aten.prelu):
        return None
    slope, width = attribute(graph, node.args[1]), int(shape(node)[-1])
    if slope is None or not (slope.numel() == 1 or (value(node).dim() == 2 and slope.numel() == width)):
        return None
    return Part(kinds.PRELU, (node.args[0],), vectors=(slope.flatten().expand(width),))  # type: ignore[arg-type]


class Flat:
    """Parameters one after the other, each filled up with zeros."""

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []
        self.size = 0

    def place(self, tensor: torch.Tensor) -> int:
        at, self.size = self.size, self.size + tensor.numel()
        self.parts.append(tensor.flatten())
        return at


def emit(graph: fx.GraphModule, chain: Chain, op: Any, name: str, replaced: dict[fx.Node, fx.Node]) -> None:
    """Write a chain as one call, from which its outputs are taken, at the end of a graph that is to be sorted then.

    `replaced` are the outputs of the chains before it, which its own steps still name as they were.
    """
    writer = Writer(chain)
    steps = list(writer.steps())
    with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
        parameters = []
        for kind, flat in (("weights", writer.weights), ("vectors", writer.vectors)):
            tensor = torch.cat(flat.parts) if flat.parts else torch.zeros(16, device=writer.weights.parts[0].device)
            graph.register_parameter(f"{name}_{kind}", torch.nn.Parameter(tensor, requires_grad=False))
            parameters.append(graph.graph.get_attr(f"{name}_{kind}"))
            parameters[-1].meta["val"] = tensor.to("meta")
    with graph.graph.inserting_before(next(iter(reversed(graph.graph.nodes)))):
        masks = {part.row for part in chain.parts.values() if part.kind == kinds.UNEQUAL}
        inputs = [read(graph.graph, node) if node in masks else replaced.get(node, node) for node in writer.inputs]
        call = graph.graph.call_function(op, (inputs, *parameters, encode(steps)))
        for at, node in enumerate(writer.outputs):
            item = graph.graph.call_function(operator.getitem, (call, at))
            sizes = [int(size) if static(size) else -1 for size in shape(node)]
            shaped = graph.graph.call_function(aten.reshape.default, (item, sizes))
            shaped.meta = dict(node.meta)
            replaced[node] = shaped
            node.replace_all_uses_with(shaped, delete_user_cb=lambda user: user not in chain.parts)


def read(graph: fx.Graph, mask: fx.Node) -> fx.Node:
    """The integers that a mask compares, laid as it is."""
    compared = unequal(mask)
    assert compared is not None
    layout = layout_in(mask, compared)
    assert layout is not None
    return laid(graph, compared.args[0], mask, layout)  # type: ignore[arg-type]


class Writer:
    """The steps of a chain, with its parameters as they lie in memory."""

    def __init__(self, chain: Chain):
        self.chain, self.inputs, self.outputs = chain, chain.inputs(), chain.outputs()
        self.weights, self.vectors = Flat(), Flat()
        self.places: dict[fx.Node, int] = {}
        self.count = 0

    def steps(self) -> Iterator[Step]:
        for node, part in self.chain.parts.items():
            for operand in part.rows:
                if operand not in self.places:
                    width = int(shape(operand)[-1])
                    yield (kinds.INPUT, self.inputs.index(operand), width, lanes(width))
                    self.add(operand)
            if part.kind == SAME:
                self.places[node] = self.places[part.rows[0]]
            else:
                yield self.step(node, part)
            if part.kind not in (SAME, kinds.WIDE):
                self.add(node)
            if node in self.outputs and part.kind != kinds.WIDE:
                output = self.outputs.index(node)
                yield (kinds.OUTPUT, self.places[node], output, int(shape(node)[-1]), is_float32(node))

    def add(self, node: fx.Node) -> None:
        self.places[node] = self.count
        self.count += 1

    def step(self, node: fx.Node, part: Part) -> Step:
        places = [self.places[operand] for operand in part.rows]
        width = int(shape(node)[-1])
        vectors = [self.vector(v, lanes(width)) for v in part.vectors]
        if part.weight is not None:
            columns, depth = part.weight.shape
            lying = functional.pad(part.weight.detach().t(), (0, lanes(columns) - columns, 0, lanes(depth) - depth))
            at = self.weights.place(lying)
            head = (part.kind, *places, at, lanes(depth), columns, lanes(columns), *vectors)
            tail = (*part.numbers, self.outputs.index(node), is_float32(node)) if part.kind == kinds.WIDE else ()
            return (*head, *tail)
        if part.kind == kinds.NORM:
            return (part.kind, *places, width, lanes(width), *part.numbers, *vectors)
        if part.row is not None:
            return (part.kind, *places, self.inputs.index(part.row), *part.numbers)
        return (part.kind, *places, *part.numbers, *vectors, *([lanes(width)] if vectors else []))

    def vector(self, tensor: torch.Tensor | None, size: int) -> int:
        if tensor is None:
            return -1
        return self.vectors.place(functional.pad(tensor.detach().float(), (0, size - tensor.numel())))


def is_float32(node: fx.Node) -> int:
    return int(value(node).dtype is torch.float32)
