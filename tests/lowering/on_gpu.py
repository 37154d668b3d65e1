"""A model in an artifact on a GPU, by one engine: right beside float64, and the same bits whatever runs beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

import grc
from grc.options import Options


@torch.no_grad()
def check(
    model: nn.Module,
    inputs: Callable[[int], tuple[Tensor]],
    engine: str,
    buckets: tuple[int, ...],
    batches: tuple[int, ...],
    path: Path,
) -> grc.Program:
    """Compile a model in half precision, and hold its answers to each batch against twice eager PyTorch's error."""
    oracle = copy.deepcopy(model).double()
    grc.compile(model, inputs, Options(path, "cuda", engine, buckets=buckets, max_batch=buckets[-1], streams=2))
    program = grc.load(path)
    kept = {}
    for batch in batches:
        (x,) = inputs(batch)
        want, eager = oracle(x.double()), model.cuda()(x.cuda()).cpu()
        found = kept[batch] = program(x)
        assert (found - want).abs().max() < 2 * (eager - want).abs().max() + 1e-3
        model.cpu()
    with ThreadPoolExecutor(4) as threads:  # several requests side by side, with answers that differ
        again = list(threads.map(lambda batch: (batch, program(*inputs(batch))), [*batches] * 150))
    assert all(torch.equal(found, kept[batch]) for batch, found in again)
    return program
