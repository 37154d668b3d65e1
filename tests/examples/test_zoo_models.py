"""Every zoo file keeps the promises of a model file: it loads, is frozen, repeats itself, and treats rows alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

import grc

ZOO = Path(__file__).resolve().parents[2] / "examples" / "zoo"
NAMES = ["dcnv2", "deepfm", "din", "dlrm", "gr", "hstu", "sasrec"]
FUSED = {
    "dcnv2": {"39 look-ups of 39 tables -> 1", "cross"},
    "deepfm": {"39 look-ups of 1 table -> 1", "bag-fm"},
    "din": {"split-concat-linear", "activation-unit"},
    "dlrm": {"26 look-ups of 26 tables -> 1", "bag-dot"},
    "gr": {"attention", "3 linear layers -> 1"},
    "hstu": {"attention", "needed-rows", "score-topk"},
    "sasrec": {"attention", "needed-rows", "absorbed projections", "score-topk"},
}
ON_CPUS = {"absorbed projections", "3 linear layers -> 1"}  # a GPU's kernels take those layers otherwise
WITH_IDS = [name for name in NAMES if name != "gr"]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"zoo_{name}", ZOO / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(model: torch.nn.Module, inputs: tuple | dict) -> list[Tensor]:
    with torch.no_grad():
        outputs = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return tree_flatten(outputs)[0]


def row(inputs: tuple | dict, i: int) -> tuple | dict:
    if isinstance(inputs, dict):
        return {name: tensor[i : i + 1] for name, tensor in inputs.items()}
    return tuple(tensor[i : i + 1] for tensor in inputs)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRC_ZOO_SIZE", "small")


def test_no_zoo_file_is_forgotten() -> None:
    assert sorted(path.stem for path in ZOO.glob("*.py")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_model_is_frozen_and_repeats(name: str) -> None:
    zoo = load(name)
    first, second = zoo.get_model(), zoo.get_model()
    assert not any(module.training for module in first.modules())
    state = second.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in first.state_dict().items())
    inputs = zoo.get_inputs(4)
    assert all(torch.equal(a, b) for a, b in zip(answer(first, inputs), answer(second, inputs), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_building_a_model_leaves_the_random_state_alone(name: str) -> None:
    zoo = load(name)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    zoo.get_model()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_seeded_named_and_batched(name: str) -> None:
    zoo = load(name)
    flat = tree_flatten(zoo.get_inputs(5))[0]
    assert len(flat) == len(zoo.input_names) and {tensor.shape[0] for tensor in flat} == {5}
    assert all(torch.equal(a, b) for a, b in zip(flat, tree_flatten(zoo.get_inputs(5))[0], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(flat, tree_flatten(zoo.get_inputs(5, seed=1))[0], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_are_independent(name: str) -> None:
    zoo = load(name)
    model, inputs = zoo.get_model(), zoo.get_inputs(3)
    together = answer(model, inputs)
    for i in range(3):
        for whole, alone in zip(together, answer(model, row(inputs, i)), strict=True):
            torch.testing.assert_close(whole[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_finite_and_differ_between_rows(name: str) -> None:
    zoo = load(name)
    for output in answer(zoo.get_model(), zoo.get_inputs(32)):
        assert torch.isfinite(output).all()
        assert output.float().std(dim=0).max() > 0.02


@pytest.mark.parametrize("name", WITH_IDS)
def test_ids_reach_the_answer(name: str) -> None:
    zoo = load(name)
    model, inputs, other = zoo.get_model(), zoo.get_inputs(16), zoo.get_inputs(16, seed=1)
    if name == "dlrm":
        other = (inputs[0], other[1])
    assert (answer(model, inputs)[0] - answer(model, other)[0]).abs().mean() > 0.005


@pytest.mark.parametrize("kind", ["uniform", "zipf"])
@pytest.mark.parametrize("name", WITH_IDS)
def test_ids_stay_inside_the_tables(name: str, kind: str) -> None:
    zoo = load(name)
    sizes = zoo.SIZES["small"]
    rows = sizes.get("rows", sizes.get("items"))
    for ids in tree_flatten(zoo.get_inputs(300, ids=kind))[0]:
        if ids.dtype == torch.int64:
            assert ids.min() >= 0 and rows * 0.9 < ids.max() < rows


@pytest.mark.parametrize("name", WITH_IDS)
def test_zipf_repeats_few_ids_often(name: str) -> None:
    zoo = load(name)

    def share_of_commonest(kind: str) -> float:
        ids = tree_flatten(zoo.get_inputs(300, ids=kind))[0][-1 if name == "dlrm" else 0]
        counts = torch.bincount(ids[ids != 0])
        return float(counts.max() / counts.sum())

    assert share_of_commonest("zipf") > 10 * share_of_commonest("uniform")


@pytest.mark.parametrize("name", NAMES)
def test_unknown_size_or_distribution_is_refused(name: str) -> None:
    zoo = load(name)
    with pytest.raises(ValueError, match=r"no size 'huge'; it has .*small"):
        zoo.get_model(size="huge")
    if name in WITH_IDS:
        with pytest.raises(ValueError, match="'uniform' or 'zipf'"):
            zoo.get_inputs(2, ids="normal")


@pytest.mark.parametrize("name", ["hstu", "sasrec"])
def test_best_items_come_in_falling_order_and_only_once(name: str) -> None:
    zoo = load(name)
    scores, items = answer(zoo.get_model(), zoo.get_inputs(8))
    assert items.dtype == torch.int64
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    assert all(len(set(best.tolist())) == items.shape[1] and 0 not in best for best in items)


def test_din_ignores_padding() -> None:
    zoo = load("din")
    model = zoo.get_model()
    target = torch.tensor([5])
    short, padded = torch.tensor([[3, 9]]), torch.tensor([[3, 9, 0, 0, 0]])
    torch.testing.assert_close(answer(model, (short, target)), answer(model, (padded, target)))


@pytest.mark.parametrize("name", ["hstu", "sasrec"])
def test_attention_sees_every_step_of_the_history(name: str) -> None:
    zoo = load(name)
    model, (history,) = zoo.get_model(), zoo.get_inputs(1)
    base = answer(model, (history,))[0]
    for step in history[0].nonzero().flatten().tolist():
        changed = history.clone()
        changed[0, step] = 1 + changed[0, step] % 500
        assert not torch.allclose(base, answer(model, (changed,))[0], atol=1e-6), step


@torch.no_grad()
@pytest.mark.engine
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", NAMES)
def test_artifact_has_the_fusions_and_the_models_answers(name: str, device: str, tmp_path: Path) -> None:
    zoo, path = load(name), tmp_path / f"{name}.grc"
    options = grc.Options(path, device, "inductor", batches=(4,), buckets=(1, 8), max_batch=8)
    artifact = grc.compile(ZOO / f"{name}.py", None, options)
    changes = [change for record in artifact.manifest["passes"] for change in record["changes"]]
    wanted = FUSED[name] - (ON_CPUS if device == "cuda" else set())
    assert {change["what"] for change in changes if change["missed"] is None} >= wanted
    program, model = grc.load(path), zoo.get_model()
    for batch in (1, 7):  # neither of those that it was captured and proven at
        inputs = zoo.get_inputs(batch, seed=2)
        found = program(**inputs) if isinstance(inputs, dict) else program(*inputs)
        for mine, own in zip(tree_flatten(found)[0], answer(model, inputs), strict=True):
            torch.testing.assert_close(mine, own, rtol=1e-4, atol=1e-5)
