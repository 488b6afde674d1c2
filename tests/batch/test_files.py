"""Files of others stay as they are, and one file is not two things."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llamastate.batch import BatchRunner, run_batch, run_table
from llamastate.batch.journal import Journal
from llamastate.errors import BatchChangedError, CorruptStateError, InvalidArgumentError
from tests.batch.lines import by_id, chat, line, read, write

FOREIGN = [
    b"my precious work\n" * 100,
    b"\nmy diary, a single paragraph after a blank line, without line end",
    b"\n" + b"a\0b\n" * 100,
    b"\0" * 100,
    b"notes without an end",
    b'{"custom_id":"a","url":"/v1/completions","body":{}}\n',
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in", [chat(f"r{i}", "the and of", max_tokens=2) for i in range(3)])


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("content", FOREIGN)
def test_outputs_of_others(runner: BatchRunner, source: Path, tmp_path: Path, content: bytes, resume: bool) -> None:
    out = tmp_path / "out"
    out.write_bytes(content)
    with pytest.raises(CorruptStateError, match="not written by this command"):
        run_batch(source, out, runner=runner, resume=resume)
    assert out.read_bytes() == content
    assert not (tmp_path / "out.journal").exists()
    out.write_bytes(b"")
    assert run_batch(source, out, runner=runner, resume=resume).completed == 3
    if b"\0" not in content:  # also where there was an output of ours
        out.write_bytes(content)
        with pytest.raises(CorruptStateError):
            run_batch(source, out, runner=runner, resume=resume)
        assert out.read_bytes() == content


def test_an_output_of_ours_is_emptied(runner: BatchRunner, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_batch(source, out, runner=runner)
    out.write_bytes(b"\n" + out.read_bytes() + b"what somebody has added\n")
    assert run_batch(source, out, runner=runner, resume=False).completed == 3
    out.write_bytes(out.read_bytes().splitlines()[0][:100])  # torn, beside its journal
    assert run_batch(source, out, runner=runner, resume=False).completed == 3


@pytest.mark.parametrize("content", [b"", b"\0" * 300, b"head", b"head\0\0"])
def test_a_loss_of_power_in_the_first_second(runner: BatchRunner, source: Path, tmp_path: Path, content: bytes) -> None:
    out = tmp_path / "out"
    run_batch(source, out, runner=runner)
    out.write_bytes(content.replace(b"head", out.read_bytes()[:60]))
    (tmp_path / "out.journal").write_bytes(b"")
    assert run_batch(source, out, runner=runner).completed == 3
    assert len(read(out)) == 3


def test_the_journal_is_on_the_disk_before_the_first_result(
    runner: BatchRunner, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def watched(fd: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    before: list[str] = []
    run_batch(source, tmp_path / "out", runner=runner, on_progress=lambda p: p.done or before.extend(synced))
    assert {"out.journal", "out", tmp_path.name} <= set(before)


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000 + b"\n", b"9" * 5000 + b"\n", b'{"digest": "x"}\n', b'{"digest": [1], "run": 5}\n', b"my notes"],
)
def test_journals_of_others(runner: BatchRunner, source: Path, tmp_path: Path, content: bytes) -> None:
    out, journal = tmp_path / "out", tmp_path / "out.journal"
    run_batch(source, out, runner=runner)
    written = journal.read_bytes()
    journal.write_bytes(content)
    for resume in (True, False):
        with pytest.raises(CorruptStateError, match="move it away to go on") as caught:
            run_batch(source, out, runner=runner, resume=resume)
        assert caught.value.path == str(journal)
    assert journal.read_bytes() == content
    assert len(by_id(out)) == 3
    journal.unlink()
    assert run_batch(source, out, runner=runner).skipped == 3
    journal.write_bytes(written + content)  # beside what is whole it is passed over
    assert run_batch(source, out, runner=runner).skipped == 3


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_journals_that_are_no_files(runner: BatchRunner, source: Path, tmp_path: Path, kind: str) -> None:
    journal = tmp_path / "out.journal"
    os.mkfifo(journal) if kind == "pipe" else journal.mkdir()
    with pytest.raises(CorruptStateError, match="no ordinary file"):
        run_batch(source, tmp_path / "out", runner=runner)


def test_a_journal_that_has_lost_a_field(tmp_path: Path) -> None:
    path = tmp_path / "out.journal"
    journal = Journal(str(path), {"seed": 0})
    journal.begin(found=0)
    for other in (b'"run2":', b'"run": 5, "x":'):
        path.write_bytes(path.read_bytes().replace(b'"run":', other))
        with pytest.raises(BatchChangedError) as caught:
            Journal(str(path), {"seed": 1}).require_run(journal.run, "out")
        assert caught.value.field == "run"


def test_one_file_for_two_things(runner: BatchRunner, source: Path, tmp_path: Path) -> None:
    content = source.read_bytes()
    os.link(source, tmp_path / "linked")
    (tmp_path / "other.journal").symlink_to(source)
    for resume in (True, False):
        for out in (source, tmp_path / "linked", tmp_path / "other"):
            with pytest.raises(InvalidArgumentError, match="same file"):
                run_batch(source, out, runner=runner, resume=resume)
            with source.open("rb") as file, pytest.raises(InvalidArgumentError, match="same file"):
                run_batch(file, out, runner=runner, resume=resume)
    with source.open("ab") as file, pytest.raises(InvalidArgumentError, match="same file"):
        run_batch(source, file, runner=runner)
    assert source.read_bytes() == content
    assert not (tmp_path / "in.journal").exists()


# --- tables -----------------------------------------------------------------------------------------------------------


def asking(path: Path, **columns: Any) -> Path:
    pq.write_table(
        pa.table({"prompt": ["the and", "of to"], "sampling_params": ['{"max_tokens": 2}'] * 2, **columns}), path
    )
    return path


def test_tables_of_others(runner: BatchRunner, source: Path, tmp_path: Path) -> None:
    asked, out = asking(tmp_path / "in.parquet"), tmp_path / "out.parquet"
    for content in (pa.table({"salary": [1, 2, 3]}), None):
        out.write_bytes(b"neither this nor that") if content is None else pq.write_table(content, out)
        before = out.read_bytes()
        for given in (asked, source):
            with pytest.raises(CorruptStateError, match="not written by this command"):
                run_table(given, out, runner=runner)
        assert out.read_bytes() == before
    out.write_bytes(b"")
    assert run_table(asked, out, runner=runner).completed == 2
    assert run_table(asked, out, runner=runner).skipped == 2
    enriched = pq.read_table(out).append_column("label", pa.array(["good", "bad"]))
    pq.write_table(enriched, out)
    with pytest.raises(CorruptStateError):
        run_table(asked, out, runner=runner)
    assert pq.read_table(out)["label"].to_pylist() == ["good", "bad"]


def test_a_table_is_not_its_own_results(runner: BatchRunner, tmp_path: Path) -> None:
    asked = asking(tmp_path / "in.parquet", response=["keep", "me"])
    before = asked.read_bytes()
    with pytest.raises(InvalidArgumentError, match="same file"):
        run_table(asked, asked, runner=runner)
    assert asked.read_bytes() == before
    with pytest.warns(UserWarning, match="in the place of the input's response"):
        run_table(asked, tmp_path / "out.parquet", runner=runner)


@pytest.mark.parametrize("kind", ["stream", "lines", "mappings"])
def test_a_table_of_what_comes_once(runner: BatchRunner, tmp_path: Path, kind: str) -> None:
    lines = [*(line(f"r{i}", prompt=f"the and of {i}", max_tokens=2) for i in range(600)), b"rubbish\n"]
    given: Any = io.BytesIO(b"".join(lines)) if kind == "stream" else iter(lines)
    if kind == "mappings":
        given = map(json.loads, lines[:-1])
    summary = run_table(given, tmp_path / "out.parquet", runner=runner)
    found = pq.read_table(tmp_path / "out.parquet")
    assert summary.completed == 600
    expected = [f"r{i}" for i in range(600)] + [None] * (kind != "mappings")
    assert found["custom_id"].to_pylist() == expected
    assert found["generated_text"].null_count == len(expected) - 600
