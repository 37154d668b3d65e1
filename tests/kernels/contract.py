"""What every C++ kernel owes its declaration, checked on all of the op's cases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from grc.kernels import cpp
from grc.kernels.fusion import Case, FusedOp
from grc.kernels.lookup.pooling import NO_PADDING

VECTORS = {"avx512": ("avx512", "avx2"), "avx2": ("avx2",)}.get(cpp.target_isa(), ())
# Kernels without vector instructions take two minutes to compile, and hardly a server runs them.
ISAS = (*VECTORS, pytest.param("default", marks=pytest.mark.slow) if VECTORS else "default")


def arguments(op: FusedOp, case: Case, seed: int = 7) -> dict[str, Any]:
    """The case's arguments under the names of the schema."""
    names = [argument.name for argument in torch._C.parse_schema(f"grc::{op.schema}").arguments]
    return dict(zip(names, case.build(seed), strict=False))  # arguments with defaults may be left out


def results(answer: Any) -> tuple[Tensor, ...]:
    return answer if isinstance(answer, tuple) else (answer,)


def run(op: FusedOp, values: dict[str, Any], isa: str | None = None) -> tuple[Tensor, ...]:
    """The kernel's answer, in memory that held NaN before: an element left unwritten shows."""
    shapes = [result.shape for result in results(op.reference(*values.values()))]
    for shape in shapes * 2:
        torch.full(shape, float("nan"), dtype=values["arena"].dtype)
    return results(cpp.call(op, *values.values(), isa=isa))


def check(op: FusedOp, values: dict[str, Any], isa: str | None = None) -> None:
    """Against the reference in float64: at most twice the reference's own error, plus one rounding of the result."""
    wide = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values.values()]
    plain = results(op.reference(*values.values()))
    got = run(op, values, isa)
    exact = results(op.reference(*wide))
    assert len(got) == len(plain) == len(exact)
    for ours, theirs, oracle in zip(got, plain, exact, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.is_contiguous()
        if not ours.numel():
            continue
        rounding = torch.finfo(ours.dtype).eps * oracle.abs().max().item()
        allowed = 2 * (theirs.double() - oracle).abs().max().item() + rounding
        worst = (ours.double() - oracle).abs().max().item()  # NaN if any element is: fails the comparison
        assert worst <= allowed, f"error {worst:.3g}, allowed {allowed:.3g}"


def variants(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same request with the other integer type and with strides that AOTInductor may hand over."""
    yield {**values, "ids": values["ids"].int()}
    if values.get("offsets") is not None:
        yield {**values, "offsets": values["offsets"].int()}
    ids = values["ids"]
    spread = {"ids": torch.stack([ids, ids - 1], -1)[..., 0]}
    if values.get("weights") is not None:
        weights = values["weights"]
        spread["weights"] = torch.stack([weights, weights - 1], -1)[..., 0]
    yield {**values, **spread}
    if ids.dim() == 2:
        yield {**values, "ids": ids.t().contiguous().t()}
        yield {**values, "ids": ids.int().t().contiguous().t()}
    if values.get("dense") is not None:
        dense = values["dense"]
        yield {**values, "dense": torch.cat([dense, dense - 1], 1)[:, : dense.shape[1]]}


def refuses(op: FusedOp, case: Case, isa: str) -> None:
    """Ids just past each table's end, far past it and below zero are named, never read; and NaN cast to int64, which stands
    for no padding as well."""
    values = arguments(op, case)
    rows: Sequence[int] = values["rows"]
    for feature in {0, len(rows) - 1}:
        for bad in (rows[feature], 2**31 - 1, 2**62, -1, -(2**40), NO_PADDING):
            if bad == values["padding"][feature] != NO_PADDING:
                continue
            ids = values["ids"].clone()
            ids[ids.shape[0] // 2, feature] = bad
            with pytest.raises(IndexError) as refused:
                cpp.call(op, *{**values, "ids": ids}.values(), isa=isa)
            assert str(refused.value) == f"id {bad} of feature {feature} is outside 0..{rows[feature] - 1}"


class Contract:
    """Subclass as TestX with `op`; `refused` names the case, one id per feature, that bad ids are put into."""

    op: FusedOp
    refused: str

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.op.cases, ids=[case.name for case in self.op.cases])
        if "isa" in metafunc.fixturenames:
            metafunc.parametrize("isa", ISAS)

    def test_answers(self, case: Case, isa: str) -> None:
        check(self.op, arguments(self.op, case), isa)

    def test_types_and_strides(self, case: Case) -> None:
        for values in variants(arguments(self.op, case)):
            check(self.op, values)

    @pytest.mark.parametrize("threads", [1, 2])
    def test_threads_do_not_change_the_answer(self, threads: int) -> None:
        before = torch.get_num_threads()
        try:
            for case in (c for c in self.op.cases if "large batch" in c.name):
                values = arguments(self.op, case)
                torch.set_num_threads(threads)
                got = run(self.op, values)
                torch.set_num_threads(1)
                assert all(torch.equal(a, b) for a, b in zip(got, run(self.op, values), strict=True))
                check(self.op, values)
        finally:
            torch.set_num_threads(before)

    def test_refuses_ids_without_a_row(self, isa: str) -> None:
        refuses(self.op, next(c for c in self.op.cases if c.name == self.refused), isa)

    def test_reference_traces_with_a_dynamic_batch(self, case: Case) -> None:
        values = arguments(self.op, case)
        if values["ids"].shape[0] < 2:
            pytest.skip("export specialises on batch 0 and 1")
        batched = [n for n in ("ids", "weights", "dense") if values.get(n) is not None and values[n].dim() == 2]
        if values.get("offsets") is not None:
            batched = []

        class Module(torch.nn.Module):
            def forward(self, given: dict[str, Tensor]) -> Any:
                return reference(*{**values, **given}.values())

        reference = self.op.reference
        given = {name: values[name] for name in batched or ("ids", "offsets")}
        batch = torch.export.Dim("batch", min=2)
        dims = {name: {0: batch if batched else torch.export.Dim.AUTO} for name in given}
        program = torch.export.export(Module(), (given,), dynamic_shapes=(dims,), strict=False)
        for ours, theirs in zip(results(program.module()(given)), results(reference(*values.values())), strict=True):
            assert torch.equal(ours, theirs)

    def test_schema_and_kernel_agree_on_the_c_signature(self) -> None:
        source = self.op.cpu.read_text()  # type: ignore[union-attr]
        assert " ".join(cpp.declaration(self.op.schema).split()) in " ".join(source.split()).replace("( ", "(")
