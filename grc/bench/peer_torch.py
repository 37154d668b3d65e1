"""Peers: the eager model, and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree

from grc.bench import cuda
from grc.bench.contender import Contender, Stopwatch, called, flat
from grc.bench.requests import Request
from grc.bench.subject import Subject
from grc.lowering.onnxruntime import quiet


def build_eager(subject: Subject, example: Request, batch: int) -> Iterator[Contender]:
    """The model as it is, in inference mode; on a GPU its graph, all of whose constants lie there."""
    form = "as written" if subject.place.device == "cpu" else "operator by operator"
    yield module_contender(subject, example, "eager", form, subject.module)


def build_compile(subject: Subject, example: Request, batch: int) -> Iterator[Contender]:
    """torch.compile for this one batch size: max-autotune, with CUDA graphs on a GPU, and with and
    without freezing on a CPU.

    Without freezing, torch.compile sends linear layers to MKL; with it, to oneDNN or Inductor's GEMM on packed weights.
    """
    from torch._inductor import config, list_mode_options

    torch._dynamo.reset()
    for freezing in (False,) if subject.place.device == "cuda" else (False, True):
        clock = Stopwatch()
        options = {**list_mode_options("max-autotune", dynamic=False), "freezing": freezing}
        module = torch.compile(subject.module, dynamic=False, options=options)
        # Dynamo asks the global setting whether parameters are constants, when it traces the first call.
        with config.patch(freezing=freezing), torch.inference_mode(), quiet():
            for _ in range(3):
                args, kwargs = on_device(example, subject.place.device)
                module(*args, **kwargs)
        label = "max-autotune" + (", freezing" if freezing else "") + ", static shape"
        contender = module_contender(subject, example, "compile", label, module)
        contender.build_s = clock.read()
        yield contender


def module_contender(subject: Subject, example: Request, name: str, form: str, module: Any) -> Contender:
    if subject.place.device != "cuda":
        return Contender(name, form, called, lambda call: module(*call[0], **call[1]), flat, scope=torch.inference_mode)
    spec = pytree.tree_structure((example.args, example.kwargs))

    def function(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        args, kwargs = pytree.tree_unflatten(inputs, spec)
        return flat(module(*args, **kwargs))

    return cuda.on_cuda(name, form, function, example)


def on_device(request: Request, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, (request.args, request.kwargs))
