"""grc run: every format in and out, requests in the users' words, and every way in which a request can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import grc as library
from grc.runtime.values import decode_columns, encode, tensor_of
from tests.cli.session import Grc, Ran, refused

ROW = {"dense": [0.5, -1.0, 2.0], "ids": [3, 7]}
FIELDS = "the inputs are dense, ids"


def answers(artifact: Path, rows: list[dict]) -> list[float]:
    program = library.load(artifact)
    return program(*(torch.tensor([row[name] for row in rows]) for name in ("dense", "ids"))).tolist()


def test_json_columns_from_a_file(grc: Grc, artifact: Path, tmp_path: Path):
    (tmp_path / "in.json").write_text(json.dumps({name: [value, value] for name, value in ROW.items()}))
    ran = grc("run", artifact, tmp_path / "in.json")
    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out) == {"output": answers(artifact, [ROW, ROW])}


def test_json_rows_on_a_pipe(grc: Grc, artifact: Path):
    ran = grc("run", artifact, "-", stdin=json.dumps([ROW]))
    assert json.loads(ran.out) == {"output": answers(artifact, [ROW])}


def test_json_lines_in_and_out(grc: Grc, artifact: Path):
    ran = grc("run", artifact, "-", "--format", "jsonl", stdin=f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n")
    assert [json.loads(line) for line in ran.out.splitlines()] == [{"output": a} for a in answers(artifact, [ROW, ROW])]


def test_a_line_of_json_ends_where_the_file_says(grc: Grc, artifact: Path):
    """Not at U+2028 or U+0085, which strings may hold: the name of this input is refused, and it is whole."""
    ran = grc("run", artifact, "-", "--format", "jsonl", stdin=json.dumps({"a\u2028b": 1}, ensure_ascii=False))
    assert ran.told[0].startswith("error: the request has an unknown input a")


def test_npz_in_and_out(grc: Grc, artifact: Path, tmp_path: Path):
    np.savez(tmp_path / "in.npz", dense=np.array([ROW["dense"]], "float32"), ids=np.array([ROW["ids"]]))
    assert grc("run", artifact, tmp_path / "in.npz", "-o", tmp_path / "out.npz").code == 0
    assert np.load(tmp_path / "out.npz")["output"].tolist() == answers(artifact, [ROW])


def test_parquet_in_and_out(grc: Grc, artifact: Path, tmp_path: Path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({name: [value, value] for name, value in ROW.items()}), tmp_path / "in.parquet")
    assert grc("run", artifact, tmp_path / "in.parquet", "-o", tmp_path / "out.parquet").code == 0
    written = parquet.read_table(tmp_path / "out.parquet").column("output").to_pylist()
    assert written == pytest.approx(answers(artifact, [ROW, ROW]))


@pytest.mark.parametrize(
    ("form", "request_of_none", "answer"),
    [
        ("json", '{"dense": [], "ids": []}', '{"output": []}\n'),
        ("json", "[]", '{"output": []}\n'),
        ("jsonl", "", ""),
    ],
)
def test_a_batch_of_no_rows_is_answered(grc: Grc, artifact: Path, form: str, request_of_none: str, answer: str):
    ran = grc("run", artifact, "-", "--format", form, stdin=request_of_none)
    assert (ran.code, ran.out, ran.err) == (0, answer, "")


@pytest.mark.parametrize("form", ["json", "jsonl", "npz", "parquet"])
def test_what_was_answered_to_no_rows_is_read_again(grc: Grc, artifact: Path, tmp_path: Path, form: str):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    np.savez(tmp_path / "in.npz", dense=np.zeros((0, 3), "float32"), ids=np.zeros((0, 2), "int64"))
    assert grc("run", artifact, tmp_path / "in.npz", "-o", tmp_path / f"out.{form}").code == 0
    columns = decode_columns((tmp_path / f"out.{form}").read_bytes(), form, ["output"])
    assert list(columns) == ["output"] and len(columns["output"]) == 0


def test_only_some_inputs_of_no_rows_are_refused(grc: Grc, artifact: Path):
    refused(
        grc("run", artifact, "-", stdin='{"dense": [], "ids": [[1, 2]]}'),
        'error: input "ids" has size 1 in dimension 0; at batch 0 it must be 0',
        "hint: give every input the same batch",
    )


def test_an_input_of_no_values_takes_the_sizes_of_its_rows():
    """Sizes that vary are 0, and what is not there can't stand for a size that may not be."""
    spec = {"name": "x", "dtype": "int64", "sizes": ["batch", "s0", 4]}
    assert tensor_of([], spec, exact=False).shape == (0, 0, 4)
    assert tensor_of([[], []], spec, exact=False).shape == (2, 0, 4)
    assert tensor_of([], spec, exact=False).dtype is torch.int64
    assert tensor_of([], {**spec, "sizes": [{"scale": 1, "offset": 1}]}, exact=False).shape == (0,)


