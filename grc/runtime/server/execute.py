"""Execute a batch. A request that is at fault gets its own error, and the others their answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from grc.errors import InputError
from grc.runtime.server.packed import tensors_of

if TYPE_CHECKING:
    from grc.runtime.server.scheduler import Work


def execute(batch: list[Work]) -> None:
    """Answer every request of a batch; an error becomes the answer of the request that caused it."""
    if not batch:
        return
    if len(batch) == 1:
        alone(batch[0])
        return
    version = batch[0].version
    try:
        answers = version.program.run_flat(version.merge.join_all([work.inputs for work in batch]))
    except Exception:  # whose fault it is shows when suspects run alone, where the error is kept
        apart(batch)
        return
    for work, answer in zip(batch, version.merge.cut(answers, [work.rows for work in batch]), strict=True):
        work.answer = answer


def alone(work: Work) -> None:
    try:
        work.answer = list(work.version.program.run_flat(tensors_of(work.inputs)))
    except Exception as error:  # it belongs to this request: the worker goes on
        work.answer = error


def apart(batch: list[Work]) -> None:
    """Requests with bad ids or NaN run alone, the rest once more together; all run alone where none looks bad."""
    suspects = [work for work in batch if suspicious(work)]
    for work in suspects or batch:
        alone(work)
    if suspects:
        execute([work for work in batch if work not in suspects])


def suspicious(work: Work) -> bool:
    inputs = tensors_of(work.inputs)
    try:
        work.version.program.check.ids(inputs)
    except InputError:
        return True
    return any(t.is_floating_point() and not bool(torch.isfinite(t).all()) for t in inputs)
