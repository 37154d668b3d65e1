"""A model in an artifact on a GPU, by one engine: right beside float64, and the same bits whatever runs beside it."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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


OTHERS = """
import torch
small, large = torch.randn(64, 64, device="cuda"), torch.randn(4096, 4096, device="cuda", dtype=torch.half)
torch.cuda.synchronize()
print("at work", flush=True)
while True:
    for _ in range(100):
        small = torch.relu(small)
    large @ large
    small.sum().item()
"""


@contextlib.contextmanager
def shared_gpu(processes: int = 4) -> Iterator[None]:
    """Others at work on the GPU within this block: it stops what runs on it every other millisecond, to let them."""
    started = [
        subprocess.Popen([sys.executable, "-c", OTHERS], stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    try:
        for process in started:
            assert process.stdout is not None and process.stdout.readline() == "at work\n"
        yield
    finally:
        for process in started:
            process.kill()
            process.communicate()


def check_beside_others(program: grc.Program, requests: list[tuple[Tensor]], seconds: float) -> None:
    """Hold a program's answers beside other processes against what it answers alone, bit by bit."""
    alone = [program(*request) for request in requests]
    with shared_gpu(), ThreadPoolExecutor(4) as threads:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            turn = [*range(len(requests))] * 100
            for index, found in zip(turn, threads.map(lambda i: program(*requests[i]), turn), strict=True):
                assert torch.equal(found, alone[index])
