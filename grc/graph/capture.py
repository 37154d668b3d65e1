"""Capture: a model becomes one flat torch.fx graph of aten operators, proven equal to the model.

The export is tried non-strict first, then strict; each is compared with the eager model at batch sizes that the export did
not see, so an export that specialised silently, returned fake tensors or froze a random number is refused here.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.export import Dim, ShapesCollection

from grc.errors import CaptureError, ModelFileError
from grc.graph.model_file import Model, user_line
from grc.graph.oracle import largest_error, run_fp64
from grc.runtime.structure import Json, flatten, leaf_names

EXPORT_BATCH = 7  # no divisor of a usual layer size, so that a batch and a width are not taken for each other
UNSEEN = (4, 13)


@dataclass(frozen=True)
class Size:
    """One dimension of an input or output: a constant, `scale * batch + offset`, or a free size (`batch` is False)."""

    scale: int = 0
    offset: int = 0
    free: str | None = None

    @property
    def constant(self) -> bool:
        return self.scale == 0 and self.free is None

    def json(self) -> Json:
        if self.free:
            return self.free
        if self.scale == 0:
            return self.offset
        return "batch" if (self.scale, self.offset) == (1, 0) else {"scale": self.scale, "offset": self.offset}


@dataclass
class Source:
    """A captured model: its graph, its flat inputs at any batch size, and how they nest in the model's own signature."""

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

    def inputs(self, batch: int) -> list[torch.Tensor]:
        args, kwargs = self.model.inputs(batch)
        return flat_tensors((args, kwargs))[0]

    @torch.no_grad()
    def eager(self, batch: int) -> list[torch.Tensor]:
        args, kwargs = self.model.inputs(batch)
        return flat_tensors(self.model.module(*args, **kwargs))[0]

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

    def shapes(self) -> tuple[dict[int, Any], ...]:
        """`dynamic_shapes` to export the flat graph again."""
        return tuple({i: Dim.DYNAMIC for i, size in enumerate(sizes) if not size.constant} for sizes in self.sizes)

    def proof_batches(self) -> tuple[int, ...]:
        return (3, 33) if self.dynamic else (EXPORT_BATCH, EXPORT_BATCH)


def flat_tensors(value: Any) -> tuple[list[torch.Tensor], Json]:
    leaves: list[torch.Tensor] = []
    structure = flatten(value, leaves)
    return leaves, structure


def capture(model: Model) -> Source:
    """Export a model and prove the export.

    Raises CaptureError with the user's own file and line when the model can't be captured as one graph.
    """
    samples = {batch: flat_tensors(model.inputs(batch)) for batch in (2, 3, 5)}
    structure = samples[2][1]
    names = input_names(model, structure)
    sizes = find_sizes({b: leaves for b, (leaves, _) in samples.items()}, names)
    check_deterministic(model)
    smallest = smallest_batch(model)
    failures: list[tuple[str, str, Exception | None]] = []
    for mode in ("saved",) if model.program else ("non-strict", "strict"):
        try:
            graph = flat_graph(export(model, sizes, mode))
        except Exception as error:  # torch.export raises anything, from UserError to AssertionError
            failures.append((mode, explain(error, model), error))
            continue
        source = describe(model, graph, names, sizes, structure, smallest, mode)
        fault = find_fault(source)
        if fault is None:
            return source
        failures.append((mode, fault, None))
    mode, reason, cause = failures[0]
    line = (user_line(cause, model.file) if cause else None) or (str(model.file) if model.file else model.name)
    raise CaptureError(f"{line}: {reason}", hint_for(reason)) from cause


def input_names(model: Model, structure: Json) -> list[str]:
    args, kwargs = structure["tuple"]
    import inspect

    parameters = [p for p in inspect.signature(model.module.forward).parameters.values()]
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names: list[str] = []
    for i, part in enumerate(args["tuple"]):
        names += leaf_names(part, positional[i] if i < len(positional) else f"input{i}")
    for key, part in kwargs["dict"].items():
        names += leaf_names(part, key)
    if model.input_names is None:
        return names
    if len(model.input_names) != len(names):
        raise ModelFileError(
            f"input_names has {len(model.input_names)} names for {len(names)} inputs",
            f"the inputs are {', '.join(names)}",
        )
    return list(model.input_names)


