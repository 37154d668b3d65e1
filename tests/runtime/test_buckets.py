"""Buckets without a GPU: which bucket a request takes, how it is padded, cut and put together, and what has no bucket."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch

from grc.runtime import buckets
from grc.runtime.answers import Answers
from grc.runtime.bucket import Cut
from grc.runtime.buckets import Buckets
from grc.runtime.device import DeviceWeights
from grc.runtime.engines import buckets_of_parts
from grc.runtime.plan import LINE, Plan, Spec, bucket_sizes, layout, obstacle, views

DENSE = {"name": "dense", "dtype": "float32", "sizes": ["batch", 3]}
IDS = {"name": "ids", "dtype": "int64", "sizes": ["batch", 2]}
SCORES = {"dtype": "float32", "sizes": ["batch"]}


def plan(sizes: tuple[int, ...] = (1, 8, 32), **more: Any) -> Plan:
    return Plan.of([DENSE, IDS], [SCORES], sizes, **more)


@pytest.mark.parametrize(("batch", "bucket"), [(1, 1), (2, 8), (8, 8), (9, 32), (32, 32)])
def test_a_request_takes_the_smallest_bucket_that_holds_it(batch: int, bucket: int) -> None:
    assert plan().bucket(batch) == bucket


def test_sizes_are_a_ladder_with_both_ends() -> None:
    assert bucket_sizes((), 1, 4096) == (1, 8, 32, 128, 512, 2048, 4096)
    assert bucket_sizes((), 2, 100) == (2, 8, 32, 100)
    assert bucket_sizes((64, 16, 5000), 1, 1024) == (1, 16, 64, 1024)
    assert bucket_sizes((), 1, 100, (50, 100, 700)) == (1, 8, 32, 50, 100)


def test_a_part_has_the_buckets_of_the_requests_that_it_is_chosen_for() -> None:
    parts = [{"file": "small.pt2"}, {"file": "large.pt2"}]
    choice = [{"up_to": up_to, "part": part} for up_to, part in ((1, 0), (8, 1), (32, 0), (2**31 - 1, 1))]
    manifest = {"parts": parts, "choice": choice, "gpu": {"buckets": [1, 8, 32, 100]}}
    assert buckets_of_parts(manifest) == {"small.pt2": (1, 32), "large.pt2": (8, 100)}


def test_fixed_sizes_are_one_bucket() -> None:
    fixed = Plan.of([{"name": "x", "dtype": "float32", "sizes": [4, 3]}], [{"dtype": "float32", "sizes": []}], (1, 8))
    assert fixed.buckets == (1,) and fixed.batch([torch.zeros(4, 3)]) == 1
    assert fixed.outputs[0].shape(1) == ()


OBSTACLES = [
    ({"name": "ids", "dtype": "int64", "sizes": ["n0"]}, SCORES, "input ids has a size that is not the batch"),
    ({"name": "o", "dtype": "int64", "sizes": [{"scale": 1, "offset": 1}]}, SCORES, "input o has a size that is not"),
    ({"name": "mask", "dtype": "bool", "sizes": ["batch", "batch"]}, SCORES, "input mask has the batch in two"),
    (DENSE, {"dtype": "float32", "sizes": []}, "output 0 has no row for each row"),
]


@pytest.mark.parametrize(("given", "answer", "reason"), OBSTACLES, ids=[reason for _, _, reason in OBSTACLES])
def test_what_can_not_be_padded_has_no_bucket_and_a_reason(given: dict, answer: dict, reason: str) -> None:
    assert str(obstacle([given], [answer])).startswith(reason)
    unbucketed = Plan.of([given], [answer], (1, 8))
    assert unbucketed.buckets == () and unbucketed.reason is not None


def test_a_reason_from_the_compiler_rules_buckets_out() -> None:
    assert plan(reason="rows read each other").buckets == ()


def test_an_arena_holds_every_tensor_on_a_line_of_its_own() -> None:
    specs = (Spec(torch.float32, (0, 3), 0), Spec(torch.bool, (2, 0), 1), Spec(torch.int64, (4,), None))
    starts, end = layout(specs, 50)
    assert starts == [0, 3 * LINE, 4 * LINE] and end == 5 * LINE  # 600, 100 and 32 bytes
    arena = torch.zeros(layout(specs, 50)[1], dtype=torch.uint8)
    found = views(arena, specs, 7)
    assert [tuple(t.shape) for t in found] == [(7, 3), (2, 7), (4,)]
    for value, tensor in enumerate(found):
        tensor.fill_(value + 1)
    assert [t.double().unique().tolist() for t in found] == [[1.0], [1.0], [3.0]]


def test_rows_beyond_the_request_repeat_its_first_row() -> None:
    wide, tall = Spec(torch.int64, (0, 2), 0), Spec(torch.int64, (2, 0), 1)
    given = Plan((wide, tall), (), (8,))
    buffers = [torch.full((8, 2), -1), torch.full((2, 8), -1)]
    request = [torch.tensor([[5, 6], [7, 8], [9, 10]]), torch.tensor([[1, 2, 3], [4, 5, 6]])]
    Cut.of(given, buffers, [], 3).fill(request)
    assert torch.equal(buffers[0], torch.cat([request[0], request[0][:1].expand(5, 2)]))
    assert torch.equal(buffers[1], torch.cat([request[1], request[1][:, :1].expand(2, 5)], 1))


def test_a_full_bucket_has_nothing_to_pad() -> None:
    given = Plan((Spec(torch.float32, (0, 2), 0), Spec(torch.float32, (5,), None)), (), (4,))
    assert Cut.of(given, [torch.zeros(4, 2), torch.zeros(5)], [], 4).rest == []


def test_answers_are_cut_to_the_request() -> None:
    given = Plan((), (Spec(torch.float32, (0,), 0), Spec(torch.float32, (5,), None)), (4,))
    assert [len(answer) for answer in Cut.of(given, [], [torch.zeros(4), torch.zeros(5)], 3).answers] == [3, 5]


class Counting:
    """Stands in for a lane: answers with the sum of each row, and remembers what it was asked."""

    asked: ClassVar[list[tuple[str, int]]] = []

    def __init__(self, make: Any, plan: Plan, counts: bool):
        self.run, self.plan, self.busy = make(torch.zeros(2, dtype=torch.int64)), plan, False

    def from_host(self, inputs: list[torch.Tensor], batch: int, events: Any) -> Answers:
        assert not self.busy, "two requests are in one lane"
        self.busy = True
        self.asked.append(("bucket", batch))
        answer = Answers([inputs[0].sum(1) + inputs[1].sum(1)], False)
        self.busy = False
        return answer

    def direct(self, inputs: list[torch.Tensor], device: bool, events: Any) -> Answers:
        self.asked.append(("direct", len(inputs[0])))
        return Answers([inputs[0].sum(1)], False)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    monkeypatch.setattr(buckets, "Lane", Counting)
    Counting.asked = []
    return Counting


def request(batch: int) -> list[torch.Tensor]:
    return [torch.rand(batch, 3), torch.randint(0, 9, (batch, 2))]


@pytest.mark.parametrize(("batch", "pieces"), [(1, [1]), (31, [31]), (32, [32]), (33, [32, 1]), (100, [32, 32, 32, 4])])
def test_a_request_larger_than_the_largest_bucket_is_answered_in_pieces(
    counting: type[Counting], batch: int, pieces: list[int]
) -> None:
    run = Buckets(lambda told: lambda inputs: inputs, plan(), counts=False)
    dense, ids = request(batch)
    assert torch.equal(run([dense, ids])[0], dense.sum(1) + ids.sum(1))
    assert counting.asked == [("bucket", piece) for piece in pieces]


def test_without_buckets_requests_run_as_they_come(counting: type[Counting]) -> None:
    Buckets(lambda told: lambda inputs: inputs, plan(reason="jagged"), counts=False)(request(100))
    assert counting.asked == [("direct", 100)]


def test_threads_never_share_a_lane_and_streams_are_lanes(counting: type[Counting]) -> None:
    made: list[int] = []
    run = Buckets(lambda told: made.append(1) or (lambda inputs: inputs), plan(streams=2), counts=False)  # type: ignore[func-returns-value]
    assert len(made) == 2

    def ask(batch: int) -> bool:
        dense, ids = request(batch)
        return torch.equal(run([dense, ids])[0], dense.sum(1) + ids.sum(1))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, [1 + i % 40 for i in range(400)]))


def test_weights_that_share_memory_are_uploaded_once() -> None:
    arena = torch.arange(24.0).view(6, 4)
    weights = DeviceWeights(torch.device("meta"))
    found = [weights.on_device(t) for t in (arena, arena[2:4], arena.view(-1)[8:], torch.ones(3))]
    assert weights.bytes == arena.nbytes + 12
    assert [(f.storage_offset(), tuple(f.shape)) for f in found] == [(0, (6, 4)), (8, (2, 4)), (8, (16,)), (0, (3,))]
