"""DCN-V2 (Wang et al. 2021, "DCN V2: Improved Deep & Cross Network"), stacked: cross layers, then the deep part.

in   ids    [B, 39] int64   one id per field, each below the field's rows
out  click  [B] float32     probability
"""

from __future__ import annotations

import os
from itertools import pairwise

import torch
from torch import Tensor, nn

SIZES = {
    "full": {"fields": 39, "rows": 20_000, "dim": 16, "crosses": 3, "deep": (1024, 512, 256)},
    "small": {"fields": 39, "rows": 300, "dim": 8, "crosses": 3, "deep": (64, 32)},
}
input_names = ["ids"]


class Cross(nn.Module):
    """x0 * (W x + b) + x with a full-rank W (the paper's equation 1)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        return x0 * self.linear(x) + x


class DCNv2(nn.Module):
    def __init__(self, fields: int, rows: int, dim: int, crosses: int, deep: tuple[int, ...]):
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(rows, dim) for _ in range(fields))
        width = fields * dim
        self.crosses = nn.ModuleList(Cross(width) for _ in range(crosses))
        layers: list[nn.Module] = []
        for wide, narrow in pairwise((width, *deep)):
            layers += [nn.Linear(wide, narrow), nn.ReLU(), nn.Dropout(0.1)]
        self.deep = nn.Sequential(*layers)
        self.logit = nn.Linear(deep[-1], 1)

    def forward(self, ids: Tensor) -> Tensor:
        x0 = torch.cat([embedding(ids[:, i]) for i, embedding in enumerate(self.embeddings)], dim=-1)
        x = x0
        for cross in self.crosses:
            x = cross(x0, x)
        return torch.sigmoid(self.logit(self.deep(x))).squeeze(-1)


def get_model(size: str | None = None) -> nn.Module:
    """The model in eval mode, with the same weights every time. `size` defaults to GRC_ZOO_SIZE, else "full"."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = DCNv2(**_sizes(size))
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                # Wider than 0.05: a cross layer multiplies embeddings, and would else hand its input on unchanged.
                module.weight.mul_(0.3)
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
        raise ValueError(f"dcnv2 has no size {name!r}; it has {', '.join(SIZES)}")
    return SIZES[name]
