"""Copies by kernel: every bit arrives, whatever the widths; on a GPU also to and from pinned memory."""

from __future__ import annotations

import pytest
import torch

from grc.runtime.mapped import PIECE, PIECES, copy_by_kernel, find_strange, mapped

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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


@pytest.mark.parametrize("sizes", [(20_000,), (5, 20_000), (5, 6, 200_000), (20_000, 20_008, 3), (7,) * 200])
def test_large_tensors_beside_small_ones(sizes: tuple[int, ...]) -> None:
    sources = [torch.arange(size, dtype=torch.int16) for size in sizes]
    targets = [torch.zeros_like(source) for source in sources]
    copy_by_kernel(targets, sources)
    assert all(map(torch.equal, targets, sources))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(1,), (3, 0, 5), (PIECE,), (PIECE, 7, PIECE * PIECES[1] // 2 + 3), (2,) * PIECES[1]])
def test_strange_numbers_are_found_and_all_left_as_they_are(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    one, flag = torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    tensors = [torch.randn(size, device=DEVICE).to(dtype) for size in sizes]
    tensors[0][0] = torch.finfo(torch.float32 if dtype is torch.float64 else dtype).max
    tensors[-1][-1:] = torch.tensor(-torch.finfo(dtype).tiny / 2, dtype=dtype)
    before = [tensor.clone() for tensor in tensors]
    find_strange(tensors, flag, one)
    assert flag.item() == 0 and all(map(same_bits, tensors, before))
    for strange in (float("nan"), float("inf"), float("-inf")):
        for tensor in (tensors[0], tensors[-1]):
            flag.zero_()
            kept, tensor[-1] = tensor[-1].clone(), strange
            find_strange([t[:, None].expand(-1, 2) for t in tensors], flag, one)
            assert flag.item() == 1
            tensor[-1] = kept


def test_strange_numbers_of_several_dtypes() -> None:
    one, flag = torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    tensors = [torch.ones(2, device=DEVICE), torch.ones(3, dtype=torch.float16, device=DEVICE)]
    find_strange(tensors, flag, one)
    assert flag.item() == 0
    tensors[1][2] = float("nan")
    find_strange(tensors, flag, one)
    assert flag.item() == 1


@pytest.mark.gpu
def test_a_kernel_reads_and_writes_pinned_memory() -> None:
    sources = [source.pin_memory() for source in several()]
    middle = [torch.full_like(source, 3, device="cuda") for source in sources]
    targets = [torch.full_like(source, 3).pin_memory() for source in sources]
    copy_by_kernel(middle, [mapped(source) for source in sources])
    copy_by_kernel([mapped(target) for target in targets], middle)
    torch.cuda.synchronize()
    assert all(map(same_bits, targets, sources))
