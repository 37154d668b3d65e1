"""Logs: every line is JSON, whatever the libraries below and artifacts' own functions say."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("prometheus_client", reason="needs grc-compiler[serve]")

from grc.runtime.server.datatypes import array_of, bytes_of_list
from grc.runtime.server.logs import Log, forward


@pytest.fixture
def forwarded() -> Iterator[io.StringIO]:
    names = ("grpc", "asyncio", "py.warnings")
    before = [(logger, logger.handlers, logger.propagate) for logger in map(logging.getLogger, names)]
    stream = io.StringIO()
    forward(Log(stream))
    yield stream
    logging.captureWarnings(False)
    for logger, handlers, propagate in before:
        logger.handlers, logger.propagate = handlers, propagate


def test_warnings_are_lines_of_the_log(forwarded: io.StringIO) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)  # pytest has put its own in between
        warnings.warn("overflow\nin two lines", RuntimeWarning, stacklevel=1)
    (line,) = forwarded.getvalue().splitlines()
    told = json.loads(line)
    assert (told["level"], told["event"], told["logger"]) == ("warning", "library", "py.warnings")
    assert "RuntimeWarning: overflow\nin two lines" in told["message"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_number_that_its_dtype_does_not_hold_becomes_infinite_without_a_warning(dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = bytes_of_list("x", [1e300, -1e300], [2], dtype)
    assert found == array_of(torch.tensor([float("inf"), -float("inf")], dtype=dtype)).tobytes()
