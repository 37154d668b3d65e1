"""What capture refuses, and how it says so: in the user's own terms, with their line and a hint."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from grc.errors import CaptureError, ModelFileError
from grc.graph.capture import capture, find_fault
from grc.graph.model_file import from_module, load_model
from tests.graph.test_capture import Forward, Neighbours, captured, ids, rows

FILE = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        {body}

def get_model():
    return Model(){mode}

def get_inputs(batch):
    return (torch.randn(batch, 4, generator=torch.Generator().manual_seed(batch)),)
"""


def model_file(folder: Path, body: str, mode: str = ".eval()") -> Path:
    path = folder / "model.py"
    path.write_text(FILE.format(body=body.replace("\n", "\n        "), mode=mode))
    return path


def refusal(path: Path) -> CaptureError:
    with pytest.raises(CaptureError) as caught:
        capture(load_model(path))
    return caught.value


def test_control_flow_on_values_names_the_users_line(tmp_path: Path) -> None:
    path = model_file(tmp_path, "y = self.layer(x)\nif y.sum() > 0:\n    return y\nreturn -y")
    error = refusal(path)
    assert f"{path}:12: control flow depends on the values of a tensor" in error.message
    assert "torch.where" in str(error.hint)


def test_classes_counted_in_values(tmp_path: Path) -> None:
    path = model_file(tmp_path, "y = torch.nn.functional.one_hot(x.argmax(1))\nreturn self.layer(x) + y.sum()")
    error = refusal(path)
    assert f"{path}:11: one_hot counts its classes" in error.message and "num_classes" in str(error.hint)


def test_answers_that_are_not_a_number() -> None:
    layer = nn.Linear(4, 4)

    def some(self: Forward, x: Tensor) -> Tensor:
        return self.layer(x.masked_fill(x > 1e9, 1.0)).sigmoid().where(torch.arange(4) > 0, float("nan"))

    source = captured(Forward(some, layer=layer), lambda b: (rows(b, 4),))
    assert source.notes == ["output 0 of the model holds NaN at get_inputs(2), which was compared with nothing"]
    with pytest.raises(CaptureError, match="output 0 of the model is NaN throughout, at get_inputs"):
        captured(Forward(lambda self, x: torch.log(-1 - self.layer(x).sigmoid()), layer=layer), lambda b: (rows(b, 4),))


def test_numpy_in_forward() -> None:
    def forward(self: Forward, x: Tensor) -> Tensor:
        found = np.stack([np.unique(row, return_inverse=True)[1] for row in x.cpu().numpy()])
        return x * torch.from_numpy(found)

    with pytest.raises(CaptureError, match="a value is computed by numpy or Python") as caught:
        captured(Forward(forward), lambda b: (torch.arange(4 * b).view(b, 4) % 3,))
    assert __file__ in caught.value.message and caught.value.hint == "use torch operations instead of numpy in forward"


def test_the_data_of_a_value_is_followed() -> None:
    """As it was written before torch 0.4."""
    source = captured(
        Forward(lambda self, x: self.layer(x.masked_fill(x.data.lt(0), 0.0)), layer=nn.Linear(4, 4)),
        lambda b: (rows(b, 4),),
    )
    assert source.mode == "non-strict"


def test_complex_outputs() -> None:
    with pytest.raises(CaptureError, match="output 0 of the model is of complex numbers") as caught:
        captured(Forward(lambda self, x: torch.fft.rfft(x, dim=1)), lambda b: (rows(b, 6),))
    assert "view_as_real" in str(caught.value.hint)


def test_outputs_that_are_no_dense_tensors() -> None:
    layer = nn.Linear(6, 6)
    for forward, message in (
        (lambda self, x: None, "the model returns no tensor"),
        (lambda self, x: self.layer(x).to_sparse(), "output 0 of the model is a sparse coo tensor"),
        (lambda self, x: (self.layer(x), x.shape[0]), "an output is a number that follows the sizes"),
    ):
        with pytest.raises(CaptureError, match=message):
            captured(Forward(forward, layer=layer), lambda b: (rows(b, 6),))


def test_a_graph_that_is_run_by_an_operator() -> None:
    def forward(self: Forward, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (x,))

    with pytest.raises(CaptureError, match=r"forward calls torch\.cond, which runs graphs of its own") as caught:
        captured(Forward(forward), lambda b: (rows(b, 6),))
    assert "torch.where" in str(caught.value.hint)


def test_a_sum_of_sparse_tensors_is_told_without_torchs_log(capfd: pytest.CaptureFixture[str]) -> None:
    model = Neighbours(
        lambda self, x: torch.sparse.mm(self.a + self.b, self.items.weight)[x], items=nn.Embedding(50, 4)
    )
    model.a = model.b = model.adjacency
    with pytest.raises(CaptureError, match="an operator here has no form that can be traced"):
        captured(model, lambda b: (torch.arange(b),))
    assert capfd.readouterr() == ("", "")


def test_a_loop_over_the_rows_prints_nothing_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError, match="it fails at batch 4"):
        captured(Forward(lambda self, x: torch.stack([row.sum() for row in x])), lambda b: (rows(b, 6),))
    assert capfd.readouterr() == ("", "")


