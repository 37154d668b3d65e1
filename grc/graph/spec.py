"""What a legal graph is. Every rule is checked after every pass, so that a fault is named where it was made."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from grc.errors import SpecError
from grc.graph.match import same_size
from grc.graph.rewrite import fake_mode, infer, is_impure

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def verify(module: fx.GraphModule, widest: int = 8) -> None:
    """Raise SpecError, naming the node and its neighbours, unless

    - every node is a placeholder, a constant, a call of an operator or the output, in topological order;
    - every value is read by someone, and every constant exists;
    - the recorded value of each node is what its operator infers from its arguments;
    - no floating-point value is wider than `widest` bytes, the widest of the source;
    - no operator writes into its arguments.
    """
    mode = fake_mode(module)
    seen: set[fx.Node] = set()
    for node in module.graph.nodes:
        for argument in node.all_input_nodes:
            if argument not in seen:
                raise fault(node, f"reads {argument.name} before it is made")
        seen.add(node)
        if node.op == "output":
            continue
        if node.op not in ("placeholder", "get_attr", "call_function"):
            raise fault(node, f"is a {node.op}; only calls of operators are legal")
        if not node.users and node.op == "call_function" and not is_impure(node):
            raise fault(node, "is read by no one")
        if "val" not in node.meta:
            raise fault(node, "has no recorded value")
        check_target(node)
        check_width(node, widest)
        check_value(module, node, mode)


def check_target(node: fx.Node) -> None:
    if node.op != "call_function":
        return
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        raise fault(node, "writes into its arguments")


def check_width(node: fx.Node, widest: int) -> None:
    value = node.meta["val"]
    if isinstance(value, torch.Tensor) and value.dtype in FLOATS and value.dtype.itemsize > widest:
        raise fault(node, f"is {value.dtype}, wider than anything in the source")


def check_value(module: fx.GraphModule, node: fx.Node, mode: Any) -> None:
    """Infer again and compare, once for each form that a node takes."""
    if node.op != "call_function" or isinstance(node.target, torch._ops.HigherOrderOperator):
        return
    form = f"{node.target}{node.args}{node.kwargs}"
    if node.meta.get("verified") == form:
        return
    try:
        inferred = infer(module, node, mode)
    except Exception as error:
        raise fault(node, f"can't be inferred: {error}") from error
    if not agree(node.meta["val"], inferred):
        raise fault(node, f"is recorded as {node.meta['val']} and infers as {inferred}")
    node.meta["verified"] = form


def agree(recorded: Any, inferred: Any) -> bool:
    if isinstance(recorded, torch.Tensor):
        return (
            isinstance(inferred, torch.Tensor)
            and recorded.dtype == inferred.dtype
            and recorded.dim() == inferred.dim()
            and all(sizes_agree(a, b) for a, b in zip(recorded.shape, inferred.shape, strict=True))
        )
    if isinstance(recorded, (tuple, list)):
        return len(recorded) == len(inferred) and all(map(agree, recorded, inferred))
    return True


def sizes_agree(a: Any, b: Any) -> bool:
    if same_size(a, b):
        return True
    if isinstance(a, int) and isinstance(b, int):
        return False
    return any(isinstance(s, torch.SymInt) and has_data_symbol(s) for s in (a, b)) or not definitely_differ(a, b)


def has_data_symbol(size: torch.SymInt) -> bool:
    """Sizes that depend on data (nonzero) get a new symbol at each inference."""
    return any(str(s).startswith("u") for s in size.node.expr.free_symbols)


def definitely_differ(a: Any, b: Any) -> bool:
    import sympy

    left = a.node.expr if isinstance(a, torch.SymInt) else sympy.Integer(a)
    right = b.node.expr if isinstance(b, torch.SymInt) else sympy.Integer(b)
    difference = sympy.simplify(left - right)
    return bool(difference.is_number and difference != 0) or not difference.equals(0)


def widest_float(module: fx.GraphModule) -> int:
    """Bytes of the widest floating-point value in a graph."""
    values = [n.meta.get("val") for n in module.graph.nodes]
    return max(
        (v.dtype.itemsize for v in values if isinstance(v, torch.Tensor) and v.dtype in FLOATS),
        default=4,
    )


def fault(node: fx.Node, what: str) -> SpecError:
    near = [n.format_node() or n.name for n in [*node.all_input_nodes[:3], node, *list(node.users)[:3]]]
    lines = "\n  ".join(str(line) for line in near)
    return SpecError(f"node {node.name} {what}\n  {lines}", "this is a defect in a pass: report it with --print-after")
