"""Quality: what fewer bits may cost, in the terms of ranking, and what they do cost on calibration data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from grc.errors import GrcError
from grc.runtime.closeness import largest_error
from grc.runtime.structure import Json
from grc.runtime.weights import read_weights

MAX_ERROR, OVERLAP, AUC, NDCG = "max-error", "topk-overlap", "auc-drop", "ndcg-drop"
METRICS = (MAX_ERROR, OVERLAP, AUC, NDCG)
DEFAULT = ("max-error=0.02",)
FORM = re.compile(r"^(?P<metric>[a-z-]+?)(@(?P<k>\d+))?=(?P<bound>[0-9.eE+-]+)$")


@dataclass(frozen=True)
class Limit:
    """One limit of a budget. `topk-overlap` is a floor, all others are ceilings."""

    metric: str
    k: int | None
    bound: float

    @property
    def name(self) -> str:
        return self.metric if self.k is None else f"{self.metric}@{self.k}"

    @property
    def needs_labels(self) -> bool:
        return self.metric in (AUC, NDCG)

    def inside(self, value: float) -> bool:
        return value >= self.bound if self.metric == OVERLAP else value <= self.bound

    def lost(self, value: float) -> float:
        """The share of what the limit allows to lose that is lost; 1 is at the limit."""
        loss, allowed = (1.0 - value, 1.0 - self.bound) if self.metric == OVERLAP else (value, self.bound)
        if loss <= 0:
            return 0.0
        return loss / allowed if allowed > 0 else math.inf

    def __str__(self) -> str:
        return f"{self.name}={self.bound:g}"


def budget(texts: Sequence[str]) -> tuple[Limit, ...]:
    """`max-error=0.02`, `topk-overlap@100=0.99`, `auc-drop=0.001`, `ndcg-drop@10=0.005`; DEFAULT where there is none.

    max-error is the largest difference from the float32 answer, as a share of the largest answer of that output.
    topk-overlap is the share of the k best that stay among them, ndcg-drop and auc-drop what is lost of the metric itself.
    Raises GrcError for anything else.
    """
    return tuple(limit(text.strip()) for text in (texts or DEFAULT))


def limit(text: str) -> Limit:
    found = FORM.match(text)
    metric = found["metric"] if found else ""
    ranked = metric in (OVERLAP, NDCG)
    k = int(found["k"]) if found and found["k"] else None
    try:
        bound = float(found["bound"]) if found else math.nan
    except ValueError:
        bound = math.nan
    if not found or metric not in METRICS or ranked != (found["k"] is not None) or not 0 <= bound <= 1 or k == 0:
        raise GrcError(
            f"{text!r} is no limit of quality",
            "write --budget max-error=0.02, topk-overlap@100=0.99, auc-drop=0.001 or ndcg-drop@10=0.005",
        )
    return Limit(metric, k, bound)


@dataclass(frozen=True)
class Truth:
    """The float32 answers to the calibration requests, and labels where there are some."""

    answers: Sequence[Sequence[Tensor]]
    labels: Sequence[Tensor] | None = None

    def measure(self, answers: Sequence[Sequence[Tensor]], limits: Sequence[Limit]) -> dict[str, float]:
        """The value of every limit's metric, by name."""
        return {limit.name: self.one(limit, answers) for limit in limits}

    def one(self, limit: Limit, answers: Sequence[Sequence[Tensor]]) -> float:
        if limit.metric == MAX_ERROR:
            return max(floats_error(a, t) for a, t in zip(answers, self.answers, strict=True))
        if limit.metric == OVERLAP:
            return overlap(self.answers, answers, limit.k or 1)
        assert self.labels is not None
        labels = torch.cat([label.reshape(-1) for label in self.labels])
        rank = 1 if limit.metric == AUC else 2
        before, after = (scores_of(rows, rank) for rows in (self.answers, answers))
        if len(labels) != len(before):
            raise GrcError(
                f"the calibration data has {len(labels)} labels for {len(before)} rows", "give one label a row"
            )
        if limit.metric == AUC:
            return auc(before, labels) - auc(after, labels)
        return ndcg(before, labels, limit.k or 1) - ndcg(after, labels, limit.k or 1)


def rows_of(batch: Sequence[Tensor], sizes: Sequence[Sequence[Json]]) -> int:
    """The rows of a batch of inputs, whose sizes are given as a manifest has them; 1 where none follows the batch."""
    for tensor, entry in zip(batch, sizes, strict=True):
        for have, size in zip(tensor.shape, entry, strict=True):
            if size == "batch":
                return have
            if isinstance(size, dict):
                return (have - size["offset"]) // size["scale"]
    return 1


