"""Put look-ups that end in one cat into one arena, so that one kernel reads them all and patterns have fixed arity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import networkx as nx
import torch
from torch import fx

from grc.graph.jagged import keyed
from grc.graph.lookups import NO_PADDING, SUM, Bag, Columns, columns_of, find_bag
from grc.graph.match import argument, aten, is_op, shape, source_text, value, where
from grc.graph.rewrite import Rewriter, find_attribute
from grc.passes.manager import Change, Pass


@dataclass
class Group:
    """Operands of one cat that become one look-up: those from `start` on, or, without it, some with others between them."""

    cat: fx.Node
    bags: list[Bag]
    start: int | None

    @property
    def mixed(self) -> bool:
        return len({bag.dim for bag in self.bags}) > 1


@dataclass
class Arena:
    """Tables that lie one after the other in one tensor: `[R, D]`, or `[E]` where widths differ."""

    node: fx.Node
    base: dict[str, int] = field(default_factory=dict)
    flat: bool = False


@dataclass(frozen=True)
class MergeTables(Pass):
    """N look-ups that end in one stack or cat become one `grc.lookup` over one arena."""

    name = "merge-tables"

    def run(self, graph: fx.GraphModule) -> list[Change]:
        edit = Rewriter(graph)
        found = [*grouped(graph)]
        groups = [group for group in found if independent(group)]
        arenas = build_arenas(edit, groups)
        place = {node: i for i, node in enumerate(graph.graph.nodes)}
        # From the last operands of a cat to its first, so that the places of those before them stay what they are.
        changes = [merge(edit, group, arenas, place) for group in sorted(groups, key=lambda group: -(group.start or 0))]
        edit.sort()
        edit.finish()
        for group in found:
            if group not in groups:
                reason = "the ids of one look-up are computed from the rows of another"
                first = group.bags[0].node
                changes.append(Change("look-ups", where(first), source_text(first), missed=reason))
        return changes


def grouped(graph: fx.GraphModule) -> Iterable[Group]:
    """Look-ups that can share a kernel: those of the widest cat first, and at last those that stand alone. The cats that join
    the rows of one more than once share all theirs.
    """
    taken: set[fx.Node] = set()
    cats = [node for node in graph.graph.nodes if is_op(node, aten.cat) and value(node).dim() == 2]
    found = {
        node: [find_bag(graph, part) for part in node.args[0]] for node in cats if argument(node, "dim") in (1, -1)
    }
    repeated = [bags for bags in found.values() if repeats(bags)]
    for node, bags in sorted(found.items(), key=lambda item: -sum(bag is not None for bag in item[1])):
        if bags in repeated:
            continue
        for members in together(bag for bag in bags if bag is not None and bag.node not in taken):
            if len(members) > 1 or gains(members[0]):
                taken.update(member.node for member in members)
                places = [i for i, bag in enumerate(bags) if bag in members]
                yield Group(node, members, places[0] if places[-1] - places[0] + 1 == len(places) else None)
    for members in together(bag for bags in repeated for bag in bags if bag is not None and bag.node not in taken):
        if len(members) > 1:
            taken.update(member.node for member in members)
            yield Group(members[0].node, members, 0)
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node in taken or value(node) is None or isinstance(value(node), (tuple, list)):
            continue
        alone = getattr(value(node), "ndim", 0) == 2 and not feeds_taken(node, taken)
        bag = find_bag(graph, node) if alone else None
        if bag is not None and gains(bag):
            taken.add(node)
            yield Group(node, [bag], 0)


def together(bags: Iterable[Bag]) -> list[list[Bag]]:
    """Look-ups, each once, in sets of those that one kernel takes."""
    sets: list[list[Bag]] = []
    for bag in {bag.node: bag for bag in bags}.values():
        members = next((members for members in sets if compatible(members, bag)), None)
        if members is None:
            sets.append([bag])
        else:
            members.append(bag)
    return sets


def repeats(bags: Sequence[Bag | None]) -> bool:
    """Whether a cat joins the rows of one look-up more than once, as one over all pairs of features does."""
    nodes = [bag.node for bag in bags if bag is not None]
    return len(nodes) > len(set(nodes))


def gains(bag: Bag) -> bool:
    """Whether a look-up alone is one for a kernel: a single row for each request is gathered by whatever reads it."""
    return bag.features > 1 or not is_op(bag.node, aten.embedding)


def independent(group: Group) -> bool:
    """True where no member's ids depend on what another member read."""
    if len(group.bags) == 1:
        return True
    read = {node for bag in group.bags for node in (bag.ids, bag.offsets, bag.weights) if node is not None}
    seen = {bag.node for bag in group.bags}
    waiting = list(seen)
    while waiting:
        new = [user for user in waiting.pop().users if user not in seen]
        seen.update(new)
        waiting += new
    return not read & seen


