"""HSTU (Zhai et al. 2024, "Actions Speak Louder than Words"): point-wise SiLU attention with a relative position bias.

in   history  [B, 200] int64    items, oldest first, padded in front with item 0
out  scores   [B, 100] float32  falling
     items    [B, 100] int64    which items they are
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {
    "full": {"items": 50_000, "dim": 128, "steps": 200, "layers": 4, "heads": 4, "best": 100},
    "small": {"items": 600, "dim": 16, "steps": 16, "layers": 2, "heads": 2, "best": 20},
}
input_names = ["history"]


class Block(nn.Module):
    """One layer: project to u, v, q, k; attend without softmax; gate by u (the paper's equations 1 to 3)."""

    def __init__(self, dim: int, heads: int, steps: int):
        super().__init__()
        self.heads = heads
        self.norm_in = nn.LayerNorm(dim, eps=1e-6)
        self.uvqk = nn.Linear(dim, 4 * dim)
        self.bias = nn.Parameter(torch.zeros(2 * steps - 1))
        self.norm_attended = nn.LayerNorm(dim, eps=1e-6)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, allowed: Tensor, distance: Tensor) -> Tensor:
        batch, steps, dim = x.shape
        u, v, q, k = F.silu(self.uvqk(self.norm_in(x))).chunk(4, dim=-1)
        q, k, v = (t.view(batch, steps, self.heads, -1) for t in (q, k, v))
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) + self.bias[distance]
        weights = F.silu(scores) / steps * allowed
        attended = torch.einsum("bhnm,bmhd->bnhd", weights, v).reshape(batch, steps, dim)
        return x + self.out(u * self.norm_attended(attended))


class HSTU(nn.Module):
    distance: Tensor
    causal: Tensor

    def __init__(self, items: int, dim: int, steps: int, layers: int, heads: int, best: int):
        super().__init__()
        self.items = nn.Embedding(items, dim, padding_idx=0)
        self.positions = nn.Embedding(steps, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, steps) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.best = best
        order = torch.arange(steps)
        self.register_buffer("distance", order[None, :] - order[:, None] + steps - 1, persistent=False)
        self.register_buffer("causal", torch.ones(steps, steps).tril(), persistent=False)

    def forward(self, history: Tensor) -> tuple[Tensor, Tensor]:
        real = (history != 0).to(self.items.weight.dtype)
        x = (self.items(history) * self.items.embedding_dim**0.5 + self.positions.weight) * real.unsqueeze(-1)
        allowed = self.causal * real[:, None, None, :]
        for block in self.blocks:
            x = block(x, allowed, self.distance)
        user = self.norm(x[:, -1])
        values, indices = torch.topk(user @ self.items.weight.t(), self.best)
        return values, indices


def get_model(size: str | None = None) -> nn.Module:
    """The model in eval mode, with the same weights every time. `size` defaults to GRC_ZOO_SIZE, else "full"."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = HSTU(**_sizes(size))
        for name, parameter in model.named_parameters():
            if name == "items.weight" or name == "positions.weight":
                parameter.mul_(0.05)
            elif parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
            elif "norm" in name and name.endswith("weight"):
                nn.init.normal_(parameter, mean=1.0, std=0.1)
            else:
                nn.init.normal_(parameter, std=0.1)
    return model.eval()


def get_inputs(batch: int, seed: int = 0, ids: str = "uniform", size: str | None = None) -> tuple[Tensor]:
    """Histories of `batch` users. `ids` is how the items are drawn: "uniform", or "zipf" for Zipf(1.05)."""
    sizes = _sizes(size)
    generator = torch.Generator().manual_seed(seed)
    steps = sizes["steps"]
    history = draw(ids, sizes["items"], (batch, steps), generator)
    length = torch.randint(steps // 2, steps + 1, (batch, 1), generator=generator)
    return (history.masked_fill(torch.arange(steps) < steps - length, 0),)


def draw(kind: str, rows: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Ids in [1, rows): 0 is padding of the given shape."""
    if kind == "uniform":
        return torch.randint(1, rows, shape, generator=generator)
    if kind == "zipf":
        weights = torch.arange(1, rows, dtype=torch.float64).pow(-1.05)
        ranks = torch.multinomial(weights, torch.Size(shape).numel(), replacement=True, generator=generator)
        # Popular ids are scattered over the table, as hashed ids are; else the hot rows would share cache lines.
        return 1 + torch.randperm(rows - 1, generator=torch.Generator().manual_seed(rows))[ranks].view(shape)
    raise ValueError(f"ids are drawn 'uniform' or 'zipf', not {kind!r}")


def _sizes(size: str | None) -> dict:
    name = size or os.environ.get("GRC_ZOO_SIZE", "full")
    if name not in SIZES:
        raise ValueError(f"hstu has no size {name!r}; it has {', '.join(SIZES)}")
    return SIZES[name]
