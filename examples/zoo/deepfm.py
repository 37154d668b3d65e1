"""DeepFM (Guo et al. 2017, "DeepFM: A Factorization-Machine based Neural Network for CTR Prediction").

All fields share one table; a field's rows start at its offset. The pairwise term is the square of the sum less the sum
of the squares (Rendle 2010, lemma 3.1).

in   ids    [B, 39] int64   one id per field, each below the field's rows
out  click  [B] float32     probability
"""

from __future__ import annotations

import os
from itertools import pairwise

import torch
from torch import Tensor, nn

SIZES = {
    "full": {"fields": 39, "rows": 25_000, "dim": 16, "deep": (400, 400, 400)},
    "small": {"fields": 39, "rows": 300, "dim": 8, "deep": (48, 48)},
}
input_names = ["ids"]


class DeepFM(nn.Module):
    offsets: Tensor

    def __init__(self, fields: int, rows: int, dim: int, deep: tuple[int, ...]):
        super().__init__()
        self.embedding = nn.Embedding(fields * rows, dim)
        self.linear = nn.Embedding(fields * rows, 1)
        self.bias = nn.Parameter(torch.zeros(1))
        self.register_buffer("offsets", torch.arange(fields) * rows)
        layers: list[nn.Module] = []
        for wide, narrow in pairwise((fields * dim, *deep)):
            layers += [nn.Linear(wide, narrow), nn.ReLU(), nn.Dropout(0.5)]
        self.deep = nn.Sequential(*layers, nn.Linear(deep[-1], 1))

    def forward(self, ids: Tensor) -> Tensor:
        rows = ids + self.offsets
        v = self.embedding(rows)
        first = self.linear(rows).sum(dim=1) + self.bias
        second = 0.5 * (v.sum(dim=1).pow(2) - v.pow(2).sum(dim=1)).sum(dim=1, keepdim=True)
        return torch.sigmoid(first + second + self.deep(v.flatten(1))).squeeze(1)


def get_model(size: str | None = None) -> nn.Module:
    """The model in eval mode, with the same weights every time. `size` defaults to GRC_ZOO_SIZE, else "full"."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = DeepFM(**_sizes(size))
        nn.init.normal_(model.bias, std=0.1)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.mul_(0.05)
            elif isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def get_inputs(batch: int, seed: int = 0, ids: str = "uniform", size: str | None = None) -> tuple[Tensor]:
    """Requests of `batch` rows. `ids` is how the ids are drawn: "uniform", or "zipf" for Zipf(1.05)."""
    sizes = _sizes(size)
    generator = torch.Generator().manual_seed(seed)
    return (draw(ids, sizes["rows"], (batch, sizes["fields"]), generator),)


def draw(kind: str, rows: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Ids in [0, rows) of the given shape."""
    if kind == "uniform":
        return torch.randint(rows, shape, generator=generator)
    if kind == "zipf":
        weights = torch.arange(1, rows + 1, dtype=torch.float64).pow(-1.05)
        ranks = torch.multinomial(weights, torch.Size(shape).numel(), replacement=True, generator=generator)
        # Popular ids are scattered over the table, as hashed ids are; else the hot rows would share cache lines.
        return torch.randperm(rows, generator=torch.Generator().manual_seed(rows))[ranks].view(shape)
    raise ValueError(f"ids are drawn 'uniform' or 'zipf', not {kind!r}")


def _sizes(size: str | None) -> dict:
    name = size or os.environ.get("GRC_ZOO_SIZE", "full")
    if name not in SIZES:
        raise ValueError(f"deepfm has no size {name!r}; it has {', '.join(SIZES)}")
    return SIZES[name]
