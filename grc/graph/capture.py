"""Capture: a model becomes one flat torch.fx graph of aten operators, proven equal to the model.

The export is tried non-strict first, then strict; each is compared with the eager model at batch sizes that the export
did not see, so an export that specialised silently, returned fake tensors or froze a random number is refused here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.export import Dim

from grc.errors import CaptureError, ModelFileError, first_line
from grc.graph.bounds import find_bounds
from grc.graph.faults import TO_LONGEST, explain, find_fault, hint_for
from grc.graph.flat import flat_graph, quiet_export
from grc.graph.model_file import Model, user_line
from grc.graph.packed_sequences import padded_sequences
from grc.graph.sizes import Bound, Size, collection, described, find_sizes, named_by_symbol, named_dims, size_of
from grc.graph.trace import trace
from grc.runtime.inputs import UNBOUNDED
from grc.runtime.structure import Json, fields_of, flatten, is_dataclass, leaf_names

EXPORT_BATCH = 7  # no divisor of a usual layer size, so that a batch and a width are not taken for each other
SAMPLES = (2, 3, 5, 11)  # batch sizes at which the sizes of inputs and outputs are looked at


@dataclass
class Source:
    """A captured model: its graph, its flat inputs at any batch size, and how they nest in the model's signature."""

    model: Model
    graph: fx.GraphModule
    names: list[str]
    sizes: list[tuple[Size, ...]]
    dtypes: list[torch.dtype]
    in_structure: Json
    out_structure: Json
    out_sizes: list[tuple[Size, ...]]
    out_dtypes: list[torch.dtype]
    min_batch: int
    mode: str
    notes: list[str] = field(default_factory=list)
    max_batch: int = UNBOUNDED
    """The largest batch that the trace holds for."""

    def __post_init__(self) -> None:
        self.bounds: list[list[Bound]] = [[] for _ in self.names]

    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.graph.nodes if node.op == "placeholder"]

    def inputs(self, batch: int) -> list[torch.Tensor]:
        args, kwargs = self.model.inputs(batch)
        return flat_tensors((args, kwargs))[0]

    @torch.no_grad()
    def eager(self, batch: int) -> list[torch.Tensor]:
        return called(self.model, batch)[0]

    def eager_runner(self) -> Callable[[int], Any]:
        """The model itself, to be timed: its inputs are made once for each batch."""
        made: dict[int, Any] = {}

        def run(batch: int) -> Any:
            args, kwargs = made.get(batch) or made.setdefault(batch, self.model.inputs(batch))
            return self.model.module(*args, **kwargs)

        return run

    @cached_property
    def dynamic(self) -> bool:
        return any(not size.constant for sizes in self.sizes for size in sizes)

    @property
    def example_batch(self) -> int:
        """The batch size that the graph was exported at."""
        return EXPORT_BATCH

    def shapes(self) -> tuple[dict[int, Any], ...]:
        """`dynamic_shapes` to export the flat graph again."""
        return tuple({i: Dim.DYNAMIC for i, size in enumerate(sizes) if not size.constant} for sizes in self.sizes)

    def described(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Inputs and outputs as the manifest has them."""
        entries = zip(self.names, self.dtypes, self.sizes, self.bounds, strict=True)
        taken = [{"name": name, **described(*entry)} for name, *entry in entries]
        return taken, [described(*entry) for entry in zip(self.out_dtypes, self.out_sizes, strict=True)]

    def proof_batches(self) -> tuple[int, ...]:
        return (3, min(33, self.max_batch)) if self.dynamic else (EXPORT_BATCH, EXPORT_BATCH)


def register_dataclasses(value: Any) -> None:
    """torch.export takes those that are known to its pytrees."""
    if is_dataclass(value):
        if type(value) not in pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(type(value))
        value = fields_of(value)
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ():
        register_dataclasses(part)


def flat_tensors(value: Any) -> tuple[list[torch.Tensor], Json]:
    register_dataclasses(value)
    leaves: list[torch.Tensor] = []
    structure = flatten(value, leaves)
    return leaves, structure


def capture(model: Model) -> Source:
    """Export a model and prove the export.

    Raises CaptureError with the user's own file and line when the model can't be captured as one graph.
    """
    samples = {batch: flat_tensors(model.inputs(batch)) for batch in SAMPLES}
    structure = samples[2][1]
    names = input_names(model, structure)
    if not names:
        raise ModelFileError(
            f"{model.file or model.name}: get_inputs(2) holds no tensor, and a request could bring nothing",
            "give the model tensors: what makes ids of strings and numbers goes into preprocess(request)",
        )
    check_dense(model, names, samples[2][0])
    sizes = find_sizes({b: leaves for b, (leaves, _) in samples.items()}, names)
    smallest = smallest_batch(model)
    check_deterministic(model)
    failures: list[tuple[str, str, Exception | None]] = []
    for mode in ("saved",) if model.program else ("non-strict", "strict"):
        try:
            graph, to_longest = trace(model, model.inputs(EXPORT_BATCH), sizes, mode)
        except Exception as error:  # torch.export raises anything, from UserError to AssertionError
            failures.append((mode, explain(error), error))
            continue
        source = describe(model, graph, names, sizes, structure, smallest, mode)
        fault = find_fault(source)
        if to_longest and fault is not None and "answers differently" in fault:
            fault = TO_LONGEST
        if fault is None:
            source.notes += notes_of_padding(model) if to_longest else []
            if pinned(source):
                unpin(source)
            find_bounds(source)
            if written := [name.removeprefix("model.") for name in graph.meta.pop("written")]:
                source.notes.append(
                    f"forward changes {', '.join(written)}: an artifact keeps it as it was when compiled"
                )
            return source
        failures.append((mode, fault, None))
    mode, reason, cause = failures[0]
    line = (user_line(cause, model.file) if cause else None) or (str(model.file) if model.file else model.name)
    raise CaptureError(f"{line}: {reason}", hint_for(reason)) from cause


def pinned(source: Source) -> bool:
    """Whether the trace recorded one batch size, as it does where forward compares sizes in Python."""
    recorded = [node.meta["val"].shape for node in source.placeholders()]
    return any(
        not size.constant and (isinstance(have, int) or have.node.expr.is_number)
        for shape, sizes in zip(recorded, source.sizes, strict=True)
        for have, size in zip(shape, sizes, strict=True)
    )


def unpin(source: Source) -> None:
    """Export the flat graph once more: what forward does in Python is no longer in it, and passes read the sizes it records."""
    first, inputs = source.graph, source.inputs(EXPORT_BATCH)
    shapes = collection(inputs, source.sizes, named_dims(source.sizes))
    try:
        with torch.no_grad(), quiet_export():
            again = torch.export.export(first, tuple(inputs), dynamic_shapes=shapes, strict=False)
        source.graph = flat_graph(again)
        source.graph.meta = dict(first.meta)
        fault = find_fault(source)
    except Exception as error:  # torch.export raises anything
        fault = first_line(error)
    if fault is not None:
        source.graph = first
        source.notes.append(f"the trace holds for one batch size, and passes that read sizes may be left out: {fault}")


def input_names(model: Model, structure: Json) -> list[str]:
    args, kwargs = structure["tuple"]
    parameters = list(inspect.signature(model.module.forward).parameters.values())
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names: list[str] = []
    for i, part in enumerate(args["tuple"]):
        names += leaf_names(part, positional[i] if i < len(positional) else f"input{i}")
    for key, part in kwargs["dict"].items():
        names += leaf_names(part, key)
    if model.input_names is None:
        return names
    if isinstance(model.input_names, str) or len({*model.input_names}) != len(model.input_names):
        raise ModelFileError(
            f"input_names must be a list of different names, not {model.input_names!r}",
            f"the inputs are {', '.join(names)}",
        )
    if len(model.input_names) != len(names):
        raise ModelFileError(
            f"input_names has {len(model.input_names)} names for {len(names)} inputs",
            f"the inputs are {', '.join(names)}",
        )
    return list(model.input_names)


def describe(
    model: Model,
    graph: fx.GraphModule,
    names: list[str],
    sizes: list[tuple[Size, ...]],
    structure: Json,
    smallest: int,
    mode: str,
) -> Source:
    outputs = {batch: called(model, batch) for batch in SAMPLES}
    free: dict[tuple[int, ...], str] = {}
    out_sizes = []
    for i in range(len(outputs[2][0])):
        shapes = [leaves[i].shape for leaves, _ in outputs.values()]
        if len({len(shape) for shape in shapes}) != 1:
            raise CaptureError(f"output {i} changes its rank with the batch size", "return outputs of one rank")
        out_sizes.append(tuple(size_of([s[d] for s in shapes], list(outputs), free) for d in range(len(shapes[0]))))
    used = [n for n in graph.graph.nodes if n.op == "placeholder"]
    if len(used) != len(names):
        # constants among the inputs are placeholders that nothing reads
        drop_constant_placeholders(graph, model)
    return Source(
        model=model,
        graph=graph,
        names=names,
        sizes=named_by_symbol(sizes, graph),
        dtypes=[t.dtype for t in flat_tensors(model.inputs(2))[0]],
        in_structure=structure,
        out_structure=outputs[2][1],
        out_sizes=out_sizes,
        out_dtypes=[t.dtype for t in outputs[2][0]],
        min_batch=smallest,
        mode=mode,
        notes=nan_notes({batch: leaves for batch, (leaves, _) in outputs.items()}),
    )


def nan_notes(outputs: dict[int, list[torch.Tensor]]) -> list[str]:
    """What is NaN in the model's own answers, which nothing can be compared with.

    Raises CaptureError for an output that holds nothing else.
    """
    notes = []
    for i in range(len(next(iter(outputs.values())))):
        found = {batch: leaves[i].isnan() for batch, leaves in outputs.items() if leaves[i].is_floating_point()}
        held = [batch for batch, nan in found.items() if nan.any()]
        if held and all(nan.all() for nan in found.values()):
            raise CaptureError(
                f"output {i} of the model is NaN throughout, at get_inputs({held[0]}) and every other batch size",
                "mend the model or its get_inputs: no answer can be held against NaN",
            )
        if held:
            notes.append(f"output {i} of the model holds NaN at get_inputs({held[0]}), which was compared with nothing")
    return notes


@torch.no_grad()
def notes_of_padding(model: Model) -> list[str]:
    """What no row of the model's inputs shows: how those are answered that end before the last step."""
    args, kwargs = model.inputs(EXPORT_BATCH)
    with padded_sequences() as to_longest:
        model.module(*args, **kwargs)
    if not all(bool((sequence.lengths == sequence.steps).all()) for sequence in to_longest):
        return []
    return [
        f"pad_packed_sequence has no total_length, and all rows of get_inputs have {to_longest[0].steps} steps: shorter ones "
        "are padded to as many, whoever stands beside them"
    ]


def drop_constant_placeholders(graph: fx.GraphModule, model: Model) -> None:
    leaves = pytree.tree_leaves(model.inputs(EXPORT_BATCH), is_leaf=lambda x: x is None)
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    if len(leaves) != len(placeholders):
        leaves = pytree.tree_leaves(model.inputs(EXPORT_BATCH))
    for leaf, node in zip(leaves, placeholders, strict=False):
        if not isinstance(leaf, torch.Tensor):
            node.replace_all_uses_with(leaf)  # type: ignore[arg-type]
            graph.graph.erase_node(node)
    graph.recompile()


def check_dense(model: Model, names: Sequence[str], leaves: Sequence[torch.Tensor]) -> None:
    for name, leaf in zip(names, leaves, strict=True):
        if leaf.is_nested or leaf.layout is not torch.strided:
            raise ModelFileError(
                f'{model.file or model.name}: input "{name}" is a {layout_of(leaf)} tensor, and kernels read dense ones',
                "give it as dense tensors: x.to_dense(), or values with their offsets",
            )


def layout_of(tensor: torch.Tensor) -> str:
    return "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.").replace("_", " ")


