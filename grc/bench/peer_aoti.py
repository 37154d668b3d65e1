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
from grc.graph.capture import EXPORT_BATCH
from grc.graph.flat import quiet_export
from grc.lowering.engine import Lowerable
from grc.lowering.export import export_graph
from grc.lowering.inductor import linking_compiler
from grc.lowering.onnxruntime import quiet


def build_aoti(subject: Subject, example: Request, batch: int) -> Iterator[Contender]:
    """AOTInductor through its direct loader: as it comes for all batch sizes, and max-autotuned for this one."""
    default = subject.place.folder / "default.pt2"
    seconds = None if default.exists() else build_package(subject, default, EXPORT_BATCH, autotune=False)
    yield aoti_contender(subject, example, "default", default, seconds)
    tuned = subject.place.folder / f"autotuned-{batch}.pt2"
    seconds = build_package(subject, tuned, batch, autotune=True)
    yield aoti_contender(subject, example, "max_autotune, static shape", tuned, seconds)


def build_package(subject: Subject, file: Path, batch: int, autotune: bool) -> float:
    """Build for all batch sizes or, max-autotuned, for this one. Answers with the seconds that it took."""
    clock = Stopwatch()
    source = subject.source
    shapes = source.shapes() if source.dynamic and not autotune else ()
    program = export_graph(Lowerable(source.graph, source.inputs(batch), shapes))
    configs: dict[str, Any] = {"cpp.cxx": (None, str(linking_compiler()))}
    if autotune:
        configs |= {"max_autotune": True}
        if subject.place.device == "cpu":
            configs |= {"max_autotune_gemm_backends": "CPP,ATEN"}
    with torch.no_grad(), quiet_export(), quiet():
        torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=configs)
    return clock.read()


def aoti_contender(subject: Subject, example: Request, form: str, package: Path, seconds: float | None) -> Contender:
    clock = Stopwatch()
    alone = subject.place.device == "cuda"  # the default runner fails inside a capture
    loader = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", alone, 1, -1)
    load_s = clock.read()
    if subject.place.device == "cuda":
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
