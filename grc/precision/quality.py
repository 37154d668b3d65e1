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

    max-error is the largest difference from the float32 answer, as a share of the largest answer of that output; of whole
    numbers the share that is lost (`integers_error`), but for rankings that a topk-overlap of the same budget is about.
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
        """The value of every limit's metric, by name. NaN or infinity in place of a number is as bad as can be."""
        if any(overflows(a, t) for a, t in zip(answers, self.answers, strict=True)):
            return {limit.name: 0.0 if limit.metric == OVERLAP else math.inf for limit in limits}
        ranked = min((limit.k or 1 for limit in limits if limit.metric == OVERLAP), default=None)
        return {limit.name: self.one(limit, answers, ranked) for limit in limits}

    def one(self, limit: Limit, answers: Sequence[Sequence[Tensor]], ranked: int | None = None) -> float:
        """`ranked` is the least K of the budget's topk-overlap@K, which bounds rankings of as many."""
        if limit.metric == MAX_ERROR:
            floats = max(floats_error(a, t) for a, t in zip(answers, self.answers, strict=True))
            return max(floats, integers_error(answers, self.answers, ranked))
        if limit.metric == OVERLAP:
            return overlap(self.answers, answers, limit.k or 1)
        rank = 1 if limit.metric == AUC else 2
        before, items = scores_of(self.answers, rank)
        after, found = scores_of(answers, rank)
        labels = self.labels_of(before)
        if limit.metric == AUC:
            return auc(before, labels) - auc(after, labels)
        return ndcg(before, labels, limit.k or 1, items) - ndcg(after, labels, limit.k or 1, found)

    def labels_of(self, scores: Tensor) -> Tensor:
        """One label for each row of scores. Raises GrcError for more or fewer."""
        assert self.labels is not None
        labels = torch.cat([label.reshape(-1) for label in self.labels])
        if len(labels) != len(scores):
            raise GrcError(
                f"the calibration data has {len(labels)} labels for {len(scores)} rows", "give one label a row"
            )
        return labels

    def unbounded(self, limits: Sequence[Limit]) -> list[str]:
        """A note for each limit that nothing can break, since there is nothing to lose."""
        notes = []
        for limit in limits:
            if limit.metric == NDCG:
                scores, items = scores_of(self.answers, 2)
                if not ndcg(scores, self.labels_of(scores), limit.k or 1, items):
                    notes.append(f"{limit} bounds nothing: no label is among the {limit.k} best of its row")
        return notes


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


def overflows(answer: Sequence[Tensor], truth: Sequence[Tensor]) -> bool:
    """True where an output holds NaN or infinity and the truth a number."""
    floats = [(a, t) for a, t in zip(answer, truth, strict=True) if t.is_floating_point()]
    return any(bool((torch.isfinite(t) & ~torch.isfinite(a)).any()) for a, t in floats)


def integers_error(
    answers: Sequence[Sequence[Tensor]], truth: Sequence[Sequence[Tensor]], ranked: int | None = None
) -> float:
    """The largest share that an output of whole numbers loses.

    Of a ranking, ids [B, K] that are distinct in every row, that is the mean share of the first k that are not among them
    any more, over every k: the order counts, and most of all at the top. Of any other, the share of numbers that differ.
    Rankings of `ranked` ids or more are left out.
    """
    worst = 0.0
    for i, first in enumerate(truth[0]):
        if first.is_floating_point():
            continue
        pairs = [(a[i], t[i]) for a, t in zip(answers, truth, strict=True) if t[i].numel()]
        ranking = first.dim() == 2 and first.dtype is not torch.bool and all(distinct(t) for _, t in pairs)
        if not pairs or (ranking and ranked is not None and first.shape[1] >= ranked):
            continue
        lost = torch.cat([out_of_place(a, t) if ranking else (a != t).double().flatten() for a, t in pairs])
        worst = max(worst, lost.mean().item())
    return worst


def distinct(ids: Tensor) -> bool:
    return bool((ids.sort(1).values.diff(dim=1) != 0).all())


def out_of_place(a: Tensor, t: Tensor) -> Tensor:
    """[B]: which share of the first k of t is not among the first k of a, as a mean over every k of 1 to K."""
    count = t.shape[1]
    there, own = a.sort(1), torch.arange(count)
    place = torch.searchsorted(there.values, t.contiguous()).clamp(max=count - 1)
    kept = there.values.gather(1, place) == t
    both = torch.maximum(there.indices.gather(1, place), own)  # from there on an id is among both
    shares = (1.0 / torch.arange(1, count + 1, dtype=torch.float64)).flip(0).cumsum(0).flip(0) / count
    return (shares - shares[both] * kept).sum(1)


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


def scores_of(batches: Sequence[Sequence[Tensor]], rank: int) -> tuple[Tensor, Tensor | None]:
    """The first output with one score a row (rank 1), or with one for each of several items (rank 2), and then the items
    that are scored, where whole numbers of the same shape are beside the scores."""
    for i, first in enumerate(batches[0]):
        single = first.dim() == 1 or (first.dim() == 2 and first.shape[1] == 1)
        if first.is_floating_point() and (single if rank == 1 else first.dim() == 2 and first.shape[1] > 1):
            scores = torch.cat([rows[i].reshape(-1) if rank == 1 else rows[i] for rows in batches]).double()
            beside = (
                j for j, t in enumerate(batches[0]) if t.dtype in (torch.int32, torch.int64) and t.shape == first.shape
            )
            items = next(beside, None) if rank == 2 else None
            return scores, None if items is None else torch.cat([rows[items] for rows in batches])
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


def ndcg(scores: Tensor, labels: Tensor, k: int, items: Tensor | None = None) -> float:
    """NDCG@k of one relevant item a row (Järvelin and Kekäläinen 2002): labels [B] name it, among the `items` [B, N] that
    are scored or by its column. What is not among them is not found.

    Raises GrcError where a label can't be an item.
    """
    numbers = labels.double()
    end = scores.shape[1] if items is None else math.inf
    wrong = (numbers != numbers.floor()) | (numbers < 0) | (numbers >= end)  # NaN is unequal
    if wrong.any():
        which = f"items, 0 to {scores.shape[1] - 1}" if items is None else "ids of items"
        raise GrcError(
            f"the calibration data has the label {numbers[wrong][0].item():g}; ndcg-drop takes {which}",
            "give for each row the number of its relevant item, or leave ndcg-drop out of --budget",
        )
    labels = labels.long().unsqueeze(1)
    found = torch.ones_like(labels) if items is None else (items == labels)
    column = labels if items is None else found.int().argmax(1, keepdim=True)
    place = (scores > scores.gather(1, column)).sum(1)
    return torch.where(found.any(1) & (place < k), 1.0 / torch.log2(place.double() + 2.0), 0.0).mean().item()
