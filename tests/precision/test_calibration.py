"""Calibration data from a model file and from files of rows; NaN in it is told and survived."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from grc.errors import CalibrationWarning, GrcError, InputError
from grc.graph.capture import Source
from grc.precision.calibration import calibration_of, check_labels
from grc.precision.quality import budget
from tests.precision.models import Bags, Ranker, bag_inputs, captured, ranker_inputs


@pytest.fixture(scope="module")
def source() -> Source:
    return captured(Ranker(), ranker_inputs)[0]


def given(source: Source, batches: Any) -> Source:
    source.model.calibration = lambda: batches
    return source


@pytest.fixture(autouse=True)
def as_before(source: Source) -> Any:
    yield
    source.model.calibration = None


def test_batches_of_a_model_file_with_and_without_labels(source: Source) -> None:
    plain = calibration_of(given(source, [ranker_inputs(4), ranker_inputs(5)]), None)
    assert (plain.rows, plain.labels, plain.origin, plain.real) == (9, None, "calibration()", True)
    entries = [{"inputs": ranker_inputs(4), "labels": [0, 1, 0, 1]}]
    labelled = calibration_of(given(source, entries), None)
    assert labelled.labels is not None and labelled.labels[0].tolist() == [0, 1, 0, 1]
    assert plain.digest != labelled.digest and len(plain.digest) == 64


@pytest.mark.parametrize("form", ["npz", "jsonl", "parquet"])
def test_rows_of_a_file(source: Source, tmp_path: Path, form: str) -> None:
    dense, ids = ranker_inputs(70)
    label = (torch.arange(70) % 2).numpy()
    file = tmp_path / f"rows.{form}"
    columns = {"dense": dense.numpy(), "ids": ids.numpy(), "label": label}
    if form == "npz":
        np.savez(file, **columns)
    elif form == "jsonl":
        rows = [{name: values[i].tolist() for name, values in columns.items()} for i in range(70)]
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({name: values.tolist() for name, values in columns.items()}), file)
    found = calibration_of(source, file)
    assert [len(batch[0]) for batch in found.batches] == [64, 6] and found.origin == file.name
    assert torch.allclose(torch.cat([batch[0] for batch in found.batches]), dense)
    assert found.labels is not None and torch.cat(list(found.labels)).tolist() == label.tolist()
    assert found.sample(10).rows == 10


def test_samples_are_from_all_over_the_data(source: Source) -> None:
    dense, ids = ranker_inputs(1000)
    one = calibration_of(given(source, [{"inputs": (dense, ids), "labels": torch.arange(1000)}]), None)
    several = [
        {"inputs": (d, i), "labels": n}
        for d, i, n in zip(dense.split(300), ids.split(300), torch.arange(1000).split(300), strict=True)
    ]
    for data in (one, calibration_of(given(source, several), None)):
        some = data.sample(100)
        assert [len(batch[0]) for batch in some.batches] == [64, 36] and some.labels is not None
        places = torch.cat(list(some.labels))
        assert places.tolist() == [i * 999 // 99 for i in range(100)]
        assert torch.equal(torch.cat([batch[0] for batch in some.batches]), dense[places])
        assert torch.equal(torch.cat([batch[1] for batch in some.batches]), ids[places])
        assert data.sample(1000) is data
        assert calibration_of(source, None, 32).rows == 1000  # `grc check` cuts them


def test_samples_hold_labels_of_both_kinds(source: Source) -> None:
    """One row in two thousand was clicked; a file is sorted by its labels."""
    for places in ([1234], range(1000)):
        labels = torch.zeros(2000)
        labels[list(places)] = 1
        data = calibration_of(given(source, [{"inputs": ranker_inputs(2000), "labels": labels}]), None)
        some = data.sample(16, both=True)
        assert some.kinds == {True, False} and (some.rows == 16) == (len(places) > 1)


def test_samples_of_rows_that_hang_together_are_whole_batches() -> None:
    source, _ = captured(Bags(), bag_inputs)
    data = calibration_of(given(source, [bag_inputs(n) for n in (30, 20, 25, 40)]), None)
    some = data.sample(50)
    assert [batch[2].shape[0] for batch in some.batches] == [30, 40]
    assert data.sample(1).batches == data.batches[:1]
    with pytest.raises(
        InputError, match=r"batch 3 of the calibration data .* has 40 rows; the artifact takes up to 32"
    ):
        calibration_of(source, None, 32)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "calibration() gives no batch"),
        ([(torch.randn(3, 8),)], "batch 0 of the calibration data (calibration()) does not have the model's inputs"),
        (
            [{"inputs": ranker_inputs(2), "labels": [0, 1]}, ranker_inputs(2)],
            "calibration() gives labels for some batches only",
        ),
    ],
)
def test_data_that_does_not_fit_is_named(source: Source, batches: Any, message: str) -> None:
    with pytest.raises(GrcError) as refused:
        calibration_of(given(source, batches), None)
    assert refused.value.message == message


def test_files_that_do_not_fit_are_named(source: Source, tmp_path: Path) -> None:
    with pytest.raises(GrcError, match="no calibration file at"):
        calibration_of(source, tmp_path / "none.npz")
    (tmp_path / "rows.csv").write_text("dense,ids")
    with pytest.raises(InputError, match="has no known format") as unknown:
        calibration_of(source, tmp_path / "rows.csv")
    assert unknown.value.hint == "give rows of every input: .npz, .jsonl, .json or .parquet"
    np.savez(tmp_path / "rows.npz", dense=np.zeros((3, 8), np.float32))
    with pytest.raises(InputError, match=r"rows\.npz has no column ids"):
        calibration_of(source, tmp_path / "rows.npz")


def raising() -> Any:
    raise FileNotFoundError(2, "No such file or directory", "/data/clicks.npz")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ([1, 2], "calibration is a list, no function"),
        (lambda: None, "calibration() returned a NoneType"),
        (lambda: ranker_inputs(4)[0], "calibration() returned a Tensor"),
        (lambda: [1 // 0], "calibration() raised ZeroDivisionError: integer division"),
        (lambda: (1 // n for n in (1, 0)), "calibration() raised ZeroDivisionError: integer division"),
        (raising, "calibration() raised FileNotFoundError: [Errno 2] No such file or directory: '/data/clicks.npz'"),
        (lambda: [tuple(t.numpy() for t in ranker_inputs(4))], "batch 0 of calibration(): a numpy ndarray is"),
        (
            lambda: [{"inputs": ranker_inputs(2), "labels": [0, "a"]}],
            "row 1 of batch 0 of calibration() has the label a, which is no number",
        ),
        (
            lambda: [{"inputs": ranker_inputs(2), "labels": [None, 1]}],
            "row 0 of batch 0 of calibration() has the label None, which is no number",
        ),
    ],
    ids=["list", "None", "tensor", "raises", "raises later", "no file", "numpy", "word", "null"],
)
def test_a_calibration_that_fails_is_told(source: Source, function: Any, message: str) -> None:
    source.model.calibration = function
    with pytest.raises(GrcError) as refused:
        calibration_of(source, None)
    assert message in refused.value.message and refused.value.hint


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("rows.npz", b"", "rows.npz is empty"),
        ("rows.jsonl", b"\n", "rows.jsonl is empty"),
        ("rows.npz", b"hello", "rows.npz is no npz: it is no zip of arrays"),
        ("rows.npz", b"PK\x03\x04hello", "rows.npz is no npz: File is not a zip file"),
        ("rows.jsonl", b'{"dense": [', "rows.jsonl is no jsonl: line 1: Expecting value"),
    ],
)
def test_files_that_hold_no_rows_are_named(
    source: Source, tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as refused:
        calibration_of(source, tmp_path / name)
    assert message in refused.value.message
    assert refused.value.hint == "give rows of every input: .npz, .jsonl, .json or .parquet"


def lines(path: Path, count: int, labels: dict[int, Any], column: str = "label", start: bytes = b"") -> Path:
    dense, ids = ranker_inputs(count)
    rows = [{"dense": dense[i].tolist(), "ids": ids[i].tolist(), column: labels.get(i, 1)} for i in range(count)]
    path.write_bytes(start + "\n".join(map(json.dumps, rows)).encode())
    return path


def test_a_label_that_is_no_number_is_named_by_its_row(source: Source, tmp_path: Path) -> None:
    with pytest.raises(GrcError) as refused:
        calibration_of(source, lines(tmp_path / "rows.jsonl", 20, {5: None}))
    assert refused.value.message == "row 5 of rows.jsonl has the label None, which is no number"


def test_a_column_that_is_no_input_is_named_beside_those_that_are(source: Source, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        calibration_of(source, lines(tmp_path / "rows.jsonl", 20, {}, "labels"))
    assert refused.value.message == "rows.jsonl has a column labels, which is no input of the model"
    assert refused.value.hint == "the inputs are dense, ids; labels are a column label"


def test_rows_may_begin_with_a_byte_order_mark_and_labels_be_a_column(source: Source, tmp_path: Path) -> None:
    labels = {i: [i % 2] for i in range(20)}
    found = calibration_of(source, lines(tmp_path / "rows.jsonl", 20, labels, start=b"\xef\xbb\xbf"))
    assert found.labels is not None and found.labels[0].shape == (20, 1) and found.by_row


class Labelled(nn.Module):
    """One of its inputs is called `label`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.layer(x).squeeze(1) + label


