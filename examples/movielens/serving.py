"""What serving needs beside the model: requests in, films out. An artifact carries this file, and no training code."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from movielens import features


def preprocess(request: dict[str, Any], assets: Path) -> tuple[Tensor]:
    """A request as JSON -> features [1, 10, 1024]. Raises RequestError on a request that breaks the schema."""
    return (torch.from_numpy(features.preprocess(vocabulary(assets), request)),)


def postprocess(outputs: dict[str, Any], request: dict[str, Any] | None = None, *, assets: Path) -> dict[str, Any]:
    """Ten films that the request does not name, best first, and the three task scores."""
    return features.postprocess(vocabulary(assets), outputs, request)


@functools.cache
def vocabulary(folder: Path) -> features.Vocabulary:
    """The films and their order, as training wrote them."""
    return features.Vocabulary.read(folder / "vocabulary.json")