@torch.no_grad()
def check_deterministic(model: Model) -> None:
    again, once = (flat_tensors(model.inputs(3))[0] for _ in range(2))
    if any(not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in zip(again, once, strict=True)):
        raise ModelFileError(
            f"{model.file or model.name}: get_inputs(3) returns other values at each call",
            "seed the generator it draws from; torch, random and numpy.random are seeded already",
        )
    first, second = (called(model, 3)[0] for _ in range(2))
    if not first:
        raise CaptureError(f"{model.file or model.name}: the model returns no tensor", "return what it computes")
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        if a.layout is not torch.strided:
            raise CaptureError(
                f"output {i} of the model is a {layout_of(a)} tensor", "return it as dense: y.to_dense()"
            )
        if a.is_complex():
            raise CaptureError(
                f"output {i} of the model is of complex numbers, which neither an artifact nor a server can answer with",
                "return torch.view_as_real(y), or what of it is read: y.real, y.abs()",
            )
        if not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)):
            raise CaptureError(
                f"output {i} of the model differs between two calls with the same input",
                "remove the randomness from forward: dropout outside nn.Dropout, torch.rand, or a mutated buffer",
            )


@torch.no_grad()
def called(model: Model, batch: int) -> tuple[list[torch.Tensor], Json]:
    """The model's own flat answers, and how they nest. Raises CaptureError with the user's line where it fails."""
    args, kwargs = model.inputs(batch)
    try:
        answers = model.module(*args, **kwargs)
    except Exception as error:  # whatever the user's own code raises
        line = user_line(error, model.file) or (model.file or model.name)
        raise CaptureError(
            f"{line}: the model itself fails on get_inputs({batch}): {type(error).__name__}: {error}",
            "mend the model or its get_inputs",
        ) from error
    return flat_tensors(answers)


def smallest_batch(model: Model) -> int:
    """1, or 2 where the model itself fails on a single row (a bare squeeze() is the usual reason)."""
    model.inputs(1)
    two = called(model, 2)[0]
    try:
        one = called(model, 1)[0]
    except CaptureError:
        return 2
    return 1 if [t.dim() for t in one] == [t.dim() for t in two] else 2
