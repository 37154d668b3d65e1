"""The manifest of an artifact, and the files beside it: weights, golden requests, the graph for people."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from grc.graph.capture import Source
from grc.graph.cost import layers
from grc.graph.ids import id_ranges
from grc.graph.segments import segments
from grc.graph.show import show
from grc.lowering.choose import Candidate, Choice, boundaries
from grc.lowering.cuda import part_on_gpu
from grc.lowering.engine import Target
from grc.lowering.requests import golden_batches
from grc.lowering.stages import BuiltStage
from grc.lowering.store import Store
from grc.options import Options
from grc.passes.manager import Record
from grc.precision.others import find_others
from grc.precision.outcome import Lowered
from grc.processing import bundle
from grc.runtime.artifact import FORMAT
from grc.runtime.version import VERSION
from grc.runtime.weights import write_weights


def describe(
    source: Source,
    graph: fx.GraphModule,
    records: list[Record],
    choice: Choice,
    target: Target,
    options: Options,
    folder: Path,
    lowered: Lowered | None = None,
    stages: Sequence[BuiltStage] = (),
) -> dict[str, Any]:
    """Write weights, golden requests and graph.txt into `folder`, and return the manifest that names them."""
    store = Store()
    parts = [part_entry(candidate, store, target) for candidate in choice.parts]
    cut = [stage_entry(stage, source, store, target) for stage in stages]
    store.write(folder / "weights.safetensors")
    write_golden(source, options.max_batch, folder)
    if lowered is not None and lowered.formats:
        write_weights(folder / "calibration.safetensors", lowered.kept.tensors)
    (folder / "graph.txt").write_text(show(graph))
    inputs, outputs = source.described()
    model = source.model
    command = f"grc compile {shlex.quote(str(model.file or model.name))}{flags_of(options)}"
    return {
        "format": FORMAT,
        "grc": VERSION,
        "name": model.name,
        "command": command,
        "target": {
            "device": options.device,
            "isa": target.isa,
            "torch": torch.__version__.split("+")[0],
            "threads": target.threads,
            **({"sm": target.sm, "cuda": torch.version.cuda} if target.sm else {}),
        },
        **gpu_entry(choice),
        "inputs": inputs,
        "outputs": outputs,
        "structure": {
            "inputs": source.in_structure,
            "outputs": source.out_structure,
            "parameters": parameter_names(model.module, source.in_structure),
        },
        "batch": {
            "min": source.min_batch,
            "max": options.max_batch,
            "capped": source.max_batch <= options.max_batch,  # by what the trace holds for
            "dynamic": source.dynamic,
        },
        "ids": [asdict(entry) for entry in id_ranges(graph)],
        "segments": [asdict(entry) for entry in segments(source.graph)],
        "on_bad_id": options.on_bad_id,
        "precision": None if lowered is None else precision_entry(lowered, graph),
        "requires": required_operators(graph),
        "parts": parts,
        "choice": routing(choice),
        "measured": measurements(choice),
        "rejected": choice.rejected,
        "passes": [record_entry(record) for record in records],
        "quality": {c.built.engine: c.error for c in choice.candidates},
        "budget_quality": {c.built.engine: c.quality for c in choice.candidates if c.quality},
        "capture": {"mode": source.mode, "notes": source.notes},
        "crowded": choice.crowded,
        "layers": [asdict(layer) for layer in layers(source.graph)],
        "processing": bundle(model, folder),
        **({"cut": cut} if cut else {}),
    }


def precision_entry(lowered: Lowered, graph: fx.GraphModule) -> dict[str, Any]:
    """What became of each table and layer, and the other weights, which stay as they are."""
    return {**lowered.json(), "others": [asdict(other) for other in find_others(graph)]}


def routing(choice: Choice) -> list[dict[str, int]]:
    """Up to which batch each part answers."""
    limits = boundaries(choice.winners, buckets=choice.plan is not None and bool(choice.plan.buckets))
    return [
        {"up_to": limit, "part": choice.parts.index(candidate)}
        for limit, (_, candidate) in zip(limits, choice.winners, strict=True)
    ]


def stage_entry(stage: BuiltStage, source: Source, store: Store, target: Target) -> dict[str, Any]:
    """A stage as the artifact of its own that it becomes when it is exported; its parts lie in a folder of its name."""
    parts = [part_entry(candidate, store, target) for candidate in stage.choice.parts]
    return {
        "name": stage.name,
        "inputs": stage.inputs,
        "outputs": stage.outputs,
        "ids": [asdict(entry) for entry in id_ranges(stage.graph)],
        "segments": stage_segments(stage, source),
        "parts": [{**part, "file": f"{stage.name}/{part['file']}"} for part in parts],
        "choice": routing(stage.choice),
        "measured": measurements(stage.choice),
        "rejected": stage.choice.rejected,
        "quality": {c.built.engine: c.error for c in stage.choice.candidates},
    }


def stage_segments(stage: BuiltStage, source: Source) -> list[dict[str, Any]]:
    """What the model's own inputs tell of each other, where a stage takes both."""
    place = {entry["name"]: i for i, entry in enumerate(stage.inputs)}
    found = [(source.names[e.values], source.names[e.counts], e.form) for e in segments(source.graph)]
    return [
        {"values": place[values], "counts": place[counts], "form": form}
        for values, counts, form in found
        if values in place and counts in place
    ]


