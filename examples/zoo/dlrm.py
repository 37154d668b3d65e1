"""DLRM (Naumov et al. 2019, "Deep Learning Recommendation Model for Personalization and Recommendation Systems").

in   dense  [B, 13] float32   numeric features
     ids    [B, 26] int64     one id per table, each below the table's rows
out  click  [B] float32       probability
"""

from __future__ import annotations

import os
from itertools import pairwise

import torch
from torch import Tensor, nn

SIZES = {
    "full": {"tables": 26, "rows": 100_000, "dim": 64, "dense": 13, "bottom": (512, 256), "top": (512, 256)},
    "gpu": {"tables": 26, "rows": 100_000, "dim": 128, "dense": 13, "bottom": (512, 256), "top": (512, 256)},
    "small": {"tables": 26, "rows": 500, "dim": 16, "dense": 13, "bottom": (64, 32), "top": (64, 32)},
}
input_names = ["dense", "ids"]


class DLRM(nn.Module):
    def __init__(self, tables: int, rows: int, dim: int, dense: int, bottom: tuple[int, ...], top: tuple[int, ...]):
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(rows, dim, mode="sum") for _ in range(tables))
        self.bottom = mlp((dense, *bottom, dim), last=nn.ReLU())
        pairs = (tables + 1) * tables // 2
        self.top = mlp((dim + pairs, *top, 1), last=nn.Sigmoid())

    def interact(self, x: Tensor, pooled: list[Tensor]) -> Tensor:
        """[B, D] and 26 of [B, D] -> [B, D + 351]: the dense vector beside all pairwise dot products."""
        t = torch.stack([x, *pooled], dim=1)
        z = torch.bmm(t, t.transpose(1, 2))
        n = z.shape[1]
        li = torch.tensor([i for i in range(n) for _ in range(i)])
        lj = torch.tensor([j for i in range(n) for j in range(i)])
        return torch.cat([x, z[:, li, lj]], dim=1)

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        pooled = [bag(ids[:, i : i + 1]) for i, bag in enumerate(self.bags)]
        return self.top(self.interact(self.bottom(dense), pooled)).squeeze(1)


def mlp(sizes: tuple[int, ...], last: nn.Module) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(sizes):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*layers[:-1], last)


def get_model(size: str | None = None) -> nn.Module:
    """The model in eval mode, with the same weights every time. `size` defaults to GRC_ZOO_SIZE, else "full"."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = DLRM(**_sizes(size))
        for module in model.modules():
            if isinstance(module, nn.EmbeddingBag):
                module.weight.mul_(0.05)
            elif isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def get_inputs(batch: int, seed: int = 0, ids: str = "uniform", size: str | None = None) -> tuple[Tensor, Tensor]:
    """Requests of `batch` rows. `ids` is how the ids are drawn: "uniform", or "zipf" for Zipf(1.05)."""
    sizes = _sizes(size)
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(batch, sizes["dense"], generator=generator)
    return dense, draw(ids, sizes["rows"], (batch, sizes["tables"]), generator)


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
        raise ValueError(f"dlrm has no size {name!r}; it has {', '.join(SIZES)}")
    return SIZES[name]
