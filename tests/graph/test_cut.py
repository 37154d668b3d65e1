"""Cutting a graph into stages: where it is cut, and that the stages answer as the whole."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from grc.compiler import CANONICAL, as_model, optimise, traced
from grc.errors import LoweringError
from grc.graph.cut import Stage, cut
from grc.graph.oracle import largest_error
from grc.kernels import FUSIONS
from grc.options import Options
from grc.passes.pipeline import pipeline
from grc.progress import Silent
from grc.runtime.structure import output_names

ZOO = Path(__file__).resolve().parents[2] / "examples" / "zoo"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"cut_{name}", ZOO / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cut_model(model: nn.Module, inputs: object) -> tuple[list[Stage], object]:
    source = traced(as_model(model, inputs), Silent())
    passes = [step for step in pipeline(Options(), FUSIONS) if step.name in CANONICAL]
    graph = optimise(source, Options(), Silent(), passes=passes).canonical
    return cut(graph, source.names, output_names(source.out_structure)), source


def shapes(stages: list[Stage]) -> dict[str, tuple[list[str], list[str]]]:
    return {stage.name: (stage.inputs, stage.outputs) for stage in stages}


CUTS = {
    "dlrm": {
        "embedding_service": (["ids"], ["embedding"]),
        "interaction_python": (["dense", "embedding"], ["interaction"]),
        "gr_trt": (["interaction"], ["output"]),
    },
    "dcnv2": {"embedding_service": (["ids"], ["embedding"]), "gr_trt": (["embedding"], ["output"])},
    "sasrec": {
        "embedding_service": (["history"], ["embedding"]),
        "interaction_python": (["history", "embedding"], ["interaction_0", "interaction_1", "interaction_2"]),
        "gr_trt": (["interaction_0", "interaction_1", "interaction_2"], ["output[0]", "output[1]"]),
    },
    "gr": {
        "embedding_service": (["steps"], ["embedding"]),
        "interaction_python": (["embedding"], ["interaction"]),
        "gr_trt": (["embedding", "interaction"], ["output[0]", "output[1]", "output[2]", "output[3]"]),
    },
    "deepfm": None,
    "din": None,
    "hstu": None,
}


@torch.no_grad()
@pytest.mark.parametrize("name", CUTS)
def test_stages_of_the_zoo_answer_as_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRC_ZOO_SIZE", "small")
    zoo = load(name)
    stages, source = cut_model(zoo.get_model(), zoo.get_inputs)
    if CUTS[name]:
        assert list(shapes(stages).values()) == list(CUTS[name].values())
    for batch in (1, 4):
        values = dict(zip(source.names, source.inputs(batch), strict=True))
        for stage in stages:
            made = stage.graph(*(values[n] for n in stage.inputs))
            assert all(tensor.shape[0] == batch for tensor in made)
            values |= zip(stage.outputs, made, strict=True)
        answers = [values[n] for n in output_names(source.out_structure)]
        # The model's own operators one by one, but for Transformer layers that eager torch runs as one.
        assert largest_error(answers, source.eager(batch)) <= (1e-6 if name == "gr" else 0)


class Lookups(nn.Module):
    """Two tables and a dot product, with no dense layer after them."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(20, 8), nn.Embedding(30, 8)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.users(user) * self.items(item)).sum(1)


def test_a_dot_product_of_two_tables_ends_in_its_last_operator() -> None:
    stages, _ = cut_model(Lookups().eval(), lambda b: (torch.arange(b) % 20, torch.arange(b) % 30))
    assert [stage.name for stage in stages] == ["embedding_service", "interaction_python", "gr_trt"]
    assert shapes(stages)["gr_trt"] == (["interaction"], ["output"])


class Sized(nn.Module):
    """Its last layer needs the batch, which only the ids tell."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.top = nn.Embedding(20, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        scores = self.top(self.table(ids).sum(1))
        return scores + torch.ones(ids.shape[0], 1)


def test_no_tensor_is_sent_to_a_stage_for_its_size_alone() -> None:
    stages, _ = cut_model(Sized().eval(), lambda b: (torch.arange(3 * b).view(b, 3) % 20,))
    assert shapes(stages) == {"embedding_service": (["ids"], ["embedding"]), "gr_trt": (["embedding"], ["output"])}


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() + 1


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.top = nn.Embedding(20, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.top(self.table(ids)), ids


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (Plain(), lambda b: (torch.ones(b, 3),), "the model has no tables and no layers to cut it at"),
        (
            Twice(),
            lambda b: (torch.arange(b) % 20,),
            "the model returns an input, a constant or one tensor twice: it can't be cut into stages",
        ),
        (
            nn.Linear(3, 4),
            lambda b: (torch.ones(5, 3),),
            "the model's first input does not begin with the batch: it can't be cut into stages",
        ),
    ],
)
def test_a_model_that_has_no_stages_is_refused(model: nn.Module, inputs: object, message: str) -> None:
    with pytest.raises(LoweringError) as caught:
        cut_model(model.eval(), inputs)
    assert caught.value.message == message
