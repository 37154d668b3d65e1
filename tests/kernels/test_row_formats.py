"""Rows in fewer bits: rounding, packing, and the look-up kernels on arenas of bytes, held against float32 arenas."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grc.errors import LoweringError
from grc.kernels import BAG_DOT, BAG_FM, LOOKUP, cpp
from grc.kernels.fusion import Case, FusedOp
from grc.kernels.lookup.row_formats import (
    LEVELS,
    LINE,
    ROW_FORMATS,
    number_bytes,
    pack_table,
    packed_rows,
    packing,
    rounded_rows,
    row_bytes,
    unpacked,
)
from tests.kernels.contract import ISAS, arguments, results

EVERY = pytest.mark.parametrize("form", ROW_FORMATS)
BITS = pytest.mark.parametrize("form", LEVELS)


@EVERY
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 13, 16, 64, 131])
def test_unpacking_gives_the_rounded_rows(form: str, dim: int) -> None:
    rows = torch.randn(40, dim)
    made = packed_rows(rows, form)
    assert made.shape == (40, row_bytes(form, dim)) and row_bytes(form, dim) % 4 == 0
    assert torch.equal(unpacked(made, form, dim), rounded_rows(rows, form))


WIDTHS = (*range(1, 70), 128, 131, 256)
# Down to the smallest denormal of float32, and up to what float16 can scale.
SIZES = st.sampled_from([0.0, 1e-45, 1e-40, 1e-38, 1e-9, 1e-7, 1e-6, 1e-4, 1e-2, 1.0, 1e3, 6e4])


@st.composite
def any_rows(draw: st.DrawFn, dim: int) -> Tensor:
    """Rows [N, dim], each of its own size: around zero, all of one sign, one number among zeros, or one number throughout."""
    make = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows = []
    for size, kind in draw(st.lists(st.tuples(SIZES, st.integers(0, 3)), min_size=1, max_size=8)):
        unit = torch.rand(dim, generator=make, dtype=torch.float64)
        single = torch.nn.functional.one_hot(torch.tensor(dim // 2), dim)
        rows.append(size * (2 * unit - 1, -unit, single, torch.ones(dim))[kind])
    return torch.stack(rows).float()


@BITS
@pytest.mark.parametrize("dim", WIDTHS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_no_value_moves_by_more_than_half_a_step(form: str, dim: int, data: st.DataObject) -> None:
    rows = data.draw(any_rows(dim))
    made = packed_rows(rows, form)
    begin = number_bytes(form, dim)
    scale = made[:, begin : begin + 2].contiguous().view(torch.float16).double()
    error = (unpacked(made, form, dim).double() - rows.double()).abs()
    # Half of a step, and the rounding of q * scale + offset in float32.
    assert (error <= scale / 2 + rows.double().abs().amax(1, keepdim=True) * 2**-22).all()


@BITS
def test_zeros_stay_zeros_and_a_huge_row_leaves_the_others_alone(form: str) -> None:
    rows = torch.randn(6, 16)
    rows[1], rows[2], rows[3] = 0.0, 1e-42, 3.25
    rows[5] *= 1e4
    found = rounded_rows(rows, form)
    assert torch.equal(found[1], rows[1])
    assert (found[2] - rows[2]).abs().max() < 6e-8 and torch.allclose(found[3], rows[3], rtol=1e-3)
    assert torch.equal(found[0], rounded_rows(rows[:1], form)[0])


@BITS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e6])
def test_rows_that_float16_can_not_scale_are_refused(form: str, bad: float) -> None:
    rows = torch.randn(4, 8)
    rows[2, 3] = bad
    with pytest.raises(LoweringError, match=f"can't be kept in {form}"):
        packed_rows(rows, form)


def test_tables_are_packed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grc.kernels.lookup.row_formats.CHUNK", 7)
    table = torch.randn(33, 10)
    out = torch.zeros(33 * row_bytes("int8", 10), dtype=torch.uint8)
    pack_table(table, "int8", out)
    assert torch.equal(out.view(33, -1), packed_rows(table, "int8"))


def in_bytes(values: dict[str, Any], forms: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A case of a float32 arena as one of bytes, and as one of float32 rows rounded in the same way."""
    arena, bases, rows = values["arena"], values["bases"], values["rows"]
    dims = values.get("dims") or [values["dim"]] * len(bases)
    rounded, parts, starts, end = arena.clone(), [], [], 0
    for base, count, dim, form in zip(bases, rows, dims, forms, strict=True):
        if arena.dim() == 2:
            table, target = arena[base : base + count], rounded[base : base + count]
        else:
            table = arena[base : base + count * dim].view(count, dim)
            target = rounded[base : base + count * dim].view(count, dim)
        part = torch.zeros(-(-count * row_bytes(form, dim) // LINE) * LINE, dtype=torch.uint8)
        pack_table(table, form, part[: count * row_bytes(form, dim)])
        parts.append(part)
        starts.append(end)
        end += len(part)
        target.copy_(rounded_rows(table, form))
    return {**values, "arena": torch.cat(parts), "packing": packing(forms, starts)}, {**values, "arena": rounded}


def usable(op: FusedOp) -> list[Case]:
    """Cases of float32 arenas; tables of arenas that overlap can't be packed one by one."""
    return [case for case in op.cases if arguments(op, case)["arena"].dtype is torch.float32]


PAIRS = [(op, case) for op in (LOOKUP, BAG_DOT, BAG_FM) for case in usable(op)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("op", "case"), PAIRS, ids=[f"{op.name}, {case.name}" for op, case in PAIRS])
def test_kernels_read_bytes_as_they_read_rounded_floats(op: FusedOp, case: Case, isa: str) -> None:
    values = arguments(op, case)
    for shift in range(len(ROW_FORMATS)):
        forms = [ROW_FORMATS[(f + shift) % len(ROW_FORMATS)] for f in range(len(values["bases"]))]
        packed, rounded = in_bytes(values, forms)
        want = results(cpp.call(op, *rounded.values()))
        plain = results(op.reference(*packed.values()))
        found = results(cpp.call(op, *packed.values(), isa=isa))
        for got, expected, reference in zip(found, want, plain, strict=True):
            assert got.dtype is torch.float32
            close(got, expected)
            close(reference, expected)


def close(got: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of q * scale + offset, which a fused multiply-add leaves out, and for the order of sums."""
    assert got.shape == expected.shape
    if got.numel():
        assert (got - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packing": []}, "packing has a format and a start for each feature of bytes"),
        ({"packing": [9, 0] * 3}, "a row format is 0 to 4"),
        ({"packing": [3, 2] * 3}, "a start or a table's size is out of range"),
        ({"packing": [3, 1 << 40] * 3}, "a table reaches past the arena"),
        ({"rows": [7, 50, 10**9]}, "a table reaches past the arena"),
    ],
)
def test_refuses_packing_that_does_not_fit(change: dict[str, Any], message: str) -> None:
    values = arguments(LOOKUP, LOOKUP.cases[0])
    packed, _ = in_bytes(values, ["int8"] * 3)
    with pytest.raises(RuntimeError) as refused:
        cpp.call(LOOKUP, *{**packed, **change}.values())
    assert str(refused.value) == message


def test_bad_ids_are_refused_in_bytes_too() -> None:
    packed, _ = in_bytes(arguments(LOOKUP, LOOKUP.cases[0]), ["int8", "int4", "fp16"])
    packed["ids"][2, 1] = 50
    with pytest.raises(IndexError, match=r"id 50 of feature 1 is outside 0\.\.49"):
        cpp.call(LOOKUP, *packed.values())


CONVERT = """
import resource
import torch
from grc.kernels.lookup.row_formats import pack_table, row_bytes

rows, dim = 500_000, 64
table = torch.randn(rows, dim)
pack_table(table[:100], "int8", torch.empty(100 * row_bytes("int8", dim), dtype=torch.uint8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = torch.from_file({path!r}, shared=True, size=rows * row_bytes("int8", dim), dtype=torch.uint8)
pack_table(table, "int8", out)
grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
print((grown - out.nbytes) / table.nbytes)
"""


def test_converting_a_table_takes_a_fifth_of_it_at_most(tmp_path: Path) -> None:
    """Beside the mapped file, whose pages can be given back at any time."""
    done = subprocess.run(
        [sys.executable, "-c", CONVERT.format(path=str(tmp_path / "arena"))], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) <= 0.2
