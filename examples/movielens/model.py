"""The recommender as a grc model file: `grc compile examples/movielens/model.py`, after `train.py` wrote a checkpoint.

in   features        [B, 10, 1024] float32   see features.py
out  recommendation  [B, 1682] float32       a score for every film, in the vocabulary's order
     engagement      [B] float32             probability; train.py says of what
     retention       [B] float32             probability
     monetization    [B] float32             probability

GRC_MOVIELENS_SIZE picks the checkpoint, "small" (the default) or "seed"; GRC_MOVIELENS_CHECKPOINT names a folder
instead.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

# A model file is loaded by its path, from any folder: its neighbours must be found all the same.
_EXAMPLES = str(Path(__file__).resolve().parent.parent)
if _EXAMPLES not in sys.path:
    sys.path.append(_EXAMPLES)

from movielens import features  # noqa: E402
from movielens.schema import Request  # noqa: E402
from movielens.serving import postprocess, preprocess, vocabulary  # noqa: E402

SIZES = {
    "seed": {"width": 512, "heads": 8, "ffn": 2048, "layers": 6},
    "small": {"width": 128, "heads": 4, "ffn": 512, "layers": 2},
}
CHECKPOINTS = Path(__file__).resolve().parent / ".data"
input_names = ["features"]
__all__ = ["assets", "calibration", "get_inputs", "get_model", "input_names", "postprocess", "preprocess"]


class Layer(nn.Module):
    """A Transformer layer that normalises before each branch (Xiong et al. 2020)."""

    def __init__(self, width: int, heads: int, ffn: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_ffn = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, ffn), nn.GELU(), nn.Linear(ffn, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, steps, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, steps, width)
        x = x + self.dropout(self.out(attended))
        return x + self.dropout(self.ffn(self.norm_ffn(x)))


class Recommender(nn.Module):
    def __init__(self, films: int, width: int, heads: int, ffn: int, layers: int, dropout: float = 0.0):
        super().__init__()
        self.project = nn.Linear(features.WIDTH, width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(width, heads, ffn, dropout) for _ in range(layers))
        self.recommendation = nn.Linear(width, films)
        self.tasks = nn.ModuleDict({name: nn.Linear(width, 1) for name in ("engagement", "retention", "monetization")})

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        x = self.dropout(self.project(features))
        for layer in self.layers:
            x = layer(x)
        user = x.mean(dim=1)
        answers = {name: torch.sigmoid(head(user)).squeeze(-1) for name, head in self.tasks.items()}
        return {"recommendation": self.recommendation(user), **answers}


def checkpoint() -> Path:
    """The folder with config.json, vocabulary.json, requests.json, targets.json and model.safetensors.

    Raises FileNotFoundError, which says how to train one.
    """
    size = os.environ.get("GRC_MOVIELENS_SIZE", "small")
    if size not in SIZES:
        raise ValueError(f"GRC_MOVIELENS_SIZE is {size!r}; the sizes are {', '.join(SIZES)}")
    folder = Path(os.environ.get("GRC_MOVIELENS_CHECKPOINT") or CHECKPOINTS / f"checkpoint-{size}")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no checkpoint in {folder}; run: python examples/movielens/train.py --size {size}")
    return folder


def get_model() -> nn.Module:
    """The trained recommender, in eval mode."""
    folder = checkpoint()
    model = Recommender(**json.loads((folder / "config.json").read_text())["model"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def get_inputs(batch: int, seed: int = 0) -> tuple[Tensor]:
    """Features of `batch` real requests, drawn from those that training set aside."""
    requests = _requests(checkpoint())
    picks = torch.randint(len(requests), (batch,), generator=torch.Generator().manual_seed(seed))
    return (_encode([requests[i] for i in picks.tolist()]),)


def calibration() -> list[dict[str, Any]]:
    """The requests that training set aside, in batches of 64, labelled with the film that each user rated next."""
    requests = _requests(checkpoint())
    targets = torch.tensor(json.loads((checkpoint() / "targets.json").read_text()))
    parts = range(0, len(requests), 64)
    return [{"inputs": (_encode(requests[i : i + 64]),), "labels": targets[i : i + 64]} for i in parts]


def assets() -> list[Path]:
    """Files that preprocess and postprocess read, and a request for people to begin with: the artifact carries them."""
    return [checkpoint() / "vocabulary.json", Path(__file__).parent / "request.json"]


def _encode(requests: list[Request]) -> Tensor:
    words = vocabulary(checkpoint())
    return torch.from_numpy(features.encode(words, features.windows(words, requests)))


@functools.cache
def _requests(folder: Path) -> list[Request]:
    return [Request.from_json(entry) for entry in json.loads((folder / "requests.json").read_text())]
