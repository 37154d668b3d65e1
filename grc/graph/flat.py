"""Flat graphs: an exported program as one torch.fx graph of calls, with flat inputs and outputs."""

from __future__ import annotations

import io
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.fx.proxy import TracerBase
from torch.nn.modules import transformer

import grc.errors


@contextmanager
def quiet_export() -> Iterator[None]:
    """torch.export logs, warns and prints its own workings; what matters is raised as a CaptureError instead."""
    names = ("torch.export", "torch.fx", "torch._dynamo", "torch._export", "torch._guards", "torch._subclasses")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Trace the operators of nn.TransformerEncoderLayer and nn.MultiheadAttention, not the one kernel that stands for all of
    them without gradients: no pass could look into it. Nor does nn.TransformerEncoder ask whether a mask's values make it
    causal, which no export can follow: without the answer the mask itself is used."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with mock.patch.object(
            transformer, "_detect_is_causal_mask", lambda mask, is_causal=None, size=None: bool(is_causal)
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def followed_data() -> Iterator[None]:
    """`x.data` is `x.detach()` here: the one would end the trace of x, and its value would become a constant."""
    data = property(torch.Tensor.detach, torch._C.TensorBase.data.__set__)  # type: ignore[attr-defined]
    with mock.patch.object(torch.Tensor, "data", data, create=True):
        yield


@contextmanager
def counted_rows(module: nn.Module) -> Iterator[None]:
    """`len(x)` in the files of a model's layers is `x.shape[0]`, a size that may vary: Python's own makes a number of it."""

    def length(x: Any) -> int:
        return x.shape[0] if isinstance(x, torch.Tensor) and x.dim() > 0 else len(x)

    files = {type(layer).__module__ for layer in module.modules()}
    with ExitStack() as patches:
        for name in files & sys.modules.keys():
            if name.partition(".")[0] != "torch":
                patches.enter_context(mock.patch.object(sys.modules[name], "len", length, create=True))
        yield


@contextmanager
def model_lines() -> Iterator[None]:
    """Keep the lines of every function that the model calls: torch.export records those of functions named forward only,
    so that a value made in a method of the model would be told by the line that calls the method."""
    with mock.patch.object(TracerBase, "_filter_traceback_frames", model_frames):
        yield


OWN, TORCH = (f"{Path(file).parent}/" for file in (grc.errors.__file__, torch.__file__))


def model_frames(_: TracerBase, stack: traceback.StackSummary) -> traceback.StackSummary:
    """The frames from the model's forward on: none of this compiler, and of torch only those of its layers."""
    first = next((i for i, frame in enumerate(stack) if frame.name == "forward"), len(stack))
    return traceback.StackSummary.from_list(
        frame
        for frame in stack[first:]
        if not frame.filename.startswith((OWN, TORCH, "<"))
        or (frame.filename.startswith(f"{TORCH}nn/") and frame.name == "forward")
    )


def flat_graph(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program in unlifted form, with flat inputs and a flat tuple of outputs. `meta["written"]` names the buffers and
    parameters that forward writes to, which the graph does not."""
    with quiet_export():
        functional = program.run_decompositions({})
        module = functional.module(check_guards=False)
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    inline_regions(module)
    tensors_only(graph)
    drop_writes(graph)
    flat = fx.GraphModule(module, graph)
    flat.meta["written"] = written(functional.graph_signature)
    flat.recompile()
    return flat


def written(signature: torch.export.ExportGraphSignature) -> list[str]:
    parameters = getattr(signature, "parameters_to_mutate", {})  # not in every version
    return sorted({*signature.buffers_to_mutate.values(), *parameters.values()})


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


def drop_writes(graph: fx.Graph) -> None:
    """Drop what forward leaves behind in buffers and inputs: only that is still written in place in an exported graph."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.copy_.default and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def tensors_only(graph: fx.Graph) -> None:
    """Outputs that are constants live in the structure, not in the graph."""
    output = next(iter(reversed(graph.nodes)))
    leaves = pytree.tree_leaves(output.args[0])
    output.args = (tuple(leaf for leaf in leaves if isinstance(leaf, fx.Node)),)