def find_sizes(samples: dict[int, list[torch.Tensor]], names: Sequence[str]) -> list[tuple[Size, ...]]:
    """Tell constant sizes from those that follow the batch and those that vary on their own (jagged values)."""
    counts = {len(leaves) for leaves in samples.values()}
    if len(counts) != 1:
        raise ModelFileError(
            "get_inputs(batch) returns different numbers of tensors at different batch sizes",
            "return the same structure for every batch size",
        )
    found: list[tuple[Size, ...]] = []
    free: dict[tuple[int, ...], str] = {}
    for i, name in enumerate(names):
        shapes = [leaves[i].shape for leaves in samples.values()]
        if len({len(shape) for shape in shapes}) != 1:
            raise ModelFileError(f"input {name} changes its rank with the batch size", "return tensors of one rank")
        found.append(tuple(size_of([s[d] for s in shapes], list(samples), free) for d in range(len(shapes[0]))))
    return found


def size_of(sizes: Sequence[int], batches: Sequence[int], free: dict[tuple[int, ...], str]) -> Size:
    if len(set(sizes)) == 1:
        return Size(offset=sizes[0])
    scale, rest = divmod(sizes[1] - sizes[0], batches[1] - batches[0])
    offset = sizes[0] - scale * batches[0]
    if rest == 0 and scale > 0 and all(s == scale * b + offset for s, b in zip(sizes, batches, strict=True)):
        return Size(scale=scale, offset=offset)
    return Size(free=free.setdefault(tuple(sizes), f"n{len(free)}"))


@contextmanager
def quiet_export() -> Iterator[None]:
    """torch.export logs and warns about its own workings; what matters is raised as a CaptureError instead."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.fx", "torch._dynamo", "torch._export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def export(model: Model, sizes: list[tuple[Size, ...]], mode: str) -> torch.export.ExportedProgram:
    if model.program is not None:
        return model.program
    args, kwargs = model.inputs(EXPORT_BATCH)
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    strict = mode == "strict"
    with torch.no_grad(), quiet_export():
        try:
            shapes = collection(leaves, sizes, named_dims(sizes))
            return torch.export.export(model.module, args, kwargs, dynamic_shapes=shapes, strict=strict)
        except Exception as first:  # constraints between sizes: let the exporter find them
            if not any(not size.constant for dims in sizes for size in dims):
                raise
            shapes = collection(leaves, sizes, None)
            try:
                return torch.export.export(model.module, args, kwargs, dynamic_shapes=shapes, strict=strict)
            except Exception:
                raise first from None


def named_dims(sizes: list[tuple[Size, ...]]) -> dict[str, Any]:
    dims = {"batch": Dim("batch", min=1)}
    for dim in {size.free for dims_ in sizes for size in dims_ if size.free}:
        dims[dim] = Dim(dim)
    return dims


def collection(
    leaves: Sequence[torch.Tensor], sizes: list[tuple[Size, ...]], dims: dict[str, Any] | None
) -> ShapesCollection | None:
    shapes = ShapesCollection()
    dynamic = False
    for leaf, tensor_sizes in zip(leaves, sizes, strict=True):
        spec: dict[int, Any] = {}
        for i, size in enumerate(tensor_sizes):
            if size.constant:
                continue
            if dims is None:
                spec[i] = Dim.AUTO
            elif size.free:
                spec[i] = dims[size.free]
            else:
                dim = dims["batch"] if size.scale == 1 else size.scale * dims["batch"]
                spec[i] = dim + size.offset if size.offset else dim
        if spec:
            dynamic = True
            shapes[leaf] = spec
    return shapes if dynamic else None


def flat_graph(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program in unlifted form, with flat inputs and a flat tuple of outputs."""
    with quiet_export():
        module = program.run_decompositions({}).module(check_guards=False)
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    inline_regions(module)
    tensors_only(graph)
    flat = fx.GraphModule(module, graph)
    flat.recompile()
    return flat


def inline_regions(module: fx.GraphModule) -> None:
    """Replace `with torch.no_grad():` and autocast regions, which export keeps as submodules, by their bodies."""
    wrappers = {torch.ops.higher_order.wrap_with_set_grad_enabled: 1, torch.ops.higher_order.wrap_with_autocast: 4}
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in wrappers:
            continue
        skip = wrappers[node.target]
        body: fx.GraphModule = getattr(module, node.args[skip].target)
        mapping = dict(zip([n for n in body.graph.nodes if n.op == "placeholder"], node.args[skip + 1 :], strict=True))
        with module.graph.inserting_before(node):
            results = module.graph.graph_copy(body.graph, mapping)
        results = results if isinstance(results, (tuple, list)) else (results,)
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()