@pytest.mark.parametrize(
    ("form", "text"),
    [("json", '{"y": [1.0, null, null]}\n'), ("jsonl", '{"y": 1.0}\n{"y": null}\n{"y": null}\n')],
)
def test_what_json_has_no_number_for_is_null(form: str, text: str):
    assert encode({"y": torch.tensor([1.0, torch.inf, -torch.inf])}, form) == text.encode()


@pytest.mark.parametrize("form", ["json", "jsonl", "npz", "parquet"])
def test_an_example_can_be_run_as_it_is(grc: Grc, artifact: Path, tmp_path: Path, form: str):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    example = tmp_path / f"example.{form}"
    assert grc("run", artifact, "--example", "-o", example).code == 0
    ran = grc("run", artifact, example, "-o", tmp_path / "out.json")
    assert (ran.code, ran.err) == (0, "")
    assert len(json.loads((tmp_path / "out.json").read_text())["output"]) == 2


def test_an_example_can_be_what_perf_analyzer_sends(grc: Grc, artifact: Path):
    ran = grc("run", artifact, "--example", "--format", "perf_analyzer")
    assert ran.code == 0
    requests = json.loads(ran.out)["data"]
    assert len(requests) > 1
    # One row each, without its batch: what is left are requests that the artifact answers.
    rows = [{name: tensor["content"] for name, tensor in request.items()} for request in requests]
    assert [request[name]["shape"] for request in requests for name in request] == [
        [len(x)] for row in rows for x in row.values()
    ]
    answered = grc("run", artifact, "-", stdin=json.dumps(rows))
    assert len(json.loads(answered.out)["output"]) == len(requests)
    assert grc("run", artifact, "-", "--format", "perf_analyzer", stdin="[]").code == 2


def test_an_engine_can_be_named(grc: Grc, artifact: Path):
    assert grc("run", artifact, "-", "--engine", "eager", stdin=json.dumps([ROW])).code == 0
    refused(
        grc("run", artifact, "-", "--engine", "inductor", stdin=json.dumps([ROW])),
        "error: tiny.grc holds no part for engine inductor",
        "hint: it holds eager",
    )


def test_a_request_in_the_users_words(grc: Grc, folder: Path, tmp_path: Path):
    path = tmp_path / "served.grc"
    assert grc("compile", folder / "served.py", "-o", path, "--engine", "eager", "--batches", "4").code == 0
    request = {"dense": ROW["dense"], "user": 3, "item": 7}
    ran = grc("run", path, "-", "--request", stdin=json.dumps(request))
    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out) == {"user": 3, "click": round(answers(path, [ROW])[0], 4)}
    refused(
        grc("run", path, "-", "--request", stdin='{"user": 3}'),
        "error: preprocess: 'dense'",
        "hint: see the model's request schema",
    )
    refused(
        grc("run", path, "-", "--request", stdin="[1]"),
        "error: the request is a JSON list, not an object",
        "hint: send one JSON object",
    )


