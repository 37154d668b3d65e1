"""Peer: AOTInductor on the captured graph as it came, without grc's passes and kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from grc.bench import cuda
from grc.bench.contender import Contender, Stopwatch, as_list
from grc.bench.requests import Request
from grc.bench.subject import Subject
from grc.graph.capture import EXPORT_BATCH, quiet_export
from grc.lowering.engine import Lowerable
from grc.lowering.export import export_graph
from grc.lowering.inductor import linking_compiler
from grc.lowering.onnxruntime import quiet


def build_aoti(subject: Subject, example: Request, batch: int) -> Iterator[Contender]:
    """AOTInductor through its direct loader: as it comes for all batch sizes, and max-autotuned for this one."""
    form = "default"
    if form not in subject.built:
        subject.built[form] = aoti_package(subject, EXPORT_BATCH, dynamic=True, autotune=False)
    yield aoti_contender(subject, example, form, *subject.built[form])
    package, seconds = aoti_package(subject, batch, dynamic=False, autotune=True)
    yield aoti_contender(subject, example, "max_autotune, static shape", package, seconds)


def aoti_package(subject: Subject, batch: int, dynamic: bool, autotune: bool) -> tuple[Path, float]:
    clock = Stopwatch()
    source = subject.source
    shapes = source.shapes() if dynamic and source.dynamic else ()
    program = export_graph(Lowerable(source.graph, source.inputs(batch), shapes))
    configs: dict[str, Any] = {"cpp.cxx": (None, str(linking_compiler()))}
    if autotune:
        configs |= {"max_autotune": True}
        if subject.device == "cpu":
            configs |= {"max_autotune_gemm_backends": "CPP,ATEN"}
    file = subject.folder / f"{'autotuned' if autotune else 'default'}-{batch}.pt2"
    with torch.no_grad(), quiet_export(), quiet():
        torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=configs)
    return file, clock.read()


def aoti_contender(subject: Subject, example: Request, form: str, package: Path, seconds: float) -> Contender:
    clock = Stopwatch()
    alone = subject.device == "cuda"  # the default runner fails inside a capture
    loader = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", alone, 1, -1)
    load_s = clock.read()
    if subject.device == "cuda":
        function = cuda.captured(lambda inputs: loader.boxed_run(inputs), example)
        contender = cuda.on_cuda("aoti", f"{form}, CUDA graph", function, example)
    else:
        contender = Contender(
            "aoti",
            form,
            lambda request: request.leaves,
            lambda leaves: loader.boxed_run(list(leaves)),
            as_list,
            scope=torch.inference_mode,
        )
    contender.build_s, contender.load_s, contender.bytes = seconds, load_s, package.stat().st_size
    return contender
