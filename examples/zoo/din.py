"""DIN (Zhou et al. 2018, "Deep Interest Network for Click-Through Rate Prediction").

The history is padded at its end with item 0. As in the paper the attention weights are not normalised, so that the
strength of an interest survives.

in   history  [B, 50] int64   items, oldest first, 0 where there is none
     target   [B] int64       the candidate item
out  click    [B] float32     probability
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

SIZES = {
    "full": {"items": 500_000, "dim": 32, "steps": 50, "attention": (80, 40), "top": (200, 80)},
    "small": {"items": 800, "dim": 8, "steps": 10, "attention": (16, 8), "top": (32, 16)},
}
input_names = ["history", "target"]


class Dice(nn.Module):
    """p(x) x + (1 - p(x)) alpha x, where p is the sigmoid of the normalised x (the paper's equation 3)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=1e-8, affine=False)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        p = torch.sigmoid(self.norm(x.reshape(-1, x.shape[-1]))).view_as(x)
        return p * x + (1 - p) * self.alpha * x


class DIN(nn.Module):
    def __init__(self, items: int, dim: int, attention: tuple[int, int], top: tuple[int, int]):
        super().__init__()
        self.items = nn.Embedding(items, dim, padding_idx=0)
        a, b = attention
        self.attention = nn.Sequential(nn.Linear(4 * dim, a), Dice(a), nn.Linear(a, b), Dice(b), nn.Linear(b, 1))
        a, b = top
        self.top = nn.Sequential(nn.Linear(3 * dim, a), nn.PReLU(a), nn.Linear(a, b), nn.PReLU(b), nn.Linear(b, 1))

    def forward(self, history: Tensor, target: Tensor) -> Tensor:
        keys = self.items(history)
        query = self.items(target)
        q = query.unsqueeze(1).expand_as(keys)
        weights = self.attention(torch.cat([q, keys, q - keys, q * keys], dim=-1)).squeeze(-1)
        weights = weights.masked_fill(history == 0, 0.0)
        interest = torch.matmul(weights.unsqueeze(1), keys).squeeze(1)
        logit = self.top(torch.cat([interest, query, interest * query], dim=-1))
        return torch.sigmoid(logit).squeeze(-1)


def get_model(size: str | None = None) -> nn.Module:
    """The model in eval mode, with the same weights every time. `size` defaults to GRC_ZOO_SIZE, else "full"."""
    sizes = dict(_sizes(size))
    sizes.pop("steps")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = DIN(**sizes)
        model.items.weight.mul_(0.3)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.normal_(module.bias, std=0.1)
            elif isinstance(module, Dice):
                nn.init.normal_(module.alpha, std=0.2)
                module.norm.running_mean.normal_(std=0.2)  # type: ignore[union-attr]
                module.norm.running_var.uniform_(0.2, 1.5)  # type: ignore[union-attr]
            elif isinstance(module, nn.PReLU):
                nn.init.uniform_(module.weight, 0.05, 0.4)
    return model.eval()


def get_inputs(batch: int, seed: int = 0, ids: str = "uniform", size: str | None = None) -> dict[str, Tensor]:
    """Keyword arguments for `batch` users. `ids` is how items are drawn: "uniform", or "zipf" for Zipf(1.05)."""
    sizes = _sizes(size)
    generator = torch.Generator().manual_seed(seed)
    steps = sizes["steps"]
    history = draw(ids, sizes["items"], (batch, steps), generator)
    length = torch.randint(steps // 2, steps + 1, (batch, 1), generator=generator)
    history = history.masked_fill(torch.arange(steps) >= length, 0)
    return {"history": history, "target": draw(ids, sizes["items"], (batch,), generator)}


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
        raise ValueError(f"din has no size {name!r}; it has {', '.join(SIZES)}")
    return SIZES[name]
