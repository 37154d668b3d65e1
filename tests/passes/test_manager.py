"""The pass manager: what breaks answers is rolled back with its reason, or raised with strict."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from grc.errors import GrcError, PassError
from grc.graph.match import aten
from grc.graph.rewrite import Rewriter
from grc.kernels.fusion import Fused
from grc.options import Options
from grc.passes.fuse import Fuse
from grc.passes.manager import Change, Pass, Proof, run_passes
from grc.passes.pipeline import NAMES, pipeline
from tests.graph.filecheck import check
from tests.passes.small import graph_of, rows


@dataclass(frozen=True)
class Swap(Pass):
    """Replace every relu by another operator."""

    name = "swap"
    to: object = aten.tanh.default

    def run(self, graph: fx.GraphModule) -> list[Change]:
        edit = Rewriter(graph)
        found = [n for n in graph.graph.nodes if n.target is aten.relu.default]
        for node in found:
            with edit.at(node):
                edit.replace(node, edit.call(self.to, node.args[0]))
        edit.finish()
        return [Change("relu") for _ in found]


@dataclass(frozen=True)
class Nothing(Pass):
    name = "nothing"

    def run(self, graph: fx.GraphModule) -> list[Change]:
        return []


@dataclass(frozen=True)
class Stumbles(Pass):
    name = "stumbles"

    def run(self, graph: fx.GraphModule) -> list[Change]:
        raise KeyError("surprise")


@dataclass(frozen=True)
class Illegal(Pass):
    """Leaves a value that no one reads."""

    name = "illegal"

    def run(self, graph: fx.GraphModule) -> list[Change]:
        node = next(n for n in graph.graph.nodes if n.op == "call_function")
        edit = Rewriter(graph)
        with edit.at(node):
            edit.call(aten.sigmoid.default, node.args[0])
        graph.recompile()
        return [Change("sigmoid")]


@pytest.fixture
def graph() -> fx.GraphModule:
    return graph_of(lambda self, x: self.layer(torch.relu(x)), rows(4, 3), layer=nn.Linear(3, 3))


@pytest.fixture
def proof(graph: fx.GraphModule) -> Proof:
    return Proof([[rows(3, 3)], [rows(33, 3)]]).prepare(graph)


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (Swap(), r"error .* against fp64, the model's own is"),
        (Stumbles(), r"failed: KeyError: 'surprise'"),
        (Illegal(), r"node sigmoid.* is read by no one"),
    ],
    ids=["wrong answers", "stumbles", "illegal graph"],
)
def test_a_broken_pass_is_rolled_back_with_its_reason(graph, proof, step, reason):
    after, records = run_passes(graph, [step, Swap(aten.relu.default)], proof)
    assert records[0].rolled_back is not None
    with pytest.raises(PassError, match=reason):
        run_passes(graph, [step], proof, strict=True)
    assert records[1].rolled_back is None
    check(after, "CHECK: aten.relu(%inputs_0)\nCHECK: aten.linear\nCHECK-NOT: aten.")


def test_of_several_fusions_only_the_one_at_fault_is_lost(graph, proof):
    class Wrong:
        name, anchors = "wrong", (aten.linear,)

        def fuse(self, edit, node):
            edit.replace(node, edit.call(aten.mul.Tensor, node.args[0], 2))
            raise KeyError("surprise")

    class Right:
        name, anchors = "right", (aten.relu,)

        def fuse(self, edit, node):
            return Fused(node, edit.call(aten.clamp_min.default, node.args[0], 0), "nothing")

    after, records = run_passes(graph, [Fuse((Wrong(), Right())), Nothing()], proof)
    assert [(r.name, bool(r.rolled_back), [c.what for c in r.made]) for r in records] == [
        ("fuse", True, []), ("fuse", True, []), ("fuse", False, ["right"]), ("fuse", False, []), ("nothing", False, []),
    ]  # fmt: skip
    check(after, "CHECK: aten.clamp_min(%inputs_0, 0)\nCHECK: aten.linear\nCHECK-NOT: aten.")


def test_strict_names_the_pass_and_how_to_leave_it_out(graph, proof):
    with pytest.raises(PassError, match="pass swap: ") as caught:
        run_passes(graph, [Swap()], proof, strict=True)
    assert caught.value.hint == "leave it out with --disable swap"


def test_a_right_pass_is_kept_with_its_error(graph, proof):
    after, records = run_passes(graph, [Swap(aten.relu.default)], proof)
    assert records[0].error is not None and records[0].error < 1e-5
    assert records[0].nodes == len(after.graph.nodes)


def test_the_source_graph_is_never_touched(graph, proof):
    run_passes(graph, [Swap()], proof)
    check(graph, "CHECK: aten.relu(%inputs_0)")


def test_the_bisect_limit_stops_after_passes_that_changed_something(graph, proof):
    steps = [Nothing(), Swap(aten.relu.default), Nothing(), Swap(aten.relu.default)]
    assert len(run_passes(graph, steps, proof, limit=1)[1]) == 2
    assert len(run_passes(graph, steps, proof, limit=0)[1]) == 0
    assert len(run_passes(graph, steps, proof, limit=None)[1]) == 4
    broken = [Swap(), Nothing(), Swap(aten.relu.default), Nothing()]
    assert len(run_passes(graph, broken, proof, limit=1)[1]) == 3, "what is rolled back has changed nothing"


def test_after_sees_the_graph_of_each_pass(graph, proof):
    seen = []
    run_passes(graph, [Nothing(), Swap()], proof, after=lambda step, g: seen.append((step.name, len(g.graph.nodes))))
    assert [name for name, _ in seen] == ["nothing", "swap"]


def test_every_pass_can_be_disabled():
    for name in NAMES:
        left = pipeline(Options(disable=(name,), on_bad_id="zero"), ())
        assert len(left) == len(NAMES) - 1


def test_an_unknown_pass_is_named():
    with pytest.raises(GrcError, match="there is no pass typo") as caught:
        pipeline(Options(disable=("typo",)), ())
    assert "merge-tables" in str(caught.value.hint)


def test_the_pass_of_the_docs_is_one():
    text = (Path(__file__).parents[2] / "docs" / "adding-a-pass.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, type[Pass]] = {"__name__": __name__}
    exec(textwrap.dedent(code), names)
    graph = graph_of(lambda self, x: x.relu().relu().relu() + 1, rows(3, 4))
    proof = Proof([[rows(3, 4)], [rows(5, 4)]]).prepare(graph)
    graph, (record,) = run_passes(graph, [names["OneRelu"]()], proof)
    assert (len(record.made), record.rolled_back) == (2, None)
    check(graph, "CHECK: %relu : float32[{{.*}}, 4] = aten.relu(%inputs_0)\nCHECK-NEXT: aten.add(%relu, 1)")
