"""CUDA: engines that build the moved graph, and what the compiler needs to load, prove and measure them on the GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor import cpu_vec_isa

from grc.errors import ArtifactError, LoweringError
from grc.graph.capture import Source
from grc.graph.ids import id_ranges
from grc.graph.oracle import largest_error, run_fp64
from grc.kernels import OPS, cpp, encoder, nvrtc, tower
from grc.lowering.align import aligned
from grc.lowering.chains import takes_chains, with_chains
from grc.lowering.check_ids import checks_any, with_checked_ids
from grc.lowering.dependent import dependent_kernels
from grc.lowering.eager import Eager
from grc.lowering.encoders import takes_encoders, with_encoders
from grc.lowering.engine import Built, Engine, Lowerable, Target
from grc.lowering.epilogue import (
    takes_small_linears,
    with_heads_as_sums,
    with_relu_in_products,
    with_rows_as_sums,
    with_small_linears,
)
from grc.lowering.export import export_graph
from grc.lowering.in_place import with_parts_in_place
from grc.lowering.inductor import package, packaged_constants, settings
from grc.lowering.kernel_times import KernelTimes
from grc.lowering.move import moved
from grc.lowering.towers import takes_towers, with_towers
from grc.lowering.twins import all_have_twins, optional_twins, with_twins
from grc.runtime.device import DeviceWeights
from grc.runtime.engines import COUNTER, Run, load_on_gpu
from grc.runtime.plan import Plan


def gpu_target(isa: str, threads: int) -> Target:
    """The GPU of this host. Raises LoweringError where there is none."""
    if not torch.cuda.is_available():
        built = "torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        raise LoweringError(f"there is no usable GPU here: {built}", "leave out --device cuda, or see grc doctor")
    major, minor = torch.cuda.get_device_capability()
    return Target("cuda", isa, threads, f"sm_{major}{minor}")


@dataclass(frozen=True)
class Gpu:
    """The device that an artifact is built on: the weights that lie there already, and the plan of its parts.

    Models are captured and rewritten on the CPU; only what an engine builds is moved, and every engine is then proven
    from host to host against the same fp64 oracle as on the CPU.
    """

    weights: DeviceWeights
    plan: Plan
    times: KernelTimes

    @property
    def device(self) -> torch.device:
        return self.weights.device

    def moved(self, lowerable: Lowerable) -> tuple[Lowerable, dict[str, torch.Tensor]]:
        """The graph and its inputs on the device, and the constants as they lie on the host."""
        graph, originals = moved(lowerable.graph, self.device, self.weights.on_device)
        return Lowerable(graph, [t.to(self.device) for t in lowerable.inputs], lowerable.shapes), originals

    def load(self, built: Built, folder: Path) -> Run:
        """Load a part as the runtime will. One that can't be captured runs launch by launch, and its notes say why."""
        constants = {name: self.weights.on_device(tensor) for name, tensor in built.constants.items()}
        built.notes.clear()  # of a load for other buckets
        stayed = self.weights.on_host(built.constants.values())
        if stayed:
            built.notes.append(f"reads {stayed >> 20} MiB of tables over the bus: they do not fit on this GPU")
        if self.plan.reason is not None:
            built.notes.append(f"runs without CUDA graphs: {self.plan.reason}")
        else:
            built.graphs = True
            try:
                return load_on_gpu(part_on_gpu(built), folder, constants, self.plan)
            except ArtifactError as error:
                built.graphs = False
                built.notes.append(f"runs without CUDA graphs: {error.message}")
        return load_on_gpu(part_on_gpu(built), folder, constants, self.plan)

    def model_runner(self, lowerable: Lowerable, inputs: Callable[[int], list[torch.Tensor]]) -> Callable[[int], Any]:
        """The model's own graph, operator by operator: its module can't be moved without changing the caller's."""
        graph = self.moved(lowerable)[0].graph
        made: dict[int, list[torch.Tensor]] = {}

        @torch.inference_mode()
        def run(batch: int) -> list[torch.Tensor]:
            given = made.get(batch) or made.setdefault(batch, inputs(batch))
            return [answer.cpu() for answer in graph(*(tensor.to(self.device) for tensor in given))]

        return run


NO_VECTORS = {"cpp.vec_isa_ok": False}  # a package's code for the host only launches kernels


