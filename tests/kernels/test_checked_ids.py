"""Ids that are checked inside of a graph: the op itself, and a model whose look-ups are not ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import grc
from grc.kernels import CHECKED_IDS, cpp
from grc.kernels.fusion import Case
from tests.kernels.contract import ISAS


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CHECKED_IDS.cases, ids=lambda case: case.name)
def test_ids_with_a_row_are_copied(case: Case, isa: str) -> None:
    ids, rows = case.build(3)
    got = cpp.call(CHECKED_IDS, ids, rows, isa=isa)
    assert torch.equal(got, ids) and got.dtype == ids.dtype and got.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("place", "bad"), [(0, -1), (66, 9), (31, 2**31 - 1), (5, -(2**31))])
def test_the_first_id_without_a_row_is_named(place: int, bad: int, dtype: torch.dtype) -> None:
    ids = torch.randint(9, (67,)).to(dtype)
    ids[place] = bad
    with pytest.raises(IndexError, match=f"^id {bad} at {place} is outside 0..8$"):
        cpp.call(CHECKED_IDS, ids, 9)


class History(nn.Module):
    """Embeddings that no cat reads, one table twice, and a mean over the steps of a history."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.users, self.head = nn.Embedding(50, 8), nn.Embedding(20, 8), nn.Linear(8, 1)

    def forward(self, user: Tensor, item: Tensor, history: Tensor) -> Tensor:
        seen = torch.relu(self.items(history)).mean(1)
        return self.head(seen * self.items(item) + torch.sigmoid(self.users(user)))


def requests(batch: int, steps: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(batch)
    return tuple(torch.randint(20, size, generator=make) for size in ((batch,), (batch,), (batch, steps)))  # type: ignore[return-value]


def requests_of_any_length(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    return requests(batch, 4 + batch % 5)


@pytest.mark.engine
@pytest.mark.parametrize("requests", [requests, requests_of_any_length])
def test_a_package_checks_the_ids_of_look_ups_that_are_not_ours(
    requests: Callable[[int], tuple[Tensor, Tensor, Tensor]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = History().eval()
    program = grc.load(
        grc.compile(model, requests, grc.Options(tmp_path / "h.grc", engine="inductor", batches=(4,))).path
    )
    assert [part["checks_ids"] for part in program.artifact.manifest["parts"]] == [True]
    for batch in (1, 5, 64):
        given = requests(batch)
        with torch.no_grad():
            assert torch.allclose(program(*given), model(*given), atol=1e-5)
    user, item, history = requests(5)
    history[3, 2] = 50
    with pytest.raises(ValueError, match=r'"history" has id 50 at row 3, column 2; table items\.weight has 50 rows'):
        program(user, item, history)
    history[3, 2], user[1] = 0, -1
    with pytest.raises(ValueError, match=r'"user" has id -1 at row 1; table users\.weight has 20 rows'):
        program(user, item, history)
    assert "is outside" not in capfd.readouterr().err  # a client's fault, which the error names
    with pytest.raises(RuntimeError, match=r"^ids are int32 or int64$"):
        program.runs[0]([user.float(), item, history])
    assert capfd.readouterr().err == "Error: ids are int32 or int64\n"