def tensors_only(graph: fx.Graph) -> None:
    """Outputs that are constants live in the structure, not in the graph."""
    output = next(iter(reversed(graph.nodes)))
    leaves = pytree.tree_leaves(output.args[0])
    output.args = (tuple(leaf for leaf in leaves if isinstance(leaf, fx.Node)),)


def describe(
    model: Model,
    graph: fx.GraphModule,
    names: list[str],
    sizes: list[tuple[Size, ...]],
    structure: Json,
    smallest: int,
    mode: str,
) -> Source:
    outputs = {}
    for batch in (2, 3, 5):
        args, kwargs = model.inputs(batch)
        with torch.no_grad():
            outputs[batch] = flat_tensors(model.module(*args, **kwargs))
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
        sizes=sizes,
        dtypes=[t.dtype for t in flat_tensors(model.inputs(2))[0]],
        in_structure=structure,
        out_structure=outputs[2][1],
        out_sizes=out_sizes,
        out_dtypes=[t.dtype for t in outputs[2][0]],
        min_batch=smallest,
        mode=mode,
    )


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


@torch.no_grad()
def check_deterministic(model: Model) -> None:
    args, kwargs = model.inputs(3)
    first, second = (flat_tensors(model.module(*args, **kwargs))[0] for _ in range(2))
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        if not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)):
            raise CaptureError(
                f"output {i} of the model differs between two calls with the same input",
                "remove the randomness from forward: dropout outside nn.Dropout, torch.rand, or a mutated buffer",
            )


@torch.no_grad()
def smallest_batch(model: Model) -> int:
    """1, or 2 where the model itself fails on a single row (a bare squeeze() is the usual reason)."""
    args, kwargs = model.inputs(1)
    try:
        out = flat_tensors(model.module(*args, **kwargs))[0]
        args, kwargs = model.inputs(2)
        two = flat_tensors(model.module(*args, **kwargs))[0]
    except Exception as error:
        try:
            args, kwargs = model.inputs(2)
            model.module(*args, **kwargs)
        except Exception as second:
            line = user_line(second, model.file) or (model.file or model.name)
            raise CaptureError(
                f"{line}: the model itself fails on get_inputs(2): {type(second).__name__}: {second}",
                "mend the model or its get_inputs",
            ) from error
        return 2
    return 1 if [t.dim() for t in out] == [t.dim() for t in two] else 2


@torch.no_grad()
def find_fault(source: Source) -> str | None:
    """Why the graph does not stand for the model, or None."""
    batches = [*UNSEEN] if source.dynamic else [EXPORT_BATCH]
    if source.min_batch == 1 and source.dynamic:
        batches.append(1)
    for batch in batches:
        inputs = source.inputs(batch)
        try:
            answers = list(source.graph(*inputs))
        except Exception as error:
            if batch == 1:
                source.min_batch = 2
                source.notes.append("the export does not take batch 1; a single row is padded to two")
                continue
            return f"the export was specialised: it fails at batch {batch} ({first_line(error)})"
        expected = source.eager(batch)
        if any(type(a) is not torch.Tensor for a in answers):
            return "the export holds a fake tensor: a value was computed by numpy or Python while tracing"
        if len(answers) != len(expected):
            return f"the export gives {len(answers)} outputs, the model {len(expected)}"
        error = largest_error(answers, expected)
        if error > 1e-5:
            truth = run_fp64(source.graph, *inputs)
            if largest_error(answers, truth) < error / 2:
                return f"the export answers differently at batch {batch} (error {error:.1e}): it was specialised or is random"
    return None


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def explain(error: Exception, model: Model) -> str:
    """What is wrong in the user's terms."""
    text = str(error)
    if "data-dependent" in text or "GuardOnDataDependent" in type(error).__name__ or "unbacked" in text.lower():
        return "control flow depends on the values of a tensor"
    if "Constraints violated" in text or "specialized" in text.lower():
        return f"a size that should vary was fixed ({first_line(error)})"
    return f"{type(error).__name__}: {first_line(error)}"


def hint_for(reason: str) -> str:
    if "control flow" in reason:
        return "use torch.where or torch.cond instead of `if tensor:`, and keep .item() out of forward"
    if "fixed" in reason or "specialised" in reason:
        return "derive sizes from x.shape instead of Python integers, and build no tensor of a fixed batch in forward"
    if "fake tensor" in reason:
        return "use torch operations instead of numpy in forward"
    return "see the full error with --traceback"
