"""Snapshots on disk: frozen bytes, atomic saves, files that change while they are open."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llamastate import Context, SaveError, Snapshot
from tests import children
from tests.helpers import tokens
from tests.snapshot import image

GOLDEN = Path(__file__).parent / "golden"
IDS = tokens(90, seed=9)


@pytest.mark.parametrize(("name", "items"), [("minimal-v1", image.minimal()), ("full-v1", image.full())])
def test_golden(name: str, items):
    """Frozen: other bytes need another version. ``python -m tests.snapshot.test_files`` writes new ones."""
    expected = GOLDEN.joinpath(f"{name}.llsnap").read_bytes()
    assert bytes(image.build(items)) == expected
    snapshot = Snapshot.open(GOLDEN / f"{name}.llsnap")
    assert snapshot.fingerprint == image.FINGERPRINT
    np.testing.assert_array_equal(snapshot.tokens, image.TOKENS)
    np.testing.assert_array_equal(snapshot.state, image.STATE)


def test_what_is_saved_is_what_is_in_memory(filled: Context, tmp_path: Path):
    """Of a snapshot that was taken, of one that was opened, and saved over itself."""
    path = tmp_path / "s.llsnap"
    snapshot = Snapshot.take(filled, 0, IDS, metadata={"a": 1})
    assert snapshot.save(path) == snapshot.nbytes
    data = path.read_bytes()
    assert data == bytes(memoryview(snapshot))
    opened = Snapshot.open(path)
    opened.save(tmp_path / "copy")
    opened.save(path)
    assert (tmp_path / "copy").read_bytes() == path.read_bytes() == data
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "s.llsnap"]


def test_sealed_while_being_written(filled: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a large snapshot the checksums are computed beside the write; also in an interpreter that ends."""
    monkeypatch.setattr("llamastate.snapimage.OVERLAP", 1000)
    Snapshot.take(filled, 0, IDS, metadata={"a": 1}).save(tmp_path / "beside")
    code = """
import atexit, sys
from llamastate import Snapshot, snapshot
from tests.helpers import context, tokens
snapshot._OVERLAP = 1000
ctx = context("dense", n_seq_max=2)
ctx.prefill(tokens(90, seed=9))
taken = Snapshot.take(ctx, 0, tokens(90, seed=9), metadata={"a": 1})
atexit.register(lambda: taken.save(sys.argv[1]))
"""
    assert children.run(code, tmp_path / "at-the-end").returncode == 0
    expected = bytes(memoryview(Snapshot.take(filled, 0, IDS, metadata={"a": 1})))
    for name in ("beside", "at-the-end"):
        assert Snapshot.open(tmp_path / name).restore(filled, 1) == 90
    assert (tmp_path / "beside").read_bytes() == expected
    with file_size_limit(3000), pytest.raises(SaveError):
        Snapshot.take(filled, 0, IDS).save(tmp_path / "beside")
    assert (tmp_path / "beside").read_bytes() == expected
    assert sorted(os.listdir(tmp_path)) == ["at-the-end", "beside"]


def test_taking_the_same_gives_the_same_bytes(filled: Context):
    assert bytes(memoryview(Snapshot.take(filled, 0, IDS))) == bytes(memoryview(Snapshot.take(filled, 0, IDS)))
    dirty = np.full(1 << 20, 0xEE, np.uint8)  # gaps are written too
    snapshot = Snapshot.take(filled, 0, IDS, out=dirty, metadata={"x": "y"})
    assert bytes(memoryview(snapshot)) == bytes(memoryview(Snapshot.take(filled, 0, IDS, metadata={"x": "y"})))


def test_replaced_while_open(filled: Context, tmp_path: Path):
    path = tmp_path / "s"
    Snapshot.take(filled, 0, IDS).save(path)
    opened = Snapshot.open(path)
    filled.prefill(tokens(20, seed=2), seq_id=1)
    Snapshot.take(filled, 1, tokens(20, seed=2)).save(path)
    assert opened.restore(filled, 1) == 90
    assert Snapshot.open(path).restore(filled, 1) == 20
    path.unlink()
    assert opened.restore(filled, 1) == 90


# --- failing --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """No file of this process may grow further: what a full disk feels like."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("limit", [0, 64, 4096, 50000])
def test_a_full_disk(filled: Context, tmp_path: Path, limit: int):
    path = tmp_path / "s"
    filled.prefill(tokens(5), seq_id=1)
    Snapshot.take(filled, 1, tokens(5)).save(path)
    before = path.read_bytes()
    snapshot = Snapshot.take(filled, 0, IDS)
    with file_size_limit(limit), pytest.raises(SaveError) as caught:
        snapshot.save(path)
    assert caught.value.path == str(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["s"]
    snapshot.save(path)
    assert Snapshot.open(path).n_tokens == 90


@pytest.mark.parametrize("path", ["missing/s", "", "a\0b", 5])
def test_where_nothing_can_be_written(filled: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SaveError):
        Snapshot.take(filled, 0, IDS).save(path)
    assert os.listdir(tmp_path) == []


#: Saves snapshots of two texts by turns, until somebody ends it.
SAVER = """
import itertools
from llamastate import Snapshot
from tests.helpers import context, tokens
ctx = context("dense")
snapshots = []
for n in (300, 200):
    ctx.clear()
    ctx.prefill(tokens(n, seed=n))
    snapshots.append(Snapshot.take(ctx, 0, tokens(n, seed=n), logits="last"))

def work(path, ready):
    snapshots[0].save(path)
    ready()
    for snapshot in itertools.cycle(snapshots):
        snapshot.save(path)
"""


def test_killed_while_saving(tmp_path: Path):
    """A hundred times, at any moment after the first save: always one of the two, whole."""
    path = tmp_path / "s"
    chance = random.Random(0)
    with children.Victims(SAVER) as victims:
        for _ in range(100):
            victims.kill(path, chance.uniform(0, 0.01))
            snapshot = Snapshot.open(path)
            assert snapshot.tokens.tolist() == tokens(snapshot.n_tokens, seed=snapshot.n_tokens).tolist()
            assert snapshot.n_tokens in (200, 300)
            assert snapshot.state.any()
            assert snapshot.logits is not None
    assert all(left.name.startswith(".s.") for left in tmp_path.iterdir() if left != path)


if __name__ == "__main__":
    for file, sections in (("minimal-v1", image.minimal()), ("full-v1", image.full())):
        GOLDEN.joinpath(f"{file}.llsnap").write_bytes(image.build(sections))
