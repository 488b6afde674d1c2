"""Rows, Parquet and Arrow: the same results, beside the rows that asked for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from llamastate.batch import BatchRunner, run_batch, run_rows, run_table
from llamastate.errors import LoadError, SaveError, StateFileNotFoundError
from tests.batch.lines import by_id, chat, line, text, write

PARAMS = {"max_tokens": 4, "temperature": 0.0}


def rows(n: int = 20) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"the and of {i}"}], "sampling_params": PARAMS, "topic": f"t{i}"}
        for i in range(n)
    ]


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_tables(runner: BatchRunner, tmp_path: Path, ending: str) -> None:
    table = pa.Table.from_pylist(rows())
    source, out = tmp_path / f"in.{ending}", tmp_path / f"out.{ending}"
    (pq.write_table if ending == "parquet" else pyarrow.feather.write_feather)(table, source)
    totals: list[Any] = []
    summary = run_table(source, out, runner=runner, on_progress=lambda p: totals.append(p.total))
    assert summary.completed == 20
    assert totals[-1] == (20 if ending == "parquet" else None)
    found = pq.read_table(out) if ending == "parquet" else pyarrow.feather.read_table(out)
    assert found.select(table.schema.names).equals(table)  # in the order of the input
    written = by_id(Path(f"{out}.results.jsonl"))
    for i, row in enumerate(found.to_pylist()):
        assert row["generated_text"] == text(written[str(i)])
        assert row["num_generated_tokens"] <= 4
        assert row["__inference_error__"] is None
        assert json.loads(row["response"])["usage"]["prompt_tokens"] == row["num_input_tokens"]
    run_batch(write(tmp_path / "in", [chat("0", "the and of 0", **PARAMS)]), tmp_path / "one", runner=runner)
    assert text(by_id(tmp_path / "one")["0"]) == found["generated_text"][0].as_py()
    assert run_table(source, out, runner=runner).skipped == 20


def test_errors_have_their_column(runner: BatchRunner, tmp_path: Path) -> None:
    asked = [
        {"custom_id": "a", "prompt": "the of", "sampling_params": json.dumps({"max_tokens": 2, "logprobs": 1})},
        {"custom_id": "b", "prompt": "the of", "sampling_params": '{"nonsense": 1}'},
        {"custom_id": "c", "prompt": "the of", "sampling_params": "{"},
        {"custom_id": "a", "prompt": "the of", "sampling_params": None},
        {"custom_id": "d", "prompt": None, "sampling_params": None},
    ]
    pq.write_table(pa.Table.from_pylist(asked), tmp_path / "in.parquet")
    run_table(tmp_path / "in.parquet", tmp_path / "out.parquet", runner=runner)
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["custom_id"] for row in found] == ["a", "b", "c", "a", "d"]
    assert found[0]["generated_text"] is not None
    assert json.loads(found[0]["response"])["choices"][0]["logprobs"]["tokens"]
    for row, word in zip(found[1:], ["nonsense", "object", "before", "prompt"], strict=True):
        assert row["generated_text"] is None
        assert row["__inference_error__"].startswith("InvalidRequestError: ")
        assert word in row["__inference_error__"]


def test_lines_in_a_table_out(runner: BatchRunner, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [chat(f"r{i}", "the", max_tokens=2) for i in range(3)] + [b"rubbish\n"])
    run_table(source, tmp_path / "out.parquet", runner=runner)
    found = pq.read_table(tmp_path / "out.parquet")
    assert found["custom_id"].to_pylist() == ["r0", "r1", "r2", None]
    run_table(pa.Table.from_pylist(rows(3)), tmp_path / "out.jsonl", runner=runner)
    assert by_id(tmp_path / "out.jsonl").keys() == {"0", "1", "2"}


def test_dicts(runner: BatchRunner) -> None:
    asked: list[dict[str, Any]] = [
        *rows(5),
        {"tokenized_prompt": np.array([5, 6, 7]), "sampling_params": {"max_tokens": np.int64(3)}},
        {"messages": [{"role": "user", "content": "x"}], "sampling_params": {"logprobs": 2, "max_tokens": 1}},
        {"nothing": object()},
        {"prompt": "x", "sampling_params": {"max_tokens": object()}},
    ]
    found = list(run_rows(asked, runner))
    assert len(found) == len(asked)
    by_row = [next(row for row in found if all(row.get(k) is v for k, v in one.items())) for one in asked]
    assert [row["__inference_error__"] is None for row in by_row] == [True] * 7 + [False] * 2
    assert by_row[5]["num_input_tokens"] == 3
    assert len(json.loads(by_row[6]["response"])["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2


def test_a_bad_row_is_its_own_error(runner: BatchRunner) -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    bad: list[Any] = [
        5, None, {}, {"tokenized_prompt": 5}, {"tokenized_prompt": "text"}, {"prompt": deep}, {"prompt": b"bytes"},
        {"prompt": "x", "sampling_params": "[" * 100_000}, {"messages": "[" * 100_000}, {"messages": [5]},
        {"prompt": "x", "sampling_params": {(1, 2): 2}}, {"prompt": "x", "sampling_params": [1]},
        {"prompt": float("nan")}, {"prompt": object()},
    ]  # fmt: skip
    good = {"prompt": "the", "sampling_params": {"max_tokens": 1}}
    found = list(run_rows([good, *bad, {**good, "custom_id": "\ud800"}, good], runner))
    assert len(found) == len(bad) + 3
    assert sum(row["__inference_error__"] is None for row in found) in (2, 3)
    assert all(
        row["__inference_error__"] is None for row in found if row.get("prompt") == "the" and "custom_id" not in row
    )


def test_a_bad_row_of_a_table_is_its_own_error(runner: BatchRunner, tmp_path: Path) -> None:
    pq.write_table(pa.table({"tokenized_prompt": [5, 6]}), tmp_path / "in.parquet")
    assert run_table(tmp_path / "in.parquet", tmp_path / "out.parquet", runner=runner).failed == 2
    asked = {
        "custom_id": ["1", None, "x"],
        "prompt": ["the", "and", "of"],
        "sampling_params": ['{"max_tokens": 1}'] * 3,
    }
    pq.write_table(pa.table(asked), tmp_path / "ids.parquet")
    assert run_table(tmp_path / "ids.parquet", tmp_path / "named.parquet", runner=runner).completed == 3
    assert pq.read_table(tmp_path / "named.parquet")["custom_id"].to_pylist() == ["1", None, "x"]


def test_embeddings(runner: BatchRunner, tmp_path: Path) -> None:
    lines = [
        line(f"r{i}", "/v1/embeddings", input=given, encoding_format=form)
        for i, (given, form) in enumerate([("the", "float"), ("the", "base64"), (["the", "of"], "float")])
    ]
    run_table(write(tmp_path / "in.jsonl", lines), tmp_path / "out.parquet", runner=runner)
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    one, other, several = (np.array(row["embedding"], np.float32) for row in found)
    assert one.shape == (runner.model.n_embd_out,)
    np.testing.assert_allclose(one, other, atol=1e-3)
    np.testing.assert_allclose(one, several, atol=1e-3)
    data = json.loads(found[2]["response"])["data"]
    assert len(data) == 2
    assert len(data[1]["embedding"]) == runner.model.n_embd_out
    assert json.loads(found[0]["response"])["data"][0]["embedding"] is None


def test_faults(runner: BatchRunner, tmp_path: Path) -> None:
    with pytest.raises(StateFileNotFoundError):
        run_table(tmp_path / "none.parquet", tmp_path / "out.parquet", runner=runner)
    for ending in ("parquet", "arrow"):
        bad = tmp_path / f"bad.{ending}"
        bad.write_bytes(b"nothing of the kind")
        with pytest.raises(LoadError) as caught:
            run_table(bad, tmp_path / "out.parquet", runner=runner)
        assert caught.value.path == str(bad)
    pq.write_table(pa.Table.from_pylist(rows(3)), tmp_path / "in.parquet")
    (tmp_path / "out.parquet").mkdir()
    with pytest.raises(SaveError):
        run_table(tmp_path / "in.parquet", tmp_path / "out.parquet", runner=runner)
    (tmp_path / "out.parquet").rmdir()
    assert not (tmp_path / "out.parquet.results.jsonl").exists()

    def intrude(_: Any) -> None:
        (tmp_path / "out.parquet").mkdir(exist_ok=True)

    with pytest.raises(SaveError, match="the results are in"):
        run_table(tmp_path / "in.parquet", tmp_path / "out.parquet", runner=runner, on_progress=intrude)
    (tmp_path / "out.parquet").rmdir()
    assert run_table(tmp_path / "in.parquet", tmp_path / "out.parquet", runner=runner).skipped == 3
    assert len(pq.read_table(tmp_path / "out.parquet")) == 3
    assert not list(tmp_path.glob(".*"))
