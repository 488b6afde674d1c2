"""Lines, wherever they come from: none is lost, none is made of two."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamastate.batch import openai, source
from llamastate.batch.source import Source
from llamastate.errors import InvalidArgumentError

LIMIT = 1 << 16


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (openai, source):
        monkeypatch.setattr(module, "MAX_LINE", LIMIT)


def lines(given: Any) -> list[tuple[int, bytes]]:
    return [(number, raw.strip()) for number, raw in Source(given).lines()]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("extra", [-2, -1, 0])
def test_a_line_of_nearly_the_longest_length(extra: int, end: bytes) -> None:
    first = b'{"custom_id":"a"}'.ljust(LIMIT + extra - 1) + b"x"
    assert lines(io.BytesIO(first + end + b"b" + end + b"c")) == [(1, first), (2, b"b"), (3, b"c")]


@pytest.mark.parametrize("extra", [2, 3, 1 << 20, (1 << 20) + LIMIT + 1, (1 << 20) + LIMIT + 2])
def test_a_line_too_long_is_an_error_and_takes_no_other_with_it(extra: int) -> None:
    # what is left of it when it is cut would be a request
    first = b'  {"custom_id":"a"}'.ljust(LIMIT + extra - 1) + b"x"
    found = lines(io.BytesIO(first + b"\nb\nc\n"))
    assert [number for number, _ in found] == [1, 2, 3]
    assert [raw for _, raw in found[1:]] == [b"b", b"c"]
    error = openai.read_line(found[0][1], 1).error
    assert error is not None
    assert error.code == "line_too_long"


@pytest.mark.parametrize("buffered", [True, False])
def test_a_pipe_that_does_not_wait(buffered: bool) -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)

    def write() -> None:
        with os.fdopen(writing, "wb", buffering=0) as file:
            for piece in (b"ahead\nfir", b"st\nsec", b"ond", b"\n", b"third"):
                file.write(piece)
                time.sleep(0.03)

    thread = threading.Thread(target=write)
    with os.fdopen(reading, "rb", buffering=-1 if buffered else 0) as file:
        thread.start()
        if buffered:
            while not (ahead := file.readline()):
                time.sleep(0.01)
            assert ahead == b"ahead\n"  # what is in its buffer already is not passed over
        expected = [b"first", b"second", b"third"]
        assert [raw for _, raw in lines(file)] == (expected if buffered else [b"ahead", *expected])
        assert not file.closed
    thread.join()


def test_what_is_no_input(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"{}\n")
    with (tmp_path / "in").open() as text:
        for given, word in ((io.StringIO("{}"), "'rb'"), (text, "'rb'"), (5, "int"), ({"custom_id": "a"}, "list")):
            with pytest.raises(InvalidArgumentError, match=word):
                Source(given)

    class Text:
        def readline(self, _: int) -> str:
            return "{}"

    def deep() -> Iterator[Any]:
        item: Any = []
        for _ in range(100_000):
            item = [item]
        yield item

    for given in (Text(), deep()):
        with pytest.raises(InvalidArgumentError):
            lines(given)
