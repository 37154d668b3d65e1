"""Make ids outside of their tables safe inside the graph, so that every engine answers them alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from grc.errors import GrcError, PassError
from grc.graph.jagged import ended
from grc.graph.lookups import NO_PADDING
from grc.graph.match import argument, aten, call_arguments, is_op, shape, value
from grc.graph.rewrite import Rewriter
from grc.options import BadIdPolicy, Options
from grc.passes.manager import Change, Pass, Record


@dataclass(frozen=True)
class GuardIds(Pass):
    """zero: a bad id reads a row of zeros; clamp: the nearest row; hash: the id modulo the table's rows."""

    name = "guard-ids"
    policy: BadIdPolicy = "zero"

    def run(self, graph: fx.GraphModule) -> list[Change]:
        edit = Rewriter(graph)
        changes = []
        for node in list(graph.graph.nodes):
            if getattr(node.target, "namespace", "") == "grc" and "ids" in [
                a.name for a in node.target._schema.arguments
            ]:  # type: ignore[union-attr]
                with edit.at(node):
                    guard_fused(edit, node, self.policy)
                changes.append(Change(f"{self.policy} in {node.name}"))
            elif is_op(node, aten.embedding):
                with edit.at(node):
                    guard_embedding(edit, node, self.policy)
                changes.append(Change(f"{self.policy} in {node.name}"))
        edit.finish()
        return changes


def check_enabled(options: Options) -> None:
    """Raises GrcError where the pass is disabled that a policy for bad ids needs."""
    if options.on_bad_id != "error" and GuardIds.name in options.disable:
        raise GrcError(
            f"--on-bad-id {options.on_bad_id} is what the pass {GuardIds.name} does, which is disabled",
            f"leave out --on-bad-id, or --disable {GuardIds.name}",
        )


def check_guarded(records: Sequence[Record], options: Options) -> None:
    """Raises PassError where the ids that a policy is for would be read as they are."""
    guards, policy = [record for record in records if record.name == GuardIds.name], options.on_bad_id
    if policy != "error" and options.bisect_limit is not None and not guards:
        raise PassError(
            f"--bisect-limit ends before the pass {GuardIds.name}, which --on-bad-id {policy} needs",
            "bisect without --on-bad-id",
        )
    for record in guards:
        if record.rolled_back:
            raise PassError(
                f"pass {record.name}: {record.rolled_back}", f"leave out --on-bad-id {policy}: requests are checked"
            )


def guard_fused(edit: Rewriter, node: fx.Node, policy: BadIdPolicy) -> None:
    """Rewrite the ids of a fused op; for zero, bad ids become padding."""
    given = call_arguments(node)
    ids, rows, padding = given["ids"], list(given["rows"]), list(given["padding"])
    lengths = given.get("lengths") or [1] * len(rows)
    # Padding may lie outside of the table and must stay what it is; 0, which every policy leaves alone, where there is none.
    kept = [0 if p == NO_PADDING else p for p in padding]
    if policy == "zero":
        padding = [-1 if p == NO_PADDING else p for p in padding]
    wanted = [rows, kept, padding] if policy == "zero" else [rows, kept]
    if given.get("offsets") is None:
        spread = [row_constant(edit, values, lengths, value(ids).dtype) for values in wanted]
    else:
        spread = spread_jagged(edit, ids, given["offsets"], wanted)
    safe = guarded(edit, ids, spread[0], spread[-1], policy)
    if any(kept):
        name = aten.eq.Scalar if isinstance(spread[1], int) else aten.eq.Tensor
        safe = edit.call(aten.where.self, edit.call(name, ids, spread[1]), ids, safe)
    given["ids"], given["padding"] = safe, padding
    node.args = tuple(given.values())


def row_constant(edit: Rewriter, values: list[int], lengths: list[int], dtype: torch.dtype) -> int | fx.Node:
    if len(set(values)) == 1:
        return values[0]
    spread = [v for v, n in zip(values, lengths, strict=True) for _ in range(n)]
    return edit.parameter("id_limits", torch.tensor(spread, dtype=dtype))


def spread_jagged(
    edit: Rewriter, ids: fx.Node, offsets: fx.Node, wanted: Sequence[Sequence[int]]
) -> list[int | fx.Node]:
    """For each list of a number a feature, the number of each value, by the feature whose bag it lies in."""
    if all(len(set(values)) == 1 for values in wanted):
        return [values[0] for values in wanted]
    features = len(wanted[0])
    feature = edit.inline(lambda ids, offsets: feature_of(ids, offsets, features), ids, offsets)

    def spread(values: Sequence[int]) -> int | fx.Node:
        if len(set(values)) == 1:
            return values[0]
        limits = edit.parameter("id_limits", torch.tensor(values, dtype=value(ids).dtype))
        return edit.call(aten.index_select.default, limits, 0, feature)

    return [spread(values) for values in wanted]


def feature_of(ids: torch.Tensor, offsets: torch.Tensor, features: int) -> torch.Tensor:
    """Which feature each of the values [V] belongs to, of the bags of one feature after those of another."""
    bag = ended(offsets[1:].to(torch.int64), torch.arange(ids.shape[0], device=ids.device))
    batch = (offsets.shape[0] - 1) // features
    return (bag // batch).clamp(0, features - 1)


def guarded(edit: Rewriter, ids: fx.Node, rows: Any, pad: Any, policy: BadIdPolicy) -> fx.Node:
    tensor = isinstance(rows, fx.Node)
    if policy == "hash":
        return edit.call(aten.remainder.Tensor if tensor else aten.remainder.Scalar, ids, rows)
    if policy == "clamp":
        low = edit.call(aten.clamp.default, ids, 0)
        if tensor:
            return edit.call(aten.minimum.default, low, edit.call(aten.sub.Tensor, rows, 1))
        return edit.call(aten.clamp.default, low, None, rows - 1)
    bad = outside(edit, ids, rows)
    if not isinstance(pad, fx.Node):
        return edit.call(aten.masked_fill.Scalar, ids, bad, pad)
    return edit.call(aten.where.self, bad, pad, ids)


def outside(edit: Rewriter, ids: fx.Node, rows: Any) -> fx.Node:
    high = edit.call(aten.ge.Tensor if isinstance(rows, fx.Node) else aten.ge.Scalar, ids, rows)
    return edit.call(aten.logical_or.default, edit.call(aten.lt.Scalar, ids, 0), high)


def guard_embedding(edit: Rewriter, node: fx.Node, policy: BadIdPolicy) -> None:
    """A look-up that was not merged; for zero, its rows are cleared after the read."""
    table, ids = node.args[:2]
    rows = int(shape(table)[0])  # type: ignore[arg-type]
    padding = argument(node, "padding_idx")
    rest = (padding,) if padding != -1 else ()
    if policy != "zero":
        node.args = (table, guarded(edit, ids, rows, None, policy), *rest)  # type: ignore[arg-type]
        return
    bad = outside(edit, ids, rows)  # type: ignore[arg-type]
    safe = edit.call(aten.masked_fill.Scalar, ids, bad, 0)
    found = edit.call(aten.embedding.default, table, safe, *rest)
    column = edit.call(aten.unsqueeze.default, bad, -1)
    cleared = edit.call(aten.masked_fill.Scalar, found, column, 0)
    edit.replace(node, cleared)
