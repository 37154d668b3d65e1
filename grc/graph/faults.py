"""What can be wrong with an export: found by running it beside the model, and said in the user's terms."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx

from grc.errors import first_line, message_of
from grc.graph.oracle import largest_error, run_fp64
from grc.graph.sizes import Size

if TYPE_CHECKING:
    from grc.graph.capture import Source

UNSEEN = (4, 13)
TRIED = (*range(2, 65), 128, 256, 512, 1024)  # where a guard such as `batch != 64` or `batch % 8 != 0` may not hold
NOISE = 1e-5  # below this, two orders of summation in float32 differ too
# How far apart a model and its export may be, in roundings of the coarsest dtype: its own kernels may sum in another order.
ROUNDINGS = 4


@torch.no_grad()
def find_fault(source: Source) -> str | None:
    """Why the graph does not stand for the model, or None.

    A graph that is right but for a single row has its smallest batch set to 2: the runtime repeats the row.
    """
    regions = [n.target for n in source.graph.graph.nodes if isinstance(n.target, torch._ops.HigherOrderOperator)]
    if regions:
        return f"forward calls torch.{regions[0].name()}, which runs graphs of its own"
    for batch in (*UNSEEN, *other_paths(source)) if source.dynamic else (source.example_batch,):
        fault = fault_at(source, batch)
        if fault is not None:
            return fault
    if source.min_batch == 1 and source.dynamic and fault_at(source, 1) is not None:
        source.min_batch = 2
        source.notes.append("the export does not take batch 1; a single row is padded to two")
        return padding_fault(source)
    return None


def other_paths(source: Source) -> list[int]:
    """Batch sizes at which forward may take another path than the one that was traced, one for each guard on the batch."""
    found: set[int] = set()
    for node, sizes in zip(source.placeholders(), source.sizes, strict=True):
        for size, traced in zip(sizes, node.meta["val"].shape, strict=True):
            if (size.scale, size.offset) != (1, 0) or isinstance(traced, int) or not traced.node.expr.is_symbol:
                continue
            symbol, env = traced.node.expr, traced.node.shape_env
            bounds = env.bound_sympy(symbol)  # beyond them, requests are refused
            for guard in env.guards:
                if guard.expr.free_symbols == {symbol}:
                    other = (b for b in TRIED if bounds.lower <= b <= bounds.upper and not guard.expr.subs(symbol, b))
                    found.update(itertools.islice(other, 1))
    return sorted(found)


def fault_at(source: Source, batch: int) -> str | None:
    inputs = source.inputs(batch)
    try:
        answers = list(source.graph.forward(*inputs))  # a call would print what it raises
    except Exception as error:  # whatever the operators of the graph raise
        return f"the export was specialised: it fails at batch {batch} ({message_of(error)})"
    expected = source.eager(batch)
    if any(isinstance(a, (int, float)) for a in answers):
        return "an output is a number that follows the sizes of the request"
    if any(type(a) not in (torch.Tensor, torch.nn.Parameter) for a in answers):
        return ESCAPED
    if len(answers) != len(expected):
        return f"the export gives {len(answers)} outputs, the model {len(expected)}"
    for answer, wanted in zip(answers, expected, strict=True):
        if answer.dtype != wanted.dtype:
            return f"the export answers in {answer.dtype}, the model in {wanted.dtype}"
    apart, enough = largest_error(answers, expected), noise(source.graph)
    if apart <= enough:
        return None
    if largest_error(answers, list(source.graph.forward(*inputs))) > enough:
        return RANDOM
    if largest_error(answers, list(run_fp64(source.graph, *inputs))) < apart / 2:
        return f"the export answers differently at batch {batch} (error {apart:.1e}): it was specialised or is random"
    return None


def padding_fault(source: Source) -> str | None:
    """Whether one row, repeated, has the model's answer for that row."""
    if any(not size.constant and (size.scale, size.offset) != (1, 0) for sizes in source.sizes for size in sizes):
        return None
    inputs = [resized(t, sizes, 2) for t, sizes in zip(source.inputs(1), source.sizes, strict=True)]
    answers = [resized(a, sizes, 1) for a, sizes in zip(source.graph(*inputs), source.out_sizes, strict=True)]
    error = largest_error(answers, source.eager(1))
    far = error >= max(10 * NOISE, noise(source.graph))
    return f"the export answers differently at batch 1 (error {error:.1e})" if far else None


