"""Keys, the index and the file beside an output."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamastate.batch.journal import Index, Journal, Key, key_of, name_of, read_record, run_digest
from llamastate.batch.openai import read_line
from llamastate.batch.responses import error_line
from llamastate.errors import BatchChangedError, InvalidRequestError
from tests.batch.lines import line

FACTS = {"weights": "abc", "seed": 0}


def test_a_key_is_what_was_asked_and_of_what_run() -> None:
    asked = read_line(line("a", prompt="x"), 1)
    key = key_of(asked, run_digest(FACTS))
    assert key == key_of(read_line(line("a", prompt="x"), 2), run_digest(dict(reversed(FACTS.items()))))
    assert key.body != key_of(read_line(line("b", prompt="x"), 2), key.run).body
    assert key.body != key_of(read_line(line("a", prompt="y"), 1), key.run).body
    assert key.run != run_digest({**FACTS, "seed": 1})
    record = read_record(error_line(key.id, asked, InvalidRequestError("x")))
    assert record is not None
    assert (record.key, record.custom_id, record.failed, record.name) == (key, "a", True, name_of("a", ""))


def test_frozen() -> None:
    """Outputs of older versions have to be gone on with: other digests are another format."""
    key = key_of(read_line(line("a", prompt="x"), 1), run_digest(FACTS))
    assert key.id == "batch_req_b74bb87acbf730642474269a02298248"


@given(st.text(max_size=20) | st.none(), st.text(max_size=20) | st.none())
def test_names(one: str | None, other: str | None) -> None:
    assert (name_of(one, "00") == name_of(other, "00")) == (one == other)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"\xff",
        b"[" * 10**5,
        b'{"id":1,"custom_id":"a","response":null,"error":null}',
        b'{"id":"batch_req_%s","custom_id":"a","response":null,"error":null}' % (b"g" * 32),
        b'{"id":"batch_req_%s","custom_id":"a","response":null,"error":null}' % (b"0" * 31),
        b'{"id":"batch_req_%s","custom_id":"a","response":null}' % (b"0" * 32),
    ],
)
def test_lines_that_are_not_ours(raw: bytes) -> None:
    assert read_record(raw) is None


def test_a_change_is_told_in_callers_words(tmp_path: Path) -> None:
    path = str(tmp_path / "out.journal")
    journal = Journal(path, {"v_trans": True})
    journal.begin(found=0)
    with pytest.raises(BatchChangedError, match="flash_attn was 'off', now 'on'") as caught:
        Journal(path, {"v_trans": False}).require_run(journal.run, "out")
    assert (caught.value.field, caught.value.expected, caught.value.found) == ("v_trans", True, False)


def test_index() -> None:
    index = Index()
    names = [name_of(str(i), "") for i in range(1000)]
    key = Key("0" * 16, "1" * 16)
    assert all(index.add(name, key) for name in names)
    assert not index.add(names[0], key)
    assert index.get(names[5]) == key
    index.remove(names[5])
    assert index.get(names[5]) is None
    assert [index.see(names[5]) for _ in range(3)] == [0, 1, 2]
    index.close()
    index.close()


def test_the_journal_says_what_digests_cannot(tmp_path: Path) -> None:
    path = str(tmp_path / "out.journal")
    journal = Journal(path, FACTS)
    assert not journal.known
    journal.begin(found=0, input=[1, 2])
    journal.note(event="results")
    again = Journal(path, {**FACTS, "seed": 1})
    assert again.known
    assert again.had_results
    assert again.input == [1, 2]
    with pytest.raises(BatchChangedError) as caught:
        again.require_run(journal.run, "out")
    assert (caught.value.field, caught.value.expected, caught.value.found) == ("seed", 0, 1)
    with pytest.raises(BatchChangedError) as caught:
        again.require_run("0" * 16, "out")
    assert caught.value.field == "run"
    again.require_run(again.run, "out")
    again.forget()
    assert not os.path.exists(path)


@pytest.mark.parametrize("tail", [b'{"event": "res', b"\0\0\0", b"[]\n", b"\xff\n"])
def test_a_torn_journal_goes_on(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "out.journal"
    Journal(str(path), FACTS).begin(found=0)
    path.write_bytes(path.read_bytes() + tail)
    journal = Journal(str(path), FACTS)
    journal.note(event="results")
    assert Journal(str(path), FACTS).had_results
    assert json.loads(path.read_bytes().splitlines()[-1])["event"] == "results"