def read_kept(path: Path) -> tuple[list[list[Tensor]], Truth]:
    """The calibration rows that an artifact carries, in batches, and the float32 answers to them, as `Reference.tensors` has
    named them."""
    found: dict[int, dict[str, dict[int, Tensor]]] = {}
    for key, tensor in read_weights(path).items():
        batch, kind, index = key.split(".")
        found.setdefault(int(batch), {"input": {}, "output": {}, "label": {}})[kind][int(index)] = tensor
    batches = [{kind: [parts[i] for i in sorted(parts)] for kind, parts in found[b].items()} for b in sorted(found)]
    labels = [batch["label"][0] for batch in batches] if batches[0]["label"] else None
    return [batch["input"] for batch in batches], Truth([batch["output"] for batch in batches], labels)


def inside(limits: Sequence[Limit], values: Mapping[str, float]) -> bool:
    return all(limit.inside(values[limit.name]) for limit in limits)


def lost(limits: Sequence[Limit], values: Mapping[str, float]) -> float:
    """How much of the budget is spent: the limit that is nearest."""
    return max(limit.lost(values[limit.name]) for limit in limits)


def worst(limits: Sequence[Limit], found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The worst value of each limit's metric."""
    return {
        limit.name: (min if limit.metric == OVERLAP else max)(values[limit.name] for values in found)
        for limit in limits
    }


def floats_error(answer: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest error of an output relative to its own largest value: what a small probability loses shows, too."""
    worst = 0.0
    for a, t in zip(answer, truth, strict=True):
        if t.is_floating_point() and t.numel():
            scale = t.double().abs().nan_to_num(0.0, 0.0).amax().item() or 1.0  # items that are masked hold -infinity
            worst = max(worst, largest_error([a.double() / scale], [t.double() / scale]))
    return worst


def overlap(truth: Sequence[Sequence[Tensor]], answers: Sequence[Sequence[Tensor]], k: int) -> float:
    """The mean share of the k best that are kept, over the rows of the output where it is least.

    The k best of scores [B, N], or of ids [B, K] the first k. Raises GrcError where no output ranks as many.
    """
    shares = []
    for i, first in enumerate(truth[0]):
        if first.dim() != 2 or first.shape[1] < k:
            continue
        kept = [shared(best(t[i], k), best(a[i], k)) for t, a in zip(truth, answers, strict=True)]
        shares.append(torch.cat(kept).mean().item())
    if not shares:
        raise GrcError(f"no output ranks {k} items", "choose a smaller k in --budget topk-overlap@K, or max-error")
    return min(shares)


def best(output: Tensor, k: int) -> Tensor:
    return output.topk(k, 1).indices if output.is_floating_point() else output[:, :k]


def shared(a: Tensor, b: Tensor) -> Tensor:
    """[B]: which share of each row of a is in the same row of b."""
    return (a.unsqueeze(2) == b.unsqueeze(1)).any(2).double().mean(1)


def scores_of(batches: Sequence[Sequence[Tensor]], rank: int) -> Tensor:
    """The first output with one score a row (rank 1), or with one for each of several items (rank 2)."""
    for i, first in enumerate(batches[0]):
        single = first.dim() == 1 or (first.dim() == 2 and first.shape[1] == 1)
        if first.is_floating_point() and (single if rank == 1 else first.dim() == 2 and first.shape[1] > 1):
            return torch.cat([rows[i].reshape(-1) if rank == 1 else rows[i] for rows in batches]).double()
    what = "one score a row, which auc-drop is about" if rank == 1 else "scores of items, which ndcg-drop is about"
    raise GrcError(f"no output holds {what}", "choose another --budget")


def auc(scores: Tensor, labels: Tensor) -> float:
    """The area under the ROC curve, ties counted half. Raises GrcError where all labels are alike."""
    positive = labels == 1
    count, others = int(positive.sum()), int((~positive).sum())
    if not count or not others:
        raise GrcError("the labels of the calibration data are all alike", "give labels of both kinds for auc-drop")
    _, place, ties = torch.unique(scores, return_inverse=True, return_counts=True)
    ranks = ties.cumsum(0).double() - (ties.double() - 1) / 2
    return ((ranks[place][positive].sum() - count * (count + 1) / 2) / (count * others)).item()


def ndcg(scores: Tensor, labels: Tensor, k: int) -> float:
    """NDCG@k of one relevant item a row: labels [B] name it (Järvelin and Kekäläinen 2002).

    Raises GrcError where a label is not the number of an item.
    """
    numbers = labels.double()
    wrong = ((numbers != numbers.floor()) | (numbers < 0) | (numbers >= scores.shape[1])).nonzero()  # NaN is unequal
    if len(wrong):
        raise GrcError(
            f"the calibration data has the label {numbers[wrong[0, 0]].item():g}; ndcg-drop takes items, 0 to "
            f"{scores.shape[1] - 1}",
            "give for each row the number of its relevant item, or leave ndcg-drop out of --budget",
        )
    own = scores.gather(1, labels.long().unsqueeze(1))
    place = (scores > own).sum(1)
    return torch.where(place < k, 1.0 / torch.log2(place.double() + 2.0), 0.0).mean().item()