def test_a_request_needs_an_artifact_with_preprocess(grc: Grc, artifact: Path):
    refused(
        grc("run", artifact, "-", "--request", stdin="{}"),
        "error: tiny.grc has no preprocess and no postprocess",
        "hint: define them in the model file, or send tensors",
    )


WRONG = {
    "misses": ({"ids": [[1, 2]]}, "the request misses input dense", FIELDS),
    "unknown": ({**{k: [v] for k, v in ROW.items()}, "age": [1]}, "the request has an unknown input age", FIELDS),
    "ragged": (
        {"dense": [ROW["dense"], [1.0]], "ids": [[1, 2], [1, 2]]},
        'input "dense" has rows of different lengths',
        "pad them to one length",
    ),
    "fraction": (
        {"dense": [ROW["dense"]], "ids": [[1.5, 2]]},
        'input "ids" has floating-point numbers; the model takes int64',
        "see grc inspect",
    ),
    "whole numbers with a point": (
        {"dense": [ROW["dense"]], "ids": [[2.0, 2]]},
        'input "ids" has floating-point numbers; the model takes int64',
        "see grc inspect",
    ),
    "words": (
        {"dense": [["a", "b", "c"]], "ids": [[1, 2]]},
        'input "dense" has values that are no numbers; the model takes float32',
        "see grc inspect",
    ),
    "rank": (
        {"dense": ROW["dense"], "ids": [[1, 2]]},
        'input "dense" has 1 dimensions [3]; the model takes [batch, 3]',
        "see grc inspect",
    ),
    "width": (
        {"dense": [[1.0]], "ids": [[1, 2]]},
        'input "dense" has shape [1, 1]; the model takes [batch, 3]',
        "see grc inspect",
    ),
    "batch": (
        {"dense": [ROW["dense"]], "ids": [[1, 2], [1, 2]]},
        'input "ids" has size 2 in dimension 0; at batch 1 it must be 1',
        "give every input the same batch",
    ),
    "large": (
        {"dense": [ROW["dense"]] * 4097, "ids": [[1, 2]] * 4097},
        "the request has batch 4097; the artifact takes up to 4096",
        "split the request, or compile with --max-batch 4097",
    ),
    "nan": (
        {"dense": [[1.0, float("nan"), 0.0]], "ids": [[1, 2]]},
        'input "dense" holds nan at [0, 1]',
        "clean the features before the request",
    ),
    "id": (
        {"dense": [ROW["dense"]] * 2, "ids": [[1, 2], [1, 80]]},
        'input "ids" has id 80 at row 1, column 1; table items.weight has 80 rows',
        "compile with --on-bad-id zero, or retrain with a larger table",
    ),
    "negative": (
        {"dense": [ROW["dense"]], "ids": [[-1, 2]]},
        'input "ids" has id -1 at row 0, column 0; table users.weight has 50 rows',
        "compile with --on-bad-id zero, or retrain with a larger table",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_named(grc: Grc, compiled: tuple[Path, Ran], case: str):
    request, message, hint = WRONG[case]
    refused(grc("run", compiled[0], "-", stdin=json.dumps(request)), f"error: {message}", f"hint: {hint}")


def test_an_npz_of_another_dtype_is_refused(grc: Grc, artifact: Path, tmp_path: Path):
    np.savez(tmp_path / "in.npz", dense=np.array([ROW["dense"]], "float64"), ids=np.array([ROW["ids"]]))
    refused(
        grc("run", artifact, tmp_path / "in.npz"),
        'error: input "dense" is float64; the model takes float32',
        "hint: convert it: dense.to(torch.float32)",
    )


@pytest.mark.parametrize(
    ("form", "data", "reason"),
    [
        ("json", b"{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("json", b"3", "it must be an object of columns or a list of rows"),
        ("json", b"\xff", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        ("json", b"[" * 100_000, "maximum recursion depth exceeded"),
        ("jsonl", b"3", "it must hold at least one row, each an object"),
        ("jsonl", b'{"a": 1}\n{"b": 1}', "row 1 has the inputs b, row 0 has a"),
        ("jsonl", b'{"a": 1}\n\n{"a" 1}', "line 3: Expecting ':' delimiter at column 6"),
        ("jsonl", b'{"a": 1}\n{"\xff": 1}', "line 2: 'utf-8' codec can't decode byte 0xff in position 2"),
        ("npz", b"zip?", None),
        ("parquet", b"PAR?", None),
    ],
)
def test_a_request_that_cannot_be_read(
    grc: Grc, compiled: tuple[Path, Ran], form: str, data: bytes, reason: str | None
):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    ran = grc("run", compiled[0], "-", "--format", form, stdin=data)
    assert ran.told[0].startswith(f"error: the request is no {form}: {reason or ''}")
    assert ran.told[1:] == ["hint: see grc run ARTIFACT --example"]
    assert (ran.out, ran.code) == ("", 1)


def test_a_request_file_must_exist_and_have_a_format(grc: Grc, artifact: Path, tmp_path: Path):
    refused(
        grc("run", artifact, tmp_path / "no.json"),
        f"error: no request file at {tmp_path}/no.json",
        "hint: make one with grc run ARTIFACT --example -o request.json",
    )
    refused(
        grc("run", artifact, "--request", tmp_path / "no.json"),
        f"error: no request file at {tmp_path}/no.json",
        "hint: write the JSON object that preprocess() takes",
    )
    (tmp_path / "in.csv").write_text("")
    refused(
        grc("run", artifact, tmp_path / "in.csv"),
        f"error: {tmp_path}/in.csv has no known format",
        "hint: name it with --format: json, jsonl, npz, parquet",
    )


def test_an_answer_that_cannot_be_written(grc: Grc, artifact: Path, tmp_path: Path):
    refused(
        grc("run", artifact, "-", "-o", tmp_path / "no" / "out.json", stdin=json.dumps([ROW])),
        f"error: {tmp_path}/no/out.json: No such file or directory",
        "hint: choose another path, or free some space",
    )


def test_help_shows_the_form_of_json(grc: Grc):
    assert 'JSON is either {"input": [row, row, …]} or a list of rows' in " ".join(grc("run", "--help").out.split())


def test_input_or_example_but_not_both_and_not_none(grc: Grc, artifact: Path):
    for words in ((), ("in.json", "--example"), ("--example", "--request")):
        ran = grc("run", artifact, *words)
        assert ran.code == 2
        assert "--example" in ran.err


SAFE = {"zero": None, "clamp": 49, "hash": 3}  # what an id of 103 reads in a table of 50 rows


@pytest.mark.parametrize("policy", SAFE)
def test_a_policy_makes_bad_ids_safe(grc: Grc, model: Path, artifact_path: Path, policy: str):
    flags = ("--engine", "eager", "--batches", "4", "--on-bad-id", policy)
    assert grc("compile", model, "-o", artifact_path, *flags).code == 0
    ran = grc("run", artifact_path, "-", stdin=json.dumps([{**ROW, "ids": [103, 7]}]))
    assert (ran.code, ran.err) == (0, "")
    namespace: dict = {"__name__": "tiny"}
    exec(compile(model.read_text(), "tiny.py", "exec"), namespace)
    tiny, row = namespace["get_model"](), SAFE[policy]
    with torch.no_grad():
        if row is None:
            tiny.users.weight[3] = 0
        expected = tiny(torch.tensor([ROW["dense"]]), torch.tensor([[3 if row is None else row, 7]])).tolist()
    assert json.loads(ran.out)["output"] == pytest.approx(expected, abs=1e-6)
