"""Rewriting: edit an fx graph so that every new node carries its inferred value and the user's line it came from."""

from __future__ import annotations

import itertools
import math
import operator
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from grc.errors import SpecError


def fake_mode(module: fx.GraphModule) -> FakeTensorMode:
    """The mode that the graph's values belong to, which holds its symbols."""
    for node in module.graph.nodes:
        found = node.meta.get("val")
        if isinstance(found, torch.Tensor) and hasattr(found, "fake_mode"):
            return found.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def infer(module: fx.GraphModule, node: fx.Node, mode: FakeTensorMode) -> Any:
    """The value of a node, from the values of its arguments."""
    if node.op == "get_attr":
        tensor = find_attribute(module, str(node.target))
        return mode.from_tensor(tensor, static_shapes=True) if isinstance(tensor, torch.Tensor) else tensor
    args = fx.map_arg(node.args, lambda n: n.meta["val"])
    kwargs = fx.map_arg(node.kwargs, lambda n: n.meta["val"])
    # Operators that torch composes of others in C++ (linear, matmul) can't take symbolic sizes there in every version.
    with enable_python_dispatcher(), mode, torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def find_attribute(module: torch.nn.Module, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    return found


SMALL = 1 << 20  # bytes


class Rewriter:
    """Edits of one graph. `call` and `parameter` add nodes, `replace` swaps a value, `finish` cleans up."""

    def __init__(self, module: fx.GraphModule):
        self.module = module
        self.graph = module.graph
        self.mode = fake_mode(module)
        self.named: dict[str, int] = {}

    @contextmanager
    def at(self, node: fx.Node) -> Iterator[None]:
        """Insert before `node`, and give what is inserted the user's line of `node`."""
        self.origin = node
        with self.graph.inserting_before(node):
            yield

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta = {k: v for k, v in self.origin.meta.items() if k in ("stack_trace", "nn_module_stack")}
        node.meta["val"] = infer(self.module, node, self.mode)
        return node

    def reshape(self, node: fx.Node, *sizes: int) -> fx.Node:
        return self.call(torch.ops.aten.reshape.default, node, list(sizes))

    def item(self, node: fx.Node, index: int) -> fx.Node:
        return self.call(operator.getitem, node, index)

    def parameter(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """Add a constant, under the first free name, at the top of the graph so that every node may read it."""
        names = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(self.named.get(name, 1))))
        unique = next(n for n in names if not hasattr(self.module, n))
        self.named[name] = self.named.get(name, 0) + 1
        if tensor.nbytes > SMALL:  # AOTInductor clones buffers, and parameters it does not
            self.module.register_parameter(unique, torch.nn.Parameter(tensor, requires_grad=False))
        else:
            self.module.register_buffer(unique, tensor)
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.get_attr(unique)
        node.meta["val"] = self.mode.from_tensor(tensor, static_shapes=True)
        return node

    def inline(self, function: Callable[..., Any], *args: Any) -> Any:
        """Insert the operators that `function` calls on these arguments, and return its results as nodes.

        It is traced on the recorded values, with the graph's own symbols; arguments may hold nodes in lists.
        """
        leaves, spec = tree_flatten(args)
        nodes = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]

        def call(*values: Any) -> Any:
            given = iter(values)
            return function(*tree_unflatten([next(given) if isinstance(v, fx.Node) else v for v in leaves], spec))

        with torch.no_grad():
            traced = make_fx(call, tracing_mode="symbolic")(*[node.meta["val"] for node in nodes])
        traced.graph.eliminate_dead_code()
        inputs = [n for n in traced.graph.nodes if n.op == "placeholder"]
        mapping = dict(zip(inputs, nodes, strict=True))
        result = self.graph.graph_copy(traced.graph, mapping)
        for old, new in mapping.items():
            if old.op != "placeholder":
                new.meta = {k: v for k, v in self.origin.meta.items() if k in ("stack_trace", "nn_module_stack")}
                new.meta["val"] = old.meta["val"]
        return result

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        old.replace_all_uses_with(new)

    def sort(self) -> None:
        """Put every value before its readers again, and leave the order alone otherwise."""
        done: set[fx.Node] = set()
        opened: set[fx.Node] = set()
        output = next(iter(reversed(self.graph.nodes)))
        for node in list(self.graph.nodes):
            waiting = [node]
            while waiting:
                missing = [n for n in waiting[-1].all_input_nodes if n not in done]
                if missing and waiting[-1] in opened:  # all it reads was put in place, and it is not complete
                    raise SpecError(f"node {waiting[-1].name} reads its own result", "this is a defect in a pass")
                if missing:
                    opened.add(waiting[-1])
                    waiting += missing
                    continue
                ready = waiting.pop()
                if ready not in done:
                    done.add(ready)
                    if ready is not output:
                        output.prepend(ready)

    def finish(self) -> None:
        """Drop dead values and the constants that nothing reads any more."""
        self.graph.eliminate_dead_code(is_impure)
        drop_unused_attributes(self.module)
        self.graph.lint()
        self.module.recompile()


def is_impure(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return bool(schema and schema.is_mutable)


def drop_unused_attributes(module: fx.GraphModule) -> None:
    used = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    for name, _ in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)


def copy_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A graph that can be edited while the original stays as it is. Tensors are shared."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, mapping)
    original = next(iter(reversed(module.graph.nodes)))
    result = graph.output(output)
    result.meta = dict(original.meta)
    return fx.GraphModule(module, graph)


def mapped(folder: Path, sizes: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """As torch.zeros: a large tensor lies in a file in the folder, which has no name any more and goes with the tensor."""
    count = math.prod(sizes)
    if count * dtype.itemsize <= SMALL:
        return torch.zeros(sizes, dtype=dtype)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)  # a full disk is an error now, and later a signal
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(sizes)
