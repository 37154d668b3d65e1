"""Copies by kernel: every bit arrives, whatever the widths; on a GPU also to and from pinned memory."""

from __future__ import annotations

import pytest
import torch

from grc.runtime.mapped import copy_by_kernel, mapped

KINDS = (torch.float32, torch.float16, torch.int64, torch.bool, torch.uint8)


def several(device: str = "cpu") -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    found = [torch.randint(0, 2, (5, size), generator=make).to(kind) for size, kind in enumerate(KINDS)]
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-45])
    return [
        *(t.to(device) for t in found),
        special.to(device),
        torch.tensor(7, device=device),
        special.half().to(device),
    ]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.cpu().contiguous().view(-1).view(torch.uint8), b.cpu().contiguous().view(-1).view(torch.uint8))


def test_every_bit_is_copied() -> None:
    sources = several()
    targets = [torch.full_like(source, 3) for source in sources]
    copy_by_kernel(targets, sources)
    assert all(map(same_bits, targets, sources))


def test_a_source_may_have_any_strides() -> None:
    source, target = torch.arange(12.0).view(3, 4).t(), torch.zeros(4, 3)
    copy_by_kernel([target], [source])
    assert torch.equal(target, source)


@pytest.mark.parametrize("sizes", [(20_000,), (5, 20_000), (5, 6, 20_000), (20_000, 20_008, 3)])
def test_large_tensors_beside_small_ones(sizes: tuple[int, ...]) -> None:
    sources = [torch.arange(size, dtype=torch.int16) for size in sizes]
    targets = [torch.zeros_like(source) for source in sources]
    copy_by_kernel(targets, sources)
    assert all(map(torch.equal, targets, sources))


@pytest.mark.gpu
def test_a_kernel_reads_and_writes_pinned_memory() -> None:
    sources = [source.pin_memory() for source in several()]
    middle = [torch.full_like(source, 3, device="cuda") for source in sources]
    targets = [torch.full_like(source, 3).pin_memory() for source in sources]
    copy_by_kernel(middle, [mapped(source) for source in sources])
    copy_by_kernel([mapped(target) for target in targets], middle)
    torch.cuda.synchronize()
    assert all(map(same_bits, targets, sources))
