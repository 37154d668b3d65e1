"""Random recommenders with planted patterns: whatever they are made of, every pass is proven and the answers are equal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from grc.graph.oracle import largest_error
from grc.kernels import FUSIONS
from grc.options import Options
from grc.passes.manager import Proof, run_passes
from grc.passes.pipeline import pipeline
from tests.passes.small import graph_of, rows

EXTRAS = (torch.relu, torch.sigmoid, lambda x: x * 2, lambda x: x.pow(2), lambda x: x + x.mean(1, keepdim=True))


@dataclass(frozen=True)
class Plan:
    """What a random model is made of."""

    widths: tuple[int, ...]
    lengths: tuple[int, ...]
    limits: tuple[int, ...]
    pooling: str
    bags: bool
    interaction: str
    extras: tuple[int, ...]
    early: int


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    count = draw(st.integers(1, 5))
    same = draw(st.booleans())
    width = draw(st.sampled_from([1, 3, 4, 8]))
    pooled = draw(st.booleans())
    each = st.lists(st.integers(1, 4), min_size=count, max_size=count)
    return Plan(
        widths=(width,) * count if same else tuple(draw(each)),
        lengths=tuple(draw(each)) if pooled else (1,) * count,
        limits=tuple(draw(st.lists(st.integers(1, 20), min_size=count, max_size=count))),
        pooling=draw(st.sampled_from(["sum", "mean", "max"])),
        bags=draw(st.booleans()),
        interaction=draw(st.sampled_from(["cat", "dot", "fm", "cross"])),
        extras=tuple(draw(st.lists(st.integers(0, len(EXTRAS) - 1), max_size=3))),
        early=draw(st.integers(0, count - 1)),
    )


def pool(x: torch.Tensor, pooling: str) -> torch.Tensor:
    return x.amax(1) if pooling == "max" else x.sum(1) if pooling == "sum" else x.mean(1)


def build(plan: Plan):
    """(forward, modules) of a plan."""
    kind = (lambda n, d: nn.EmbeddingBag(n, d, mode=plan.pooling)) if plan.bags else nn.Embedding
    tables = nn.ModuleList(kind(n, d) for n, d in zip(plan.limits, plan.widths, strict=True))
    total = sum(plan.widths)
    cross = nn.Linear(total, total)

    def forward(self, x, dense):
        found, start = [], 0
        for table, length in zip(self.tables, plan.lengths, strict=True):
            part = x[:, start : start + length]
            found.append(table(part) if plan.bags else pool(table(part), plan.pooling))
            start += length
        early = found[plan.early].sum(1)
        flat = torch.cat(found, 1)
        alike = len(set(plan.widths)) == 1
        if plan.interaction == "dot" and alike:
            t = torch.stack(found, 1)
            i, j = torch.tril_indices(len(found), len(found), 0)
            out = (t @ t.transpose(1, 2))[:, i, j]
        elif plan.interaction == "fm" and alike:
            t = torch.stack(found, 1)
            out = 0.5 * (t.sum(1).square() - t.square().sum(1)).sum(1, keepdim=True)
        elif plan.interaction == "cross":
            out = flat * self.cross(flat) + flat
        else:
            out = flat
        for extra in plan.extras:
            out = EXTRAS[extra](out)
        return torch.cat([out, dense, flat], 1), early

    return forward, {"tables": tables, "cross": cross}


def request(plan: Plan, batch: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    columns = [
        torch.randint(0, limit, (batch, length), generator=generator)
        for limit, length in zip(plan.limits, plan.lengths, strict=True)
    ]
    return [torch.cat(columns, 1), rows(batch, 2)]


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(plans())
def test_every_pass_is_proven_and_answers_are_equal(plan: Plan) -> None:
    torch.manual_seed(0)
    forward, modules = build(plan)
    graph = graph_of(forward, *request(plan, 7), **modules)
    proof = Proof([request(plan, 3), request(plan, 33)]).prepare(graph)
    after, records = run_passes(graph, pipeline(Options(), FUSIONS), proof, strict=True)
    assert [record.rolled_back for record in records if record.rolled_back] == []
    with torch.no_grad():
        for batch in (1, 9):
            inputs = request(plan, batch)
            assert largest_error(list(after(*inputs)), list(graph(*inputs))) < 1e-5
    if sum(plan.lengths) > 1:
        assert any(getattr(n.target, "namespace", "") == "grc" for n in after.graph.nodes)