def feeds_taken(node: fx.Node, taken: set[fx.Node]) -> bool:
    return any(user in taken for user in node.users)


def compatible(run: Sequence[Bag], bag: Bag) -> bool:
    first = run[0]
    if (first.offsets is None) != (bag.offsets is None) or (first.weights is None) != (bag.weights is None):
        return False
    if value(first.table).dtype != value(bag.table).dtype or value(first.table).device != value(bag.table).device:
        return False
    if bag.offsets is not None and first.last_offset != bag.last_offset:
        return False
    pooled = {b.pooling for b in (*run, bag) if b.length != 1 or b.weights is not None or b.padding != NO_PADDING}
    return len(pooled) <= 1


def build_arenas(edit: Rewriter, groups: Sequence[Group]) -> dict[str, Arena]:
    """One arena for all tables that any two groups share, so that no table is stored twice."""
    links: nx.Graph = nx.Graph()
    tables: dict[str, fx.Node] = {}
    for group in groups:
        names = [str(bag.table.target) for bag in group.bags]
        tables |= {str(bag.table.target): bag.table for bag in group.bags}
        nx.add_path(links, names)
    arenas: dict[str, Arena] = {}
    for component in nx.connected_components(links):
        names = [name for name in tables if name in component]
        flat = any(group.mixed for group in groups if str(group.bags[0].table.target) in component)
        arena = join(edit, [tables[name] for name in names], flat)
        arenas |= dict.fromkeys(names, arena)
    return arenas


