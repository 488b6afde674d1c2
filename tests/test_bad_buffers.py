"""Buffers and paths that will not do: which error, with what in it, and that nothing has changed."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamastate import (
    BufferTooSmallError,
    Context,
    FileAccessError,
    InvalidBufferError,
    LlamaStateError,
    Model,
    SaveError,
    StateFileNotFoundError,
    TokenizeError,
)
from tests import tiny
from tests.bad import Pair, pair


@pytest.fixture(params=["dense", "iswa", "mamba", "jamba", "qwen2vl"])
def p(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with pair(request.param) as found:
        yield found


@pytest.fixture
def dense() -> Iterator[Pair]:
    with pair("dense") as found:
        yield found


# --- buffers ----------------------------------------------------------------------------------------------------------

WHOLE = (Context.state_get_size, Context.state_get_data_into, Context.state_set_data)
ONE = (
    lambda ctx: ctx.state_seq_get_size(0),
    lambda ctx, out: ctx.state_seq_get_data_into(out, 0),
    lambda ctx, src: ctx.state_seq_set_data(src, 0),
)
each_form = pytest.mark.parametrize("form", [WHOLE, ONE], ids=["whole", "sequence"])


@each_form
def test_buffers_too_small(p: Pair, form: Any):
    size, into, _ = form
    needed = size(p.ctx)
    for got in (0, 1, 8, needed - 1):
        out = bytearray(b"\xa5" * got)
        with p.refuses(BufferTooSmallError, needed=needed, got=got):
            into(p.ctx, out)
        assert out == b"\xa5" * got
    words = np.zeros(needed // 4, np.uint32)  # rounded down
    if words.nbytes < needed:
        with p.refuses(BufferTooSmallError, needed=needed, got=words.nbytes):
            into(p.ctx, words)


@each_form
def test_buffers_that_cannot_be_written(dense: Pair, form: Any):
    size, into, _ = form
    n = size(dense.ctx)
    frozen = np.zeros(n, np.uint8)
    frozen.setflags(write=False)
    wide = np.zeros((n, 2), np.uint8)
    for out in (bytes(n), memoryview(bytearray(n)).toreadonly(), frozen, wide[:, 0], np.zeros(2 * n, np.uint8)[::2],
                np.zeros((n, 2), np.uint8, order="F")[:, ::-1], "text", None, 5, [0] * n, object()):  # fmt: skip
        with dense.refuses(InvalidBufferError, type=type(out).__name__) as caught:
            into(dense.ctx, out)
        assert isinstance(caught[0], TypeError)
        assert caught[0].reason
    assert not frozen.any()
    assert not wide.any()


@each_form
def test_arrays_of_objects_are_no_memory(dense: Pair, form: Any):
    """Their bytes are pointers; written over, they end the interpreter some time later."""
    size, into, _ = form
    things = np.array([object() for _ in range(size(dense.ctx) // 8 + 1)])
    mixed = np.zeros(size(dense.ctx) // 16 + 1, np.dtype([("a", object), ("b", np.int64)]))
    for out in (things, mixed):
        with dense.refuses(InvalidBufferError, reason="holds objects", type="ndarray"):
            into(dense.ctx, out)
    assert all(type(thing) is object for thing in things)


@each_form
def test_buffers_that_cannot_be_read(dense: Pair, form: Any):
    _, _, set_data = form
    for src in (np.zeros(1000, np.uint8)[::2], np.zeros((30, 30))[:, 0], memoryview(bytes(64))[::2], "text", None, 5,
                [1, 2], {}, object()):  # fmt: skip
        with dense.refuses(InvalidBufferError, type=type(src).__name__):
            set_data(dense.ctx, src)
    gone = memoryview(bytearray(100))
    gone.release()
    with dense.refuses(InvalidBufferError, type="memoryview"):
        set_data(dense.ctx, gone)
    for empty in (b"", np.empty((0, 4)), array.array("i")):
        with dense.unchanged(), pytest.raises(LlamaStateError):
            set_data(dense.ctx, empty)


def test_a_pinned_buffer_is_let_go_after_an_error(dense: Pair):
    for call in (
        dense.ctx.state_get_data_into,
        lambda out: dense.ctx.state_seq_get_data_into(out, 0),
        lambda out: dense.ctx.state_seq_set_data(out, 0),
        dense.ctx.state_set_data,
        lambda out: dense.ctx.state_seq_get_data_into(out, 99),
        lambda out: dense.ctx.state_seq_set_data(out, 0, 99),
    ):
        out = bytearray(10)
        with pytest.raises(LlamaStateError) as caught:
            call(out)
        out.extend(b"more")  # BufferError if anybody still held it
        del caught


# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(dense: Pair, tmp_path: Path) -> Path:
    found = tmp_path / "state"
    dense.ctx.state_seq_save_file(found, 0, [1])
    return found


READS = (Context.state_load_file, lambda ctx, path: ctx.state_seq_load_file(path, 0))
WRITES = (
    lambda ctx, path: ctx.state_save_file(path, [1]),
    lambda ctx, path: ctx.state_seq_save_file(path, 0, [1]),
)


def test_paths_that_cannot_be_read(dense: Pair, tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    missing = tmp_path / "missing"
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("missing")
    for read in READS:
        for path in (missing, tmp_path / "no" / "folder", "", tmp_path / "dangling", os.fsencode(missing)):
            with dense.refuses(StateFileNotFoundError, path=os.fsdecode(path), code=2) as caught:
                read(dense.ctx, path)
            assert isinstance(caught[0], FileNotFoundError)
        for path in (tmp_path, pipe, tmp_path / "socket", "/dev/zero", "/dev/null", tmp_path / "loop", "a\0b",
                     str(missing) + "x" * 5000, tmp_path / "pipe" / "x"):  # fmt: skip
            with dense.refuses(FileAccessError, path=os.fsdecode(path)) as caught:
                read(dense.ctx, path)
            assert isinstance(caught[0], OSError)
            assert caught[0].reason
        for path in (None, 5, 1.5, object(), [str(missing)]):
            with dense.refuses(FileAccessError, path=None, reason="not a path"):
                read(dense.ctx, path)
        (tmp_path / "empty").write_bytes(b"")
        with pytest.raises(LlamaStateError) as info, dense.unchanged():
            read(dense.ctx, tmp_path / "empty")
        assert info.value.path == str(tmp_path / "empty")


@pytest.mark.parametrize("write", WRITES, ids=["whole", "sequence"])
def test_paths_that_cannot_be_written(dense: Pair, tmp_path: Path, write: Any):
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"old")
    before = sorted(os.listdir(tmp_path))
    paths = [tmp_path, tmp_path / "no" / "folder", "", tmp_path / "loop", tmp_path / "pipe", "/dev/null", "/dev/full"]
    for path in (
        *paths,
        "/proc/self/state",
        tmp_path / "file" / "x",
        "a\0b",
        tmp_path / ("x" * 5000),
        "\udcff\udc00/x",
    ):
        with dense.refuses(SaveError, path=os.fsdecode(path)) as caught:
            write(dense.ctx, path)
        assert isinstance(caught[0], OSError)
        assert caught[0].reason
    for path in (None, 5, 1.5, object()):
        with dense.refuses(SaveError, path=None, reason="not a path"):
            write(dense.ctx, path)
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "file").read_bytes() == b"old"
    assert not Path("/dev/null").is_file()


def test_bytes_are_paths_as_well(dense: Pair, tmp_path: Path):
    path = os.fsencode(tmp_path / "state-\udcff")
    assert dense.ctx.state_seq_save_file(path, 0, [1]) == os.path.getsize(path)
    found, _ = dense.ctx.state_seq_load_file(path, 0)
    assert found.tolist() == [1]
    with Model(os.fsencode(tiny.path("dense"))) as loaded:
        assert loaded.memory_kind == "attention"


@pytest.mark.parametrize(
    "bad", [[-1], [256], [2**31], [2**70], [1.5], ["a"], [[1]], [[1], [2, 3]], None, 5, "ab", [None]], ids=repr
)
@pytest.mark.parametrize("write", [0, 1], ids=["whole", "sequence"])
def test_tokens_that_cannot_be_saved(dense: Pair, tmp_path: Path, write: int, bad: Any):
    calls = (
        lambda: dense.ctx.state_save_file(tmp_path / "state", bad),
        lambda: dense.ctx.state_seq_save_file(tmp_path / "state", 0, bad),
    )
    with dense.refuses(TokenizeError, n_vocab=256) as caught:
        calls[write]()
    if bad in ([-1], [256], [2**31]):
        assert caught[0].token == bad[0]
    assert not (tmp_path / "state").exists()