def test_an_input_called_label_is_no_label(tmp_path: Path) -> None:
    source, _ = captured(Labelled(), lambda batch: (torch.randn(batch, 4), torch.randn(batch)))
    columns = {"x": np.ones((20, 4), np.float32), "label": np.arange(20, dtype=np.float32)}
    np.savez(tmp_path / "rows.npz", **columns)
    plain = calibration_of(source, tmp_path / "rows.npz")
    assert plain.labels is None and plain.batches[0][1].tolist() == list(range(20))
    np.savez(tmp_path / "rows.npz", **columns, labels=np.ones(20))
    labelled = calibration_of(source, tmp_path / "rows.npz")
    assert labelled.labels is not None and labelled.labels[0].tolist() == [1.0] * 20


def test_what_get_inputs_draws_is_warned_of(source: Source) -> None:
    with pytest.warns(CalibrationWarning, match="calibrated on what get_inputs draws"):
        assert calibration_of(source, None).origin == "get_inputs"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense": np.zeros((3, 7), np.float32)}, "dense has a size of 7 where the model takes 8"),
        ({"ids": np.zeros((2, 3), np.int64)}, "has 3 of dense and 2 of ids rows"),
        ({"dense": np.zeros((0, 8), np.float32), "ids": np.zeros((0, 3), np.int64)}, "has no rows"),
        ({"label": np.zeros(2)}, "rows.npz has labels of the shape [2], and 3 rows of inputs"),
        ({"label": np.float64(1)}, "rows.npz has labels of the shape [], and 3 rows of inputs"),
        ({"label": np.zeros(3, np.complex64)}, "rows.npz has labels of complex64"),
        ({"label": np.array(["a", "b", "c"])}, "row 0 of rows.npz has the label a, which is no number"),
        ({"ids": np.full((3, 3), 2**63, np.uint64)}, 'input "ids" has the value 9223372036854775808; int64 holds'),
    ],
    ids=["columns", "rows", "none", "labels", "scalar", "complex", "words", "wide"],
)
def test_rows_that_do_not_fit_are_named(source: Source, tmp_path: Path, change: Any, message: str) -> None:
    width = ranker_inputs(1)[1].shape[1]
    change = {name: a[:, :1].repeat(width, 1) if name == "ids" else a for name, a in change.items()}
    columns = {"dense": np.zeros((3, 8), np.float32), "ids": np.zeros((3, width), np.int64), **change}
    np.savez(tmp_path / "rows.npz", **columns)
    with pytest.raises(GrcError) as refused:
        calibration_of(source, tmp_path / "rows.npz")
    assert message in refused.value.message


