"""What the tests of the command line share: a tiny model file, what a call of grc left, and how a refusal looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grc.runtime.artifact import read_manifest, write_manifest

MODEL = """\
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.users = nn.Embedding(50, 8)
        self.items = nn.Embedding(80, 8)
        self.top = nn.Linear(19, 1)

    def forward(self, dense, ids):
        both = torch.cat([self.users(ids[:, 0]), self.items(ids[:, 1]), dense], dim=1)
        return torch.sigmoid(self.top(both)).squeeze(1)


def get_model():
    torch.manual_seed(0)
    return Tiny().eval()


def get_inputs(batch):
    make = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, generator=make), torch.randint(50, (batch, 2), generator=make)
"""

SERVED = """\
from tiny import get_model, get_inputs
from words import preprocess, postprocess
"""

WORDS = """\
import torch


def preprocess(request):
    return torch.tensor([request["dense"]]), torch.tensor([[request["user"], request["item"]]])


def postprocess(outputs, request):
    return {"user": request["user"], "click": round(float(outputs[0]), 4)}
"""


@dataclass(frozen=True)
class Ran:
    """What one call of grc left: its exit code, its data and its words."""

    code: int
    out: str
    err: str
    raw: bytes

    @property
    def told(self) -> list[str]:
        """stderr without the lines of progress."""
        return [line for line in self.err.splitlines() if not line.startswith("  ")]


Grc = Callable[..., Ran]


def edit_manifest(artifact: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest and sign it anew, so that only the change is left to be found."""
    manifest = read_manifest(artifact)
    change(manifest)
    write_manifest(artifact, manifest)


def refused(ran: Ran, *lines: str) -> None:
    """Exit code 1, these lines and no others on stderr, nothing on stdout."""
    assert (ran.told, ran.out, ran.code) == (list(lines), "", 1)