def gpu_entry(choice: Choice) -> dict[str, Any]:
    """Which batch sizes have a CUDA graph, or why none has, and the times of fused ops."""
    plan = choice.plan
    if plan is None:
        return {}
    gpu = {"buckets": list(plan.buckets), "streams": plan.streams, "reason": plan.reason}
    return {"gpu": gpu, "kernels": choice.kernels}


def part_entry(candidate: Candidate, store: Store, target: Target) -> dict[str, Any]:
    built = candidate.built
    weights = {name: store.add(name, tensor) for name, tensor in sorted(built.constants.items())}
    return {
        **(part_on_gpu(built) if target.device == "cuda" else {"engine": built.engine, "file": built.file}),
        "weights": weights,
        "checks_ids": built.checks_ids,
        "notes": built.notes,
    }


def flags_of(options: Options) -> str:
    """The flags of `grc compile` that say what these options say, but for where it is written."""
    words = []
    for field in fields(options):
        value, flag = getattr(options, field.name), f"--{field.name.replace('_', '-')}"
        if field.name in ("output", "force") or value == field.default:
            continue
        if value is True:
            words.append(flag)
        elif field.name == "disable":
            words += [f"{flag} {shlex.quote(name)}" for name in value]
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words.append(f"{flag} {shlex.quote(text)}")
    return "".join(f" {word}" for word in words)


def parameter_names(module: nn.Module, structure: Any) -> list[str]:
    """The parameter names of forward, for each argument of a request."""
    args, kwargs = structure["tuple"]
    parameters = [p.name for p in inspect.signature(module.forward).parameters.values()]
    names = [parameters[i] if i < len(parameters) else f"input{i}" for i in range(len(args["tuple"]))]
    return names + list(kwargs["dict"])


@torch.no_grad()
def write_golden(source: Source, largest: int, folder: Path) -> None:
    """Requests with the model's own answers: what every copy of the artifact must repeat. None is larger than the largest
    batch."""
    tensors: dict[str, torch.Tensor] = {}
    for index, batch in enumerate(golden_batches(source, largest)):
        for i, tensor in enumerate(source.inputs(batch)):
            tensors[f"{index}.input.{i}"] = tensor
        for i, tensor in enumerate(source.eager(batch)):
            tensors[f"{index}.output.{i}"] = tensor
    write_weights(folder / "golden.safetensors", tensors)


def measurements(choice: Choice) -> list[dict[str, Any]]:
    rows = []
    for candidate in choice.candidates:
        for batch, times in candidate.times.items():
            ordered = sorted(times)
            rows.append(
                {
                    "engine": candidate.built.engine,
                    "batch": batch,
                    "p50_us": round(candidate.median(batch) * 1e6, 2),
                    "p99_us": round(ordered[int(0.99 * (len(ordered) - 1))] * 1e6, 2),
                    "build_s": round(candidate.build_seconds, 2),
                }
            )
    for batch, median in choice.eager_times.items():
        rows.append({"engine": "model", "batch": batch, "p50_us": round(median * 1e6, 2)})
    return rows


def record_entry(record: Record) -> dict[str, Any]:
    return {
        "name": record.name,
        "seconds": round(record.seconds, 3),
        "proof_seconds": round(record.proof_seconds, 3),
        "error": record.error,
        "rolled_back": record.rolled_back,
        "changes": [asdict(change) for change in record.changes],
    }


def required_operators(graph: fx.GraphModule) -> dict[str, str | None]:
    """Custom operators in the graph, by name, with the package that defines them where that can be told."""
    found: dict[str, str | None] = {}
    for node in graph.graph.nodes:
        namespace = getattr(node.target, "namespace", "") if node.op == "call_function" else ""
        if namespace and namespace not in ("aten", "prims", "grc", "higher_order", "_operator"):
            found[node.target.name()] = package_of(namespace)
    return found


PACKAGES = {"fbgemm": "fbgemm_gpu", "torchvision": "torchvision", "torchaudio": "torchaudio"}


def package_of(namespace: str) -> str | None:
    name = PACKAGES.get(namespace, namespace)
    return name if name in sys.modules else None
