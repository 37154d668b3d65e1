"""Bring the many ways of writing the same mathematics to one form, so that few patterns match many models."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from grc.graph.cost import bytes_of
from grc.graph.match import argument, aten, attribute, constant_list, is_op, same_shape, same_size, shape, static, value
from grc.graph.rewrite import Rewriter, is_impure
from grc.passes.aliases import composite, one_name
from grc.passes.batch_norms import norm_after_linear, norm_before_linear
from grc.passes.manager import Change, Pass
from grc.passes.pairs import pairs_of_cats, pairs_of_loop, sum_of_loop
from grc.passes.pieces import cat_of_pieces, flatten_cat, inferred_sizes, piece_of_cat, pieces_across, stack_to_cat
from grc.passes.products import (
    activated_layers,
    bias_of_linear,
    column_arithmetic,
    drop_zero,
    multiply_add,
    one_column,
    one_product,
    one_transpose,
    square,
)
from grc.passes.repeats import repeat_of_one, repeat_of_rows
from grc.passes.weighted_sums import weighted_sum

ROUNDS = 8  # a rule may open the way for another; the zoo's models need at most four
FOLD_BYTES = 1 << 20  # constants up to this size are folded; weights stay as they are
END = 2**63 - 1
# what the rules on look-ups and shapes bring to their own form: nothing is computed
UNCOMPUTED = (
    aten.embedding, aten.embedding_bag, aten._embedding_bag, aten._embedding_bag_forward_only, aten.embedding_renorm,
    aten.index, aten.index_select, aten.gather, aten.reshape, aten.contiguous, aten.clone, aten.flatten, aten.expand,
)  # fmt: skip
# products of weights, which a request would wait for; what they give may be so much larger than what they take
PRODUCTS = (aten.linear, aten.mm, aten.matmul, aten.bmm, aten.addmm, aten._sparse_mm)
WIDER = 4
Rule = Callable[[Rewriter, fx.Node], fx.Node | None]


@dataclass(frozen=True)
class Normalise(Pass):
    """Aliases, shapes, products, look-ups and constants in one form each; dead values dropped."""

    name = "normalise"

    def run(self, graph: fx.GraphModule) -> list[Change]:
        edit = Rewriter(graph)
        before = len(graph.graph.nodes)
        counts: dict[str, int] = {}
        for _ in range(ROUNDS):
            changed = 0
            for node in list(graph.graph.nodes):
                if node.op == "call_function":
                    changed += self.apply(edit, node, counts)
            changed += count(counts, "duplicate", drop_duplicates(graph.graph))
            graph.graph.eliminate_dead_code(is_impure)
            if not changed:
                break
        edit.finish()
        after = len(graph.graph.nodes)
        made = [Change(f"{name} {count}") for name, count in counts.items()]
        if after < before:
            made.append(Change(f"dead {before - after}"))
        return made

    def apply(self, edit: Rewriter, node: fx.Node, counts: dict[str, int]) -> int:
        with edit.at(node):
            for rule in RULES:
                new = rule(edit, node)
                if new is not None and new is not node:
                    edit.replace(node, new)
                    return count(counts, rule.__name__.replace("_", "-"), 1)
        return 0


def count(counts: dict[str, int], name: str, more: int) -> int:
    if more:
        counts[name] = counts.get(name, 0) + more
    return more


def drop_duplicates(graph: fx.Graph) -> int:
    """Calls of the same operator with the same arguments are one value: the first."""
    seen: dict[Any, fx.Node] = {}
    dropped = 0
    for node in list(graph.nodes):
        if node.op == "get_attr":
            key: Any = ("get_attr", node.target)
        elif node.op == "call_function" and repeatable(node.target):
            key = (node.target, hashable(node.args), hashable(node.kwargs))
        else:
            continue
        first = seen.setdefault(key, node)
        if first is not node and node.users:
            node.replace_all_uses_with(first)
            dropped += 1
    return dropped


def repeatable(target: Any) -> bool:
    """True for operators that give the same answer each time. `item` stays: each has a symbol of its own."""
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "grc"):
        return False
    if torch.Tag.nondeterministic_seeded in target.tags or torch.Tag.data_dependent_output in target.tags:
        return False
    return torch.Tag.dynamic_output_shape not in target.tags and not target._schema.is_mutable


def hashable(value: Any) -> Any:
    """Arguments as a key. 1, 1.0 and True are equal in Python and different to an operator."""
    if isinstance(value, (list, tuple)):
        return tuple(hashable(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, hashable(v)) for k, v in sorted(value.items()))
    return value if isinstance(value, fx.Node) else (type(value), value)


@dataclass(frozen=True)
class Simplify(Normalise):
    """Normalise again, what merging tables left."""

    name = "simplify"


def drop_alias(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """Operators that give their argument back."""
    if is_op(node, aten._assert_tensor_metadata) and not node.users:
        edit.graph.erase_node(node)
        return None
    if is_op(node, aten.alias, aten.detach, aten.lift_fresh_copy, aten.contiguous, aten.clone):
        return node.args[0]  # type: ignore[return-value]
    if is_op(node, aten.permute) and [d % len(node.args[1]) for d in node.args[1]] == list(range(len(node.args[1]))):  # type: ignore[arg-type, union-attr]
        return node.args[0]  # type: ignore[return-value]
    if is_op(node, aten.dropout, aten.native_dropout, aten.feature_dropout) and argument(node, "train") is False:
        return node.args[0]  # type: ignore[return-value]
    if is_op(node, aten.slice):
        whole = argument(node, "start") in (None, 0) and argument(node, "step") == 1
        if whole and (argument(node, "end") in (None, END) or same_shape(node, node.args[0])):  # type: ignore[arg-type]
            return node.args[0]  # type: ignore[return-value]
    same_kind = is_op(node, aten.to, aten._to_copy, aten.expand, aten.type_as)
    if same_kind and same_shape(node, node.args[0]):  # type: ignore[arg-type]
        new, old = value(node), value(node.args[0])
        return node.args[0] if (new.dtype, new.device) == (old.dtype, old.device) else None  # type: ignore[return-value]
    return None


def fold_constant(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """Compute what depends on no input: small constants, and of weights what is computed and takes no more room than they
    do, such as a normalised table or a graph convolution's sums over neighbours. A product may take four times their room,
    since it costs more than it to read. Views of weights and look-ups in them stay.
    """
    source: Any = node.args[0] if node.target is operator.getitem else node
    if source.op != "call_function" or not isinstance(source.target, torch._ops.OpOverload):
        return None
    if source.target.namespace != "aten" or torch.Tag.nondeterministic_seeded in source.target.tags:
        return None
    result, inputs = value(node), source.all_input_nodes
    if not isinstance(result, torch.Tensor) or not all(static(s) for s in result.shape):
        return None
    tensors = [attribute(edit.module, n) for n in inputs]
    if any(t is None for t in tensors):
        return None
    known: dict[fx.Node, torch.Tensor] = dict(zip(inputs, tensors, strict=True))  # type: ignore[arg-type]
    small = all(size <= FOLD_BYTES for size in map(bytes_of, (result, *known.values())))
    if not small or any(isinstance(t, torch.nn.Parameter) for t in known.values()):
        computed = known and not source.target.is_view and not is_op(source, *UNCOMPUTED)
        room = sum(map(bytes_of, known.values())) * (WIDER if is_op(source, *PRODUCTS) else 1)
        if not computed or bytes_of(result) > max(room, FOLD_BYTES):
            return None
    args, kwargs = (fx.map_arg(part, lambda n: known[n]) for part in (source.args, source.kwargs))
    with torch.no_grad():
        folded = source.target(*args, **kwargs)
        folded = folded[node.args[1]] if source is not node else folded
    return edit.parameter("constant", folded.detach().clone().contiguous())


def view_of_constant(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """Another shape of a constant, or its rows `a..b`, is a constant that shares its storage.

    Layers stacked in one parameter are read this way, and biases stored as columns.
    """
    views = (aten.view, aten.reshape, aten.flatten, aten.squeeze, aten.unsqueeze)
    if not is_op(node, aten.select, aten.slice, *views) or not all(static(s) for s in shape(node)):
        return None
    if is_op(node, aten.select, aten.slice) and argument(node, "dim") != 0:
        return None
    tensor = attribute(edit.module, node.args[0])
    if tensor is None or not tensor.is_contiguous() or any(isinstance(a, fx.Node) for a in node.args[1:]):
        return None
    with torch.no_grad():
        part = node.target(tensor.detach(), *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return edit.parameter(f"{node.args[0].name}_part", part) if part.is_contiguous() else None  # type: ignore[union-attr]


def canonical_reshape(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """view, flatten, squeeze, unsqueeze and chains of them: one reshape, with -1 for the only symbolic size.

    No view stays, which could not read what a dropped copy had made contiguous.
    """
    if node.target is aten.view.dtype or not is_op(
        node, aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.squeeze, aten.unsqueeze, aten.unflatten
    ):
        return None
    source: Any = node.args[0]
    # A view may know more of its sizes than their product tells: [s] as [2, s // 2] and back is [2 * (s // 2)].
    if is_op(source, aten.reshape) and same_size(value(source.args[0]).numel(), value(node).numel()):
        source = source.args[0]
    if same_shape(node, source):
        return source
    sizes = inferred_sizes(shape(node))
    if sizes is None and is_op(node, aten.view, aten._unsafe_view):
        return edit.call(aten.reshape.default, *node.args)
    if sizes is None or (is_op(node, aten.reshape) and list(node.args[1]) == sizes and source is node.args[0]):  # type: ignore[arg-type]
        return None
    if is_op(node, aten.unsqueeze, aten.squeeze) and len(shape(node)) == 0:
        return None
    return edit.call(aten.reshape.default, source, sizes)


def one_cast(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """A cast to another dtype that changes nothing else has one form."""
    if not is_op(node, aten._to_copy) or set(node.kwargs) != {"dtype"} or node.kwargs["dtype"] is None:
        return None
    return edit.call(aten.to.dtype, node.args[0], node.kwargs["dtype"])


def one_hot_product(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """one_hot(ids) @ W reads rows of W: an embedding."""
    if not is_op(node, aten.linear) or node.args[0] is None or argument(node, "bias") is not None:
        return None
    hot: Any = node.args[0]
    while is_op(hot, aten.to, aten._to_copy):
        hot = hot.args[0]
    tensor = attribute(edit.module, node.args[1])
    if not is_op(hot, aten.one_hot) or tensor is None or not same_size(shape(hot)[-1], tensor.shape[1]):
        return None
    table = edit.parameter("one_hot_table", tensor.detach().t().contiguous())
    return edit.call(aten.embedding.default, table, hot.args[0])


def gather_to_embedding(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """index_select(W, 0, ids) and W[ids] of a two-dimensional constant: an embedding."""
    if is_op(node, aten.index_select) and argument(node, "dim") == 0:
        table, ids = node.args[0], node.args[2]
    elif is_op(node, aten.index) and len(node.args[1]) == 1:  # type: ignore[arg-type]
        table, ids = node.args[0], node.args[1][0]  # type: ignore[index]
    else:
        return None
    tensor = attribute(edit.module, table)
    if (
        tensor is None
        or tensor.dim() != 2
        or not tensor.is_floating_point()
        or value(ids).dtype not in (torch.int32, torch.int64)
    ):
        return None
    if constant_list(edit.module, ids) is not None or (is_op(node, aten.index) and negative_possible(ids)):
        return None
    return edit.call(aten.embedding.default, table, ids)


def step_in_a_list(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """x[:, [-1]], by which the dimension of the steps is kept: a slice of one."""
    if not is_op(node, aten.index):
        return None
    read = [(dim, index) for dim, index in enumerate(node.args[1]) if index is not None]  # type: ignore[arg-type]
    if len(read) != 1 or value(read[0][1]).dtype not in (torch.int32, torch.int64) or value(read[0][1]).dim() != 1:
        return None
    dim, index = read[0]
    steps, size = constant_list(edit.module, index), shape(node.args[0])[dim]  # type: ignore[arg-type]
    if steps is None or len(steps) != 1 or not static(size) or not -size <= steps[0] < size:
        return None
    return edit.call(aten.slice.Tensor, node.args[0], dim, steps[0] % size, steps[0] % size + 1)


def limited_rows(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """Rows of a table brought to at most `max_norm` where they are looked up: a table brought there once.

    The operator copies the whole table at each call. Only the rows that it names are read, and bringing one there twice
    changes nothing.
    """
    if not is_op(node, aten.embedding_renorm):
        return None
    table, ids, *limits = node.args
    tensor = attribute(edit.module, table)

    def reads_these(user: fx.Node) -> bool:
        if is_op(user, aten.embedding_renorm):
            return user.args[0] is node and list(user.args[2:]) == limits
        looks_up = is_op(
            user, aten.embedding, aten.embedding_bag, aten._embedding_bag, aten._embedding_bag_forward_only
        )
        return looks_up and user.args[0] is node and same_ids(user.args[1], ids)

    if tensor is None or not all(reads_these(user) for user in node.users):
        return None
    with torch.no_grad():
        limited = torch.embedding_renorm_(tensor.detach().clone(), torch.arange(len(tensor)), *limits)
    if torch.equal(limited, tensor):
        return table  # type: ignore[return-value]
    return edit.parameter("limited_table", limited)


def same_ids(a: Any, b: Any) -> bool:
    """Whether two nodes hold the same ids, in whichever shape."""
    shapes = (aten.reshape, aten.view, aten.flatten, aten.squeeze, aten.unsqueeze, aten.clone, aten.contiguous)
    while is_op(a, *shapes):
        a = a.args[0]
    while is_op(b, *shapes):
        b = b.args[0]
    return a is b


def rows_in_order(edit: Rewriter, node: fx.Node) -> fx.Node | None:
    """embedding(W, arange(n)) is W, or its first n rows: all items of a catalogue, all positions of a history."""
    if not is_op(node, aten.embedding):
        return None
    table, ids = attribute(edit.module, node.args[0]), node.args[1]
    if table is None or not table.is_contiguous() or not all(static(size) for size in shape(node)):
        return None
    count, told = int(value(ids).numel()), attribute(edit.module, ids)
    if told is not None:
        ordered = count <= len(table) and torch.equal(told.flatten(), torch.arange(count, dtype=told.dtype))
    else:
        names = [entry.name for entry in ids.target._schema.arguments] if is_op(ids, aten.arange) else []  # type: ignore[union-attr]
        begins = "start" not in names or argument(ids, "start") == 0  # type: ignore[arg-type]
        ordered = bool(names) and begins and ("step" not in names or argument(ids, "step") == 1) and count <= len(table)  # type: ignore[arg-type]
    if not ordered:
        return None
    rows: Any = node.args[0] if count == len(table) else edit.parameter("first_rows", table.detach()[:count])
    return rows if value(ids).dim() == 1 else edit.reshape(rows, *shape(node))


def negative_possible(ids: fx.Node) -> bool:
    """Indexing wraps negative ids where an embedding refuses them; only plain inputs are taken to be ids."""
    while is_op(ids, aten.reshape, aten.slice, aten.select, aten.to, aten._to_copy, aten.cat):
        ids = ids.args[0] if not isinstance(ids.args[0], (list, tuple)) else ids.args[0][0]  # type: ignore[assignment]
    return ids.op != "placeholder"


RULES: tuple[Rule, ...] = (
    drop_alias,
    one_name,
    composite,
    fold_constant,
    view_of_constant,
    canonical_reshape,
    repeat_of_one,
    repeat_of_rows,
    one_cast,
    pairs_of_loop,
    pairs_of_cats,
    sum_of_loop,
    pieces_across,
    stack_to_cat,
    flatten_cat,
    cat_of_pieces,
    piece_of_cat,
    one_product,
    multiply_add,
    column_arithmetic,
    bias_of_linear,
    activated_layers,
    weighted_sum,
    norm_after_linear,
    norm_before_linear,
    one_column,
    one_transpose,
    square,
    drop_zero,
    one_hot_product,
    gather_to_embedding,
    step_in_a_list,
    rows_in_order,
    limited_rows,
)
