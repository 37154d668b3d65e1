"""Whether rows are answered alone as they are together: what merging the requests of strangers rests on."""

from __future__ import annotations

from grc.runtime.closeness import QUALITY, largest_error, within
from grc.runtime.golden import Golden
from grc.runtime.program import Program
from grc.runtime.triton_repository.tensors import Interface


def single_rows(shapes: Interface, request: Golden) -> list[Golden]:
    """Each row of a request as a request of its own."""
    inputs = [entry.to_rows(tensor) for entry, tensor in zip(shapes.inputs, request.inputs, strict=True)]
    outputs = [entry.to_rows(tensor) for entry, tensor in zip(shapes.outputs, request.outputs, strict=True)]
    return [
        Golden(
            [entry.to_model(t[i : i + 1]) for entry, t in zip(shapes.inputs, inputs, strict=True)],
            [entry.to_model(t[i : i + 1]) for entry, t in zip(shapes.outputs, outputs, strict=True)],
        )
        for i in range(inputs[0].shape[0])
    ]


def independent(program: Program, shapes: Interface, golden: list[Golden]) -> bool:
    """False for a model that reads its batch as a whole: a softmax over it, in-batch negatives, a batch's own statistics."""
    budget = max(program.artifact.manifest["quality"].values(), default=0.0)
    return all(
        within(largest_error(list(program.run_flat(list(row.inputs))), row.outputs), budget, QUALITY)
        for row in single_rows(shapes, golden[-1])
    )
