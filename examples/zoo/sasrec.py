"""SASRec (Kang and McAuley 2018, "Self-Attentive Sequential Recommendation"), with the hundred best of all items.

in   history  [B, 50] int64     items, oldest first, padded in front with item 0
out  scores   [B, 100] float32  falling
     items    [B, 100] int64    which items they are
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

SIZES = {
    "full": {"items": 50_000, "dim": 64, "steps": 50, "layers": 2, "heads": 2, "best": 100},
    "small": {"items": 600, "dim": 16, "steps": 12, "layers": 2, "heads": 2, "best": 20},
}
input_names = ["history"]


class Block(nn.Module):
    """Causal self-attention, then a point-wise feed-forward, each with a residual."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim, eps=1e-8)
        self.attention = nn.MultiheadAttention(dim, heads, dropout=0.2, batch_first=True)
        self.norm_forward = nn.LayerNorm(dim, eps=1e-8)
        self.forward_1 = nn.Linear(dim, dim)
        self.forward_2 = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor, causal: Tensor) -> Tensor:
        query = self.norm_attention(x)
        # As in the authors' code, only the query is normalised.
        attended, _ = self.attention(query, x, x, attn_mask=causal, need_weights=False)
        x = self.norm_forward(query + attended)
        return x + self.dropout(self.forward_2(self.dropout(torch.relu(self.forward_1(x)))))


class SASRec(nn.Module):
    def __init__(self, items: int, dim: int, steps: int, layers: int, heads: int, best: int):
        super().__init__()
        self.items = nn.Embedding(items, dim, padding_idx=0)
        self.positions = nn.Embedding(steps, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps=1e-8)
        self.dropout = nn.Dropout(0.2)
        self.dim = dim
        self.best = best

    def forward(self, history: Tensor) -> tuple[Tensor, Tensor]:
        steps = history.shape[1]
        x = self.items(history) * self.dim**0.5
        x = self.dropout(x + self.positions(torch.arange(steps, device=history.device)))
        real = (history != 0).unsqueeze(-1)
        x = x * real
        causal = torch.triu(torch.ones(steps, steps, dtype=torch.bool, device=history.device), diagonal=1)
        for block in self.blocks:
            x = block(x, causal) * real
        user = self.norm(x[:, -1])
        scores = user @ self.items.weight.t()
        values, indices = torch.topk(scores, self.best)
        return values, indices


def get_model(size: str | None = None) -> nn.Module:
    """The model in eval mode, with the same weights every time. `size` defaults to GRC_ZOO_SIZE, else "full"."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = SASRec(**_sizes(size))
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
        raise ValueError(f"sasrec has no size {name!r}; it has {', '.join(SIZES)}")
    return SIZES[name]
