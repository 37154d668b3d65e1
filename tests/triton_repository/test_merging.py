"""Merged requests: one call for those of one shape, and a bad one fails alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from grc.errors import ArtifactError, EngineError, GrcError, InputError
from grc.runtime.triton_repository.merge import answer_all
from grc.runtime.triton_repository.requests import failed
from grc.runtime.triton_repository.tensors import Interface, Tensor

HISTORY = Tensor("history", "float32", (-1,), ("batch", "n0"), 1)
SCORE = Tensor("score", "float32", (1,), ("batch",), 1)
SHAPES = Interface((HISTORY,), (SCORE,), 64)


class Model:
    """Sums each history and keeps the shapes that it was called with; a negative entry is a bad request."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        (history,) = inputs
        self.calls.append(list(history.shape))
        if (history < 0).any():
            raise InputError(f"row {int((history < 0).nonzero()[0][0])} is negative")
        return [history.sum(1)]


def test_requests_of_one_shape_are_one_call() -> None:
    model = Model()
    given = [[torch.full((rows, 3), float(rows))] for rows in (1, 2, 4)]
    answers = answer_all(model, SHAPES, given)
    assert model.calls == [[7, 3]]
    assert [a[0].tolist() for a in answers] == [[[3.0]], [[6.0]] * 2, [[12.0]] * 4]


def test_histories_of_other_lengths_are_not_padded() -> None:
    model = Model()
    given = [[torch.ones(1, length)] for length in (2, 5, 2)]
    answers = answer_all(model, SHAPES, given)
    assert model.calls == [[2, 2], [1, 5]]
    assert [a[0].item() for a in answers] == [2, 5, 2]


def test_a_bad_request_fails_alone() -> None:
    model = Model()
    given = [[torch.ones(1, 2)], [-torch.ones(1, 2)], [torch.ones(2, 2)], [torch.ones(1, 3)]]
    good, bad, double, other = answer_all(model, SHAPES, given)
    assert isinstance(bad, InputError) and bad.message == "row 0 is negative"
    assert (good[0].item(), double[0].tolist(), other[0].item()) == (2, [[2.0], [2.0]], 3)
    assert model.calls == [[4, 2], [1, 2], [1, 2], [2, 2], [1, 3]]


def test_a_model_without_rows_is_called_once_a_request() -> None:
    model = Model()
    whole = Tensor("history", "float32", (-1, -1), ("n0", "n1"))
    answers = answer_all(
        model, Interface((whole,), (Tensor("score", "float32", (-1,), ("n0",)),), 0), [[torch.ones(1, 2)]] * 2
    )
    assert model.calls == [[1, 2], [1, 2]] and [a[0].tolist() for a in answers] == [[2.0], [2.0]]


@pytest.mark.parametrize(
    ("error", "kind"),
    [(InputError("no row 9"), "client"), (EngineError("out of memory"), "server"), (ArtifactError("x"), "server")],
)
def test_a_failure_is_the_clients_or_the_servers(error: GrcError, kind: str):
    class Failure(tuple):
        INVALID_ARG, INTERNAL = "client", "server"

        def __new__(cls, *told: str):
            return super().__new__(cls, told)

    triton = SimpleNamespace(TritonError=Failure, InferenceResponse=lambda tensors, error: (tensors, error))
    assert failed(triton, error) == ([], (error.message, kind))