def join(edit: Rewriter, tables: Sequence[fx.Node], flat: bool) -> Arena:
    """Move tables into one tensor, one at a time; the model's parameters become views of it, so memory never doubles."""
    if len(tables) == 1:
        return Arena(tables[0], {str(tables[0].target): 0}, False)
    tensors = [find_attribute(edit.module, str(table.target)) for table in tables]
    width = 1 if flat else tensors[0].shape[1]
    counts = [t.numel() // width for t in tensors]
    size = (sum(counts),) if flat else (sum(counts), width)
    storage = torch.empty(size, dtype=tensors[0].dtype, device=tensors[0].device)
    bases: dict[str, int] = {}
    start = 0
    for table, tensor, count in zip(tables, tensors, counts, strict=True):
        part = storage[start : start + count].view(tensor.shape)
        part.copy_(tensor.detach())
        tensor.data = part
        bases[str(table.target)] = start
        start += count
    node = edit.parameter("arena", storage)
    node.meta["tables"] = bases
    return Arena(node, bases, flat)


def merge(edit: Rewriter, group: Group, arenas: dict[str, Arena], place: dict[fx.Node, int]) -> Change:
    """Replace one group by one look-up; whoever else reads a member gets its slice.

    The look-up stands at the last member, after all ids; readers of the others that stand before it move behind it.
    """
    bags = group.bags
    arena = arenas[str(bags[0].table.target)]
    anchor = bags[-1].node if len(bags) > 1 or group.cat is bags[0].node else bags[0].node
    last = max((b.node for b in bags), key=place.__getitem__)
    with edit.at(last):
        lookup = emit(edit, bags, arena)
        start = 0
        for bag in bags:
            width = bag.features * bag.dim
            part = lookup if len(bags) == 1 else edit.call(aten.slice.Tensor, lookup, 1, start, start + width)
            if value(bag.node).dim() == 3:
                part = edit.reshape(part, -1, bag.features, bag.dim)
            bag.node.replace_all_uses_with(part, delete_user_cb=lambda user: user is not lookup)
            start += width
    if group.start is not None and is_op(group.cat, aten.cat):
        parts = list(group.cat.args[0])  # type: ignore[arg-type]
        group.cat.args = ([*parts[: group.start], lookup, *parts[group.start + len(bags) :]], *group.cat.args[1:])
    tables = len({str(b.table.target) for b in bags})
    text = f"{sum(b.features for b in bags)} look-ups of {tables} table{'s' * (tables > 1)} -> 1"
    saves = f"{len(bags) - 1} launches"
    if len(bags) == 1 and bags[0].length != 1:
        width = bags[0].dim * value(bags[0].table).dtype.itemsize
        text = "look-up and pooling"
        saves = f"{bags[0].length * width / 1024:.1f} KB a row" if bags[0].length else f"{width / 1024:.2g} KB an id"
    return Change(text, where(anchor), source_text(anchor), saves=saves)


def emit(edit: Rewriter, bags: Sequence[Bag], arena: Arena) -> fx.Node:
    unit = [1 if not arena.flat else bag.dim for bag in bags]
    bases = [arena.base[str(b.table.target)] + base * u for b, u in zip(bags, unit, strict=True) for base in b.bases]
    rows = [b.rows - base for b in bags for base in b.bases]
    dims = [b.dim for b in bags for _ in b.bases]
    padding = [b.padding for b in bags for _ in b.bases]
    pooling = next((b.pooling for b in bags if b.length != 1), bags[0].pooling if bags[0].weights is not None else SUM)
    if bags[0].offsets is None:
        ids = join_columns(edit, [columns_of(matrix(edit, b.ids, b.length)) for b in bags])
        weights = None
        if bags[0].weights is not None:
            weights = join_columns(edit, [columns_of(matrix(edit, b.weights, b.length)) for b in bags])  # type: ignore[arg-type]
        lengths = [b.length for b in bags for _ in b.bases]
        offsets = None
    else:
        ids, offsets, weights = join_jagged(edit, bags)
        lengths = []
    op = torch.ops.grc.lookup.default
    node = edit.call(op, arena.node, ids, offsets, weights, bases, rows, dims, lengths, pooling, padding)
    node.meta["tables"] = [str(b.table.target) for b in bags for _ in b.bases]
    return node


def matrix(edit: Rewriter, node: fx.Node, length: int) -> fx.Node:
    """Ids or weights as `[B, T]`, of which `[B]` is the one column where a row has one."""
    dims = value(node).dim()
    return edit.reshape(node, -1, length) if dims == 3 or (dims == 1 and length > 1) else node


def join_columns(edit: Rewriter, pieces: Sequence[Columns]) -> fx.Node:
    """One `[B, T]` matrix from columns, without moving anything where they already lie side by side."""
    merged: list[Columns] = []
    for piece in pieces:
        previous = merged[-1] if merged else None
        alike = previous is not None and previous.matrix is piece.matrix and previous.dtype is piece.dtype
        if alike and previous is not None and previous.start + previous.width == piece.start:
            merged[-1] = Columns(piece.matrix, previous.start, previous.width + piece.width, piece.dtype)
        else:
            merged.append(piece)
    nodes = [take(edit, piece) for piece in merged]
    if len(nodes) == 1:
        return nodes[0]
    dtypes = {value(n).dtype for n in nodes}
    if len(dtypes) > 1:
        nodes = [edit.call(aten.to.dtype, n, torch.int64) if value(n).dtype != torch.int64 else n for n in nodes]
    return edit.call(aten.cat.default, nodes, 1)


def take(edit: Rewriter, piece: Columns) -> fx.Node:
    found = piece.matrix
    if value(found).dim() == 1:
        found = edit.reshape(found, -1, 1)
    elif piece.start != 0 or piece.width != shape(found)[1]:
        found = edit.call(aten.slice.Tensor, found, 1, piece.start, piece.start + piece.width)
    return found if piece.dtype is None else edit.call(aten.to.dtype, found, piece.dtype)


def join_jagged(edit: Rewriter, bags: Sequence[Bag]) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """Values one feature after the other, and offsets that run through all of them."""
    ids = [b.ids for b in bags]
    if len(bags) == 1 and bags[0].last_offset:
        return ids[0], bags[0].offsets, bags[0].weights  # type: ignore[return-value]
    whole = keyed(bags)
    if whole is not None:
        lengths = edit.reshape(whole.lengths, -1)
        zero = edit.call(aten.full.default, [1], 0, dtype=torch.int64, device=value(lengths).device)
        ends = edit.call(aten.cumsum.default, lengths, 0)
        return whole.values, edit.call(aten.cat.default, [zero, ends], 0), join_weights(edit, bags)
    parts: list[fx.Node] = []
    total: fx.Node | None = None
    for bag in bags:
        assert bag.offsets is not None
        offsets = bag.offsets
        if value(offsets).dtype != torch.int64:
            offsets = edit.call(aten.to.dtype, offsets, torch.int64)
        if bag.last_offset:
            offsets = edit.call(aten.slice.Tensor, offsets, 0, 0, -1)
        if total is not None:
            offsets = edit.call(aten.add.Tensor, offsets, total)
        parts.append(offsets)
        count = edit.call(aten.sym_size.int, bag.ids, 0)
        total = count if total is None else edit.call(torch.sym_sum, [total, count])
    end = edit.call(aten.full.default, [1], total, dtype=torch.int64, device=value(ids[0]).device)
    joined = edit.call(aten.cat.default, [*parts, end], 0)
    if len({value(i).dtype for i in ids}) > 1:
        ids = [edit.call(aten.to.dtype, i, torch.int64) for i in ids]
    values = ids[0] if len(ids) == 1 else edit.call(aten.cat.default, ids, 0)
    return values, joined, join_weights(edit, bags)


def join_weights(edit: Rewriter, bags: Sequence[Bag]) -> fx.Node | None:
    weights = [b.weights for b in bags if b.weights is not None]
    return edit.call(aten.cat.default, weights, 0) if len(weights) > 1 else next(iter(weights), None)