@contextmanager
def looking_for_no_vectors() -> Iterator[None]:
    """Let Inductor find anew which vectors of the CPU it may use, here and after this block: what it found it keeps, and to
    try all that a CPU has takes torch 2.11 a minute."""
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    try:
        yield
    finally:
        cpu_vec_isa.valid_vec_isa_list.cache_clear()


def part_on_gpu(built: Built) -> dict[str, Any]:
    """What the manifest says about a part, but for its weights and notes."""
    gpu = {"graphs": built.graphs, "bucket": built.bucket, "counts_bad_ids": built.counts_bad_ids}
    return {"engine": built.engine, "file": built.file, **gpu}


def can_build() -> bool:
    """Whether packages with Triton kernels can be built here."""
    return importlib.util.find_spec("triton") is not None


class CudaInductor:
    """AOTInductor for the GPU: with `twins`, fused ops go to our Triton kernels, whose cubins the package carries.

    `without` names fused ops that are left to Inductor all the same, and `label` the graph where there are several. With
    `bucket`, it is built for that one batch size and max-autotuned. `layers` says where linear layers go instead of cuBLAS:
    "small" to our kernel for few rows, "chains", where one narrow layer follows another, to our kernel for all of those,
    "encoder", where whole Transformer layers follow one another, to our kernel for all of those, "tower", where wide layers
    do, to our kernel for all of those, and the others like "small".
    """

    def __init__(
        self,
        gpu: Gpu,
        twins: bool,
        count: bool,
        bucket: int | None = None,
        without: Sequence[str] = (),
        label: str = "",
        layers: str = "",
    ):
        self.gpu, self.twins, self.count, self.bucket, self.without = gpu, twins, count, bucket, without
        self.layers = layers
        marks = (label, layers, *(f"without-{op}" for op in without))
        name = "-".join(["inductor" if twins else "aoti", *filter(None, marks)])
        self.name = f"{name}@{bucket}" if bucket else name

    def missing(self, target: Target) -> str | None:
        if not can_build():
            return "Triton is not installed: pip install triton"
        try:
            cpp.compiler()
        except LoweringError as error:
            return f"{error.message}: {error.hint}"
        return nvrtc.missing_for_clusters(str(target.sm)) if self.layers in ("encoder", "tower") else None

    def build(self, lowerable: Lowerable, target: Target, folder: Path) -> Built:
        ready, originals = self.gpu.moved(lowerable)
        graph, counts, checks = ready.graph, False, False
        shims: dict[Any, list[str]] = {}
        objects: list[str] = []
        few_rows = self.layers in ("small", "encoder", "tower")
        if self.twins:
            graph = with_checked_ids(graph, computed=True)
            seen = all_have_twins(graph) and all(entry.checked_by_kernel for entry in id_ranges(graph))
            checks = self.count and seen
            without = (*self.without, "cross") if few_rows else self.without
            counting, sizes = self.count or checks_any(graph), (self.bucket,) if self.bucket else self.gpu.plan.buckets
            graph, counts = with_twins(graph, self.gpu.device, counting, without, self.gpu.times, sizes)
            graph = with_parts_in_place(graph)
            if self.layers == "chains":
                graph = with_chains(graph)
            graph = aligned(graph)
            if self.layers == "tower":
                graph, towers = with_towers(graph)
                shims[tower.register()] = [cpp.declaration(tower.SCHEMA, "cuda")]
                objects.append(str(tower.build(towers, str(target.sm))))
            graph = with_rows_as_sums(with_heads_as_sums(graph))
            if few_rows:
                graph = with_small_linears(graph)
            elif self.bucket is None:  # one that is autotuned may find a kernel of Inductor's with any epilogue
                graph = with_relu_in_products(graph)
            if self.layers == "encoder":
                graph, form = with_encoders(graph)
                shims[encoder.register()] = [cpp.declaration(encoder.SCHEMA, "cuda")]
                objects.append(str(encoder.build(form, str(target.sm))))
        program = export_graph(Lowerable(graph, ready.inputs, ready.shapes), OPS)
        file = f"{self.name}.pt2"
        configs = settings([]) | NO_VECTORS | ({"max_autotune": True} if self.bucket else {})
        with dependent_kernels(), looking_for_no_vectors():
            package(program, folder / file, configs | {"aot_inductor.custom_ops_to_c_shims": shims}, objects)
        constants = packaged_constants(folder / file, graph, program)
        if counts and COUNTER not in constants:  # a bad id would be answered like a good one
            raise LoweringError("the package does not read where it is to count bad ids, so it would refuse none")
        stray = [name for name, tensor in constants.items() if tensor.device.type == "cpu"]
        if stray:
            raise LoweringError(f"constant {stray[0]} stays on the host, and would be copied to the GPU in every run")
        return Built(
            self.name, file, on_host(constants, originals), bucket=self.bucket, counts_bad_ids=counts,
            checks_ids=counts and checks,
        )  # fmt: skip


