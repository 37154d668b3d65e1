"""Merging: what may share a batch, how jagged features are joined, and that nothing is merged that is not proven."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grc
from grc.runtime.server.merge import Jagged, Merge
from tests.server.conftest import bags_inputs

pytest.importorskip("prometheus_client", reason="needs grc-compiler[serve]")

from grc.runtime.server.version import Version

BATCH = {"min": 1, "max": 64, "dynamic": True}
OUTPUT = {"dtype": "float32", "sizes": ["batch"]}


def merge_of(*sizes: list[Any], outputs: tuple[dict[str, Any], ...] = (OUTPUT,)) -> Merge:
    inputs = [{"name": f"x{i}", "dtype": "float32", "sizes": own} for i, own in enumerate(sizes)]
    return Merge({"inputs": inputs, "outputs": list(outputs), "batch": BATCH})


@pytest.mark.parametrize(
    ("sizes", "outputs", "reason"),
    [
        ([["batch", "batch"]], (OUTPUT,), "input x0 has the batch in two dimensions"),
        ([["batch", 3], [3]], (OUTPUT,), "input x1 has no row for each row of the request"),
        ([["batch", 3], [2, "n0"]], (OUTPUT,), "input x1 has a size that is not the batch in dimension 1"),
        ([[{"scale": 2, "offset": 0}]], (OUTPUT,), "input x0 has a size that follows the batch in another way"),
        ([["batch", 3]], ({"dtype": "float32", "sizes": []},), "output 0 has no row for each row of the request"),
        ([["batch", 3]], (OUTPUT, {"sizes": ["batch", "n0"]}), "output 1 has no row for each row of the request"),
    ],
)
def test_what_can_not_be_merged_says_why(sizes: list[Any], outputs: Any, reason: str) -> None:
    assert merge_of(*sizes, outputs=outputs).reason == reason


def test_rows_are_joined_where_the_batch_is() -> None:
    merge = merge_of(["batch", 2], [3, "batch"])
    requests = [[torch.full((n, 2), n), torch.full((3, n), n)] for n in (1, 2)]
    joined = merge.join(requests)
    assert joined[0].tolist() == [[1, 1], [2, 2], [2, 2]] and joined[1].tolist() == [[1, 2, 2]] * 3
    parts = merge.cut([torch.arange(3)], [1, 2])
    assert [part[0].tolist() for part in parts] == [[0], [1, 2]]


def test_jagged_features_are_joined_feature_after_feature() -> None:
    group = Jagged(values=(0,), lengths=1, keys=2, offsets=False)
    one = [torch.tensor([1, 2, 3]), torch.tensor([2, 1])]  # feature 0: [1, 2], feature 1: [3]
    two = [torch.tensor([4, 5, 6, 7]), torch.tensor([0, 1, 2, 1])]  # rows of feature 0: [], [4]; of 1: [5, 6], [7]
    assert group.fits(one) and group.fits(two)
    merged: list[Tensor] = list(one)
    group.merge([one, two], merged)
    assert merged[0].tolist() == [1, 2, 4, 3, 5, 6, 7]
    assert merged[1].tolist() == [2, 0, 1, 1, 2, 1]


def test_offsets_start_over_at_every_request() -> None:
    group = Jagged(values=(0,), lengths=1, keys=1, offsets=True)
    one = [torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3])]
    two = [torch.tensor([4, 5]), torch.tensor([0, 0, 2])]
    merged: list[Tensor] = list(one)
    group.merge([one, two], merged)
    assert merged[0].tolist() == [1, 2, 3, 4, 5] and merged[1].tolist() == [0, 2, 3, 3, 5]


@pytest.mark.parametrize(
    "tensors",
    [
        [torch.tensor([1, 2]), torch.tensor([1, 2])],  # three values are promised
        [torch.tensor([1, 2]), torch.tensor([3, -1])],
        [torch.tensor([1, 2]), torch.tensor([2])],  # half a row
        [torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64)],
    ],
)
def test_lengths_that_are_wrong_are_never_merged(tensors: list[Tensor]) -> None:
    assert not Jagged(values=(0,), lengths=1, keys=2, offsets=False).fits(tensors)
    assert not Jagged(values=(0,), lengths=1, keys=2, offsets=True).fits(tensors)


def test_long_histories_do_not_share_a_batch_with_short_ones(bags: Path) -> None:
    version = Version("bags", "1", bags)
    short, long = bags_inputs(4, longest=3), bags_inputs(4, longest=40)
    merge = version.merge
    assert merge.reason is None and merge.key(list(short), 4) != merge.key(list(long), 4)
    assert merge.key(list(short), 4) == merge.key(list(bags_inputs(4, seed=1, longest=3)), 4)


def test_merged_jagged_requests_are_answered_as_alone(bags: Path) -> None:
    version = Version("bags", "1", bags)
    requests = [list(bags_inputs(1 + n % 3, seed=n)) for n in range(6)]
    answers = version.program.run_flat(version.merge.join(requests))
    parts = version.merge.cut(answers, [len(r[0]) for r in requests])
    for own, (found,) in zip(requests, parts, strict=True):
        torch.testing.assert_close(found, version.program(*own))


class Centred(nn.Module):
    """Every row's answer depends on the rows beside it."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0, keepdim=True)).sum(1)


def test_a_model_whose_rows_read_each_other_runs_requests_alone(tmp_path: Path) -> None:
    inputs = lambda batch: (torch.randn(batch, 4, generator=torch.Generator().manual_seed(batch)),)  # noqa: E731
    grc.compile(Centred().eval(), inputs, grc.Options(output=tmp_path / "c.grc", engine="eager", batches=(4,)))
    reason = Version("centred", "1", tmp_path / "c.grc").merge.reason
    assert reason is not None and reason.startswith("merged golden requests are answered ")


def test_a_version_says_which_engines_answer_which_batches(tmp_path: Path, tiny: Path) -> None:
    from tests.cli.session import edit_manifest

    path = Path(shutil.copytree(tiny, tmp_path / "two.grc"))
    assert Version("tiny", "1", path).engines() == "eager"

    def two(manifest: dict[str, Any]) -> None:
        manifest["parts"].append({**manifest["parts"][0]})
        manifest["choice"] = [{"up_to": 8, "part": 0}, {"up_to": 16, "part": 1}, {"up_to": None, "part": 1}]

    edit_manifest(path, two)
    assert Version("tiny", "1", path).engines() == "eager", "one engine in two parts is one engine"