def test_rows_of_nan_are_told_and_left_out(source: Source) -> None:
    """And no row beside them."""
    bad = ranker_inputs(4)
    bad[0][1, 2], bad[0][3, 0] = torch.nan, -torch.inf
    given_rows = (ranker_inputs(5), bad, tuple(tensor[:0] for tensor in bad))
    entries = [{"inputs": inputs, "labels": torch.arange(len(inputs[0]))} for inputs in given_rows]
    found = calibration_of(given(source, entries), None)
    assert found.rows == 7 and torch.equal(found.batches[1][1], bad[1][[0, 2]])
    assert found.labels is not None and found.labels[1].tolist() == [0, 2]
    assert found.notes == (
        "2 of 9 rows of the calibration data left out for NaN or infinity, first row 1 of batch 1 of calibration(), in dense",
        "7 rows are all that calibration() gives to calibrate on: the quality of other requests may be another",
    )
    bad[0][:] = torch.nan
    with pytest.raises(GrcError, match="all rows of the calibration data hold NaN or infinity"):
        calibration_of(given(source, [bad]), None)


def test_outliers_are_told_and_kept(source: Source) -> None:
    dense, ids = ranker_inputs(200)
    dense[9, 1] = -1e30
    found = calibration_of(given(source, [(dense, ids)]), None)
    assert found.rows == 200 and len(found.notes) == 1
    assert found.notes[0].startswith(
        "dense of the calibration data has outliers: 1e+30 in column 1, over 1000 times as large as usual"
    )
    dense[9, 1] = 4.0
    assert calibration_of(given(source, [(dense, ids)]), None).notes == ()