def noise(graph: fx.GraphModule) -> float:
    """How far apart two orders of the same sums may be in the dtypes of a graph."""
    made = (node.meta.get("val") for node in graph.graph.nodes)
    dtypes = {t.dtype for t in made if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype.itemsize == 2}
    return max([NOISE, *(ROUNDINGS * torch.finfo(dtype).eps for dtype in dtypes)])


def resized(tensor: torch.Tensor, sizes: Sequence[Size], batch: int) -> torch.Tensor:
    """The first `batch` rows, the last one repeated where there are fewer."""
    for dim, size in enumerate(sizes):
        if (size.scale, size.offset) == (1, 0):
            tensor = tensor.index_select(dim, torch.arange(batch).clamp(max=tensor.shape[dim] - 1))
    return tensor


TO_LONGEST = "the model's answer for a row depends on the longest row beside it, to which pad_packed_sequence pads"
RANDOM = "forward draws random numbers, which the model seeds for itself and an export draws anew at every call"
ESCAPED = "a value is computed by numpy or Python, where no export can follow it"
SPARSE_HINT = (
    "add up each row's neighbours instead: torch.zeros_like(x).index_add(0, rows, weights[:, None] * x[columns])"
)


def explain(error: Exception) -> str:
    """What is wrong in the user's terms."""
    text, frames = str(error), traceback.extract_tb(error.__traceback__)
    if "batch sizes of a packed sequence" in text:
        return "forward loops over the batch sizes of a packed sequence, which differ from request to request"
    if "data-dependent" in text or "GuardOnDataDependent" in type(error).__name__ or "unbacked" in text.lower():
        if any("one_hot(" in (frame.line or "") for frame in frames):
            return "one_hot counts its classes in the values of a tensor"
        return "control flow depends on the values of a tensor"
    if "NotImplementedType" in text:
        return "an operator here has no form that can be traced, as a sum of sparse tensors has none"
    if "aten._sparse" in text or ("UnsupportedOperator" in type(error).__name__ and "aten.mm" in text):
        return "a sparse tensor is multiplied with what a request brings"
    if ".numpy() is not supported" in text or "fake tensor in the exported program" in text:
        return ESCAPED
    if "Constraints violated" in text or "specialized" in text.lower():
        return f"a size that should vary was fixed ({message_of(error)})"
    return first_line(error)


def hint_for(reason: str) -> str:
    if "packed sequence" in reason:
        return "loop over all steps, and keep the state where a row has ended: torch.where((t < lengths)[:, None], new, state)"
    if reason == TO_LONGEST:
        return "give it total_length=x.size(1)"
    if "sparse tensor" in reason:
        return SPARSE_HINT
    if "one_hot" in reason:
        return "give it num_classes=, the number of rows that the ids may have"
    if reason == RANDOM:
        return "draw them once in __init__, and keep them with self.register_buffer"
    if "graphs of its own" in reason:
        return "compute both answers and choose with torch.where, or write the steps of a loop one after another"
    if "an output is a number" in reason:
        return "return tensors alone: who reads the answer can read its sizes"
    if "control flow" in reason:
        return (
            "use torch.where instead of `if tensor:` and x[torch.arange(len(p)), p] instead of a loop over p, "
            "keep .item() out of forward, and check weights in __init__"
        )
    if "fixed" in reason or "specialised" in reason:
        return (
            "derive sizes from x.shape instead of Python integers, and build no tensor of a fixed batch in forward: "
            "torch.full((len(x),), t) instead of torch.tensor([t] * len(x))"
        )
    if "numpy" in reason:
        return "use torch operations instead of numpy in forward"
    return "see the full error with --traceback"