def test_a_list_times_the_batch_is_told_what_to_write() -> None:
    with pytest.raises(CaptureError, match="the export was specialised") as caught:
        captured(Forward(lambda self, x: x + torch.tensor([3.0] * x.shape[0]).unsqueeze(1)), lambda b: (rows(b, 6),))
    assert "torch.full((len(x),), t)" in str(caught.value.hint)


def test_a_loop_over_a_packed_sequence() -> None:
    def forward(self: Forward, steps: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(steps, lengths, batch_first=True, enforce_sorted=False)
        data, batch_sizes, _, order = packed
        state, begin = torch.zeros(len(steps), 4), 0
        for some in batch_sizes:
            state = torch.cat([self.layer(data[begin : begin + some], state[:some]), state[some:]])
            begin += some
        return state[order]

    with pytest.raises(CaptureError, match="forward loops over the batch sizes of a packed sequence") as caught:
        captured(Forward(forward, layer=nn.GRUCell(4, 4)), lambda b: (rows(b, 5, 4), torch.arange(b) % 5 + 1))
    assert __file__ in caught.value.message and "torch.where((t < lengths)" in str(caught.value.hint)


def test_steps_that_depend_on_the_rows_beside() -> None:
    def forward(self: Forward, steps: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(steps, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0].mean(1)

    model = Forward(forward, layer=nn.GRU(4, 3, batch_first=True))
    with pytest.raises(CaptureError, match="depends on the longest row beside it") as caught:
        captured(model, lambda b: (rows(b, 5, 4), torch.arange(b) % 4 + 1))
    assert caught.value.hint == "give it total_length=x.size(1)"
    source = captured(model, lambda b: (rows(b, 5, 4), torch.full((b,), 5)))
    assert "all rows of get_inputs have 5 steps" in source.notes[0]


@pytest.mark.parametrize("made", [torch.jit.script, lambda layer: torch.jit.trace(layer, torch.ones(2, 4))])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript(made: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(ModelFileError, match="the model is TorchScript") as caught:
        from_module(made(nn.Linear(4, 4).eval()), lambda b: (rows(b, 4),))
    assert "nn.Module" in str(caught.value.hint)
    with pytest.raises(ModelFileError, match="layer is TorchScript"):
        from_module(Forward(lambda self, x: self.layer(x), layer=made(nn.Linear(4, 4).eval())).eval(), lambda b: ())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inside", [True, False], ids=["a layer", "the model"])
def test_layers_that_torch_quantised(inside: bool) -> None:
    layer = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)).eval(), dtype=torch.qint8)
    model = Forward(lambda self, x: self.layer(x), layer=layer).eval() if inside else layer
    with pytest.raises(ModelFileError, match="0 is quantised by") as caught:
        from_module(model, lambda b: (rows(b, 4),))
    assert "--precision int8" in str(caught.value.hint)


def test_inputs_without_a_tensor() -> None:
    """They would be part of the program, which could answer that one request alone."""
    model = Forward(lambda self, x: self.layer(torch.tensor([len(text) for text in x])), layer=nn.Embedding(9, 4))
    with pytest.raises(ModelFileError, match="holds no tensor") as caught:
        captured(model, lambda b: (["word"] * b,))
    assert "preprocess" in str(caught.value.hint)


@pytest.mark.parametrize("product", [torch.sparse.mm, torch.matmul], ids=["sparse.mm", "matmul"])
def test_a_sparse_tensor_times_a_request(product: Callable[..., Tensor]) -> None:
    with pytest.raises(CaptureError, match="a sparse tensor is multiplied with what a request brings") as caught:
        captured(Neighbours(lambda self, x: product(self.adjacency, x)), lambda b: (rows(50, b),))
    assert "index_add" in str(caught.value.hint)


@pytest.mark.parametrize("beside", ["site-packages", "project/.venv/site-packages"])
def test_the_line_of_a_library_whose_model_it_is(beside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, project = tmp_path / beside, tmp_path / "project"
    for folder in (library, project):
        folder.mkdir(parents=True, exist_ok=True)
    (library / "nets_of_others.py").write_text(model_file(library, "return x if x.sum() > 0 else -x").read_text())
    model = project / "model.py"
    model.write_text("from nets_of_others import get_inputs, get_model\n")
    monkeypatch.syspath_prepend(library)
    monkeypatch.delitem(sys.modules, "nets_of_others", raising=False)
    assert refusal(model).message.startswith(f"{library / 'nets_of_others.py'}:11: control flow depends")


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (lambda x: x.to_sparse(), "sparse coo"),
        (lambda x: x.to_sparse_csr(), "sparse csr"),
        (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), "nested"),
    ],
)
def test_tensors_that_are_not_dense(made: Callable[[Tensor], Tensor], kind: str) -> None:
    model = Forward(lambda self, x: self.layer(x), layer=nn.Linear(4, 4)).eval()
    with pytest.raises(ModelFileError, match=f"is a {kind} tensor") as caught:
        capture(from_module(model, lambda batch: (made(rows(batch, 4)),)))
    assert "values with their offsets" in str(caught.value.hint)