class CudaEager:
    """The model's operators one by one on the GPU, captured like any other part."""

    name = "eager"

    def __init__(self, gpu: Gpu):
        self.gpu = gpu

    def missing(self, target: Target) -> str | None:
        return None

    def build(self, lowerable: Lowerable, target: Target, folder: Path) -> Built:
        ready, originals = self.gpu.moved(lowerable)
        built = Eager().build(ready, target, folder)
        built.constants = on_host(built.constants, originals)
        return built


def on_host(constants: dict[str, torch.Tensor], originals: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Constants as they are stored: the model's own memory, and copies of what was made on the device."""
    return {name: originals[name] if name in originals else tensor.cpu() for name, tensor in constants.items()}


def gpu_engines(
    gpu: Gpu,
    optimised: Mapping[str, Lowerable],
    source: Lowerable | None,
    fixed: Sequence[tuple[int, list[torch.Tensor]]],
) -> list[tuple[Engine, Lowerable]]:
    """The engines in the order in which ties go. `optimised` are the graphs to build, by label; `source` is the graph as
    it came; without it bad ids are guarded in the graph, and only computed indices are counted. `fixed` are batch sizes to
    build for alone, and inputs of those."""
    count = source is not None
    offered: list[tuple[Engine, Lowerable]] = []
    for label, lowerable in optimised.items():
        for without in choices(optional_twins(lowerable.graph)):
            offered.append((CudaInductor(gpu, True, count, None, without, label), lowerable))
            for bucket, inputs in fixed:
                alone = Lowerable(lowerable.graph, inputs, ())
                offered.append((CudaInductor(gpu, True, count, bucket, without, label), alone))
        ways = {
            "chains": takes_chains, "small": takes_small_linears, "encoder": takes_encoders, "tower": takes_towers
        }  # fmt: skip
        for layers, takes in ways.items():
            if can_build() and takes(lowerable.graph):  # else the first engine says why
                offered.append((CudaInductor(gpu, True, count, None, (), label, layers), lowerable))
    if source is not None:
        offered.append((CudaInductor(gpu, False, False), source))
    return [*offered, (CudaEager(gpu), source or next(iter(optimised.values())))]


def choices(optional: Sequence[str]) -> list[tuple[str, ...]]:
    """Which of the ops that a kernel could take are left to Inductor: none, each alone, all."""
    alone = [(name,) for name in optional]
    return [(), *alone, *([tuple(optional)] if len(optional) > 1 else [])]


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products in float32: TF32 would be an error of 1e-3 that nobody asked for."""
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution


@torch.no_grad()
def mixed_rows(source: Source, graph: fx.GraphModule) -> str | None:
    """Why a request may not be padded, or None: the answer of a row must not depend on the rows beside it.

    Seen in double precision, by answering a batch of three alone and with its first row repeated up to eight.
    """
    inputs = source.inputs(3)
    plan = Plan.of(*source.described(), buckets=(8,))
    if plan.reason is not None or not source.dynamic:
        return None
    longer = [
        t if s.batch_dim is None else torch.cat([t, *[t.narrow(s.batch_dim, 0, 1)] * 5], s.batch_dim)
        for t, s in zip(inputs, plan.inputs, strict=True)
    ]
    alone, beside = list(run_fp64(graph, *inputs)), list(run_fp64(graph, *longer))
    cut = [a if s.batch_dim is None else a.narrow(s.batch_dim, 0, 3) for a, s in zip(beside, plan.outputs, strict=True)]
    return "the answer of a row depends on the other rows" if largest_error(cut, alone) > 1e-9 else None