@pytest.mark.parametrize("rows", [2, 5, 64, 99, 1000])
@pytest.mark.parametrize("many", [1, 2])
def test_outliers_are_told_in_few_rows_and_in_columns_of_zeros(source: Source, rows: int, many: int) -> None:
    dense, ids = ranker_inputs(rows)
    assert outliers_of(source, dense, ids) == []
    sparse = torch.zeros_like(dense)
    sparse[0, 4] = 3.0
    assert outliers_of(source, sparse, ids) == []
    for many_rows in (dense, sparse):
        many_rows[: many if rows > 4 else 1, 2] = -1e30
        (told,) = outliers_of(source, many_rows, ids)
        assert "1e+30 in column 2" in told


def outliers_of(source: Source, *inputs: Tensor) -> list[str]:
    return [note for note in calibration_of(given(source, [inputs]), None).notes if "outliers" in note]


class Counted(nn.Module):
    """A bag of values and a weight for each of them: rows hang together by their offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(40, 8, mode="sum")

    def forward(self, values: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        return self.bag(values, offsets, weights).sum(1)


def counted_inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    values, offsets, _ = bag_inputs(batch)
    return values, offsets, torch.rand(len(values))


def test_batches_of_nan_are_left_out_where_rows_hang_together() -> None:
    source, _ = captured(Counted(), counted_inputs)
    batches = [counted_inputs(n) for n in (6, 7, 8)]
    batches[1][2][0] = torch.nan
    found = calibration_of(given(source, batches), None)
    assert found.rows == 14 and found.numbers == [0, 2]
    told = "1 of 3 batches of the calibration data left out for NaN or infinity, first batch 1, in weights"
    assert found.notes[0] == told


AUC = budget(["max-error=0.1", "auc-drop=0.1"])


@pytest.mark.parametrize("value", [2.0, 0.5, -1.0, np.nan])
def test_labels_of_auc_are_0_and_1(source: Source, tmp_path: Path, value: float) -> None:
    """The row is the file's, though rows before it are left out."""
    dense, ids = (tensor.numpy().copy() for tensor in ranker_inputs(70))
    dense[3, 0] = dense[64, 1] = np.nan
    label = (np.arange(70) % 2).astype(np.float64)
    label[66] = value
    np.savez(tmp_path / "rows.npz", dense=dense, ids=ids, label=label)
    data = calibration_of(source, tmp_path / "rows.npz")
    with pytest.raises(GrcError) as refused:
        check_labels(data, AUC)
    assert refused.value.message == f"row 66 of rows.npz has the label {value:g}; auc-drop takes 0 and 1"
    assert refused.value.hint is not None and refused.value.hint.startswith("give 1 for a row whose item was right")
    check_labels(data, budget(["ndcg-drop@5=0.1"]))


def test_labels_of_a_model_file_are_named_by_their_batch(source: Source) -> None:
    entries = [{"inputs": ranker_inputs(n), "labels": [1] * (n - 1) + [last]} for n, last in ((4, 0), (5, 3))]
    with pytest.raises(GrcError) as refused:
        check_labels(calibration_of(given(source, entries), None), AUC)
    assert refused.value.message == "row 4 of batch 1 of calibration() has the label 3; auc-drop takes 0 and 1"
    entries[1]["labels"] = [True, False, True, False, True]
    check_labels(calibration_of(given(source, entries), None), AUC)