def test_the_users_own_line_though_the_library_lies_in_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / ".venv" / "site-packages"
    library.mkdir(parents=True)
    (library / "signs_of_others.py").write_text("def positive(x):\n    return bool(x.sum() > 0)\n")
    monkeypatch.syspath_prepend(library)
    path = model_file(tmp_path, "import signs_of_others\nreturn x if signs_of_others.positive(x) else -x")
    assert refusal(path).message.startswith(f"{path}:12: control flow depends")


def test_an_operator_that_fails_names_the_users_line(tmp_path: Path) -> None:
    error = refusal(model_file(tmp_path, "return self.layer(x.view(-1, 3))"))
    assert "model.py:11" in error.message
    assert "the model itself fails" in error.message


def test_randomness(tmp_path: Path) -> None:
    error = refusal(model_file(tmp_path, "return self.layer(x) + torch.rand(4)"))
    assert "differs between two calls" in error.message


def test_random_numbers_that_forward_seeds_are_no_noise(tmp_path: Path) -> None:
    """The model answers alike at every call and its export does not, in no precision: neither is the nearer to the oracle."""
    error = refusal(model_file(tmp_path, "torch.manual_seed(0)\nreturn self.layer(x) + torch.rand(4)"))
    assert "forward draws random numbers, which the model seeds for itself" in error.message
    assert "__init__" in str(error.hint)


def test_training_mode(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="training mode") as caught:
        load_model(model_file(tmp_path, "return self.layer(x)", mode=""))
    assert "eval()" in str(caught.value.hint)


def test_a_module_left_in_training_mode_inside_an_eval_model() -> None:
    model = Forward(lambda self, x: self.drop(x), drop=nn.Dropout()).eval()
    model.drop.train()
    with pytest.raises(ModelFileError, match="drop"):
        from_module(model, lambda b: (rows(b, 4),))


def test_a_batch_that_was_specialised() -> None:
    """The model asks for the batch as a number and takes another path: no export can stand for both."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if int(x.shape[0]) in (2, 3, 5, 7) else x * 3

    with pytest.raises(CaptureError, match=r"specialised|fixed|differently"):
        captured(Forward(forward), lambda b: (rows(b, 4),))


@pytest.mark.parametrize("wanted", [lambda b: b == 64, lambda b: b % 8 == 0])
def test_another_path_at_some_batches(wanted: Callable[[int], bool]) -> None:
    with pytest.raises(CaptureError, match=r"the export answers differently at batch (64|8) "):
        captured(Forward(lambda self, x: x * 2 if wanted(x.shape[0]) else x), lambda b: (rows(b, 4),))


def altered(source, change):
    """The fault that is found once a graph has been tampered with."""
    node = next(n for n in source.graph.graph.nodes if n.target is torch.ops.aten.relu.default)
    change(source.graph.graph, node)
    source.graph.recompile()
    return find_fault(source)


@pytest.fixture
def source():
    return captured(Forward(lambda self, x: torch.relu(x)), lambda b: (rows(b, 4),))


def test_other_answers_are_a_fault(source) -> None:
    def change(graph, node) -> None:
        node.target = torch.ops.aten.tanh.default

    assert "answers differently" in altered(source, change)


def test_a_fixed_batch_is_a_fault(source) -> None:
    def change(graph, node) -> None:
        with graph.inserting_after(node):
            fixed = graph.call_function(torch.ops.aten.view.default, (node, [7, 4]))
        node.replace_all_uses_with(fixed, delete_user_cb=lambda user: user is not fixed)

    assert "was specialised: it fails at batch 4" in altered(source, change)


def test_a_fake_tensor_is_a_fault(source) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.randn(4, 4)
    source.graph.forward = lambda *inputs: (fake,)
    assert "by numpy or Python" in str(find_fault(source))


def test_an_unknown_container_is_named() -> None:
    class Box:
        pass

    with pytest.raises(Exception, match="Box is neither a tensor nor a known container"):
        captured(Forward(lambda self, x: Box()), lambda b: (rows(b, 4),))


def test_input_names_that_do_not_fit() -> None:
    model = from_module(nn.Linear(4, 4).eval(), lambda b: (rows(b, 4),))
    model.input_names = ["a", "b"]
    with pytest.raises(ModelFileError, match="2 names for 1 inputs"):
        capture(model)


def test_inputs_of_changing_dtype() -> None:
    with pytest.raises(ModelFileError, match="input input0 changes its dtype with the batch size"):
        captured(Forward(lambda self, x: x * 2), lambda b: (rows(b, 4) if b < 4 else ids(b, 4),))


def test_inputs_of_changing_structure() -> None:
    with pytest.raises(ModelFileError, match="different numbers of tensors") as refused:
        captured(Forward(lambda self, *x: x[0]), lambda b: tuple(rows(b, 4) for _ in range(b)))
    assert "padded, or its values and their offsets" in str(refused.value.hint)
