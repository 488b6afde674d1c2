"""Entries on file systems of fsspec: a folder, memory, and some that fail."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from llamastate.errors import ClosedError, InvalidArgumentError
from llamastate.prefix import remote
from llamastate.prefix.remote import RemoteTier
from tests import children
from tests.prefix.entries import ROOT, anchor, block, chain


@pytest.fixture(params=["local", "memory", "threads"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RemoteTier]:
    """Over a folder, over memory, and over a folder with questions side by side."""
    if request.param == "memory":
        MemoryFileSystem.store.clear()
        made = RemoteTier("memory://bucket", "blocks/here")
    else:
        made = RemoteTier(tmp_path / "remote", parallel=8 if request.param == "threads" else None)
    yield made
    made.close()
    MemoryFileSystem.store.clear()


def again(tier: RemoteTier) -> RemoteTier:
    """As another process sees the same place."""
    return RemoteTier(tier._fs, tier.path, parallel=tier._parallel)


def object_of(tier: RemoteTier, key: bytes) -> str:
    return f"{tier.path}/blocks/{key.hex()[:2]}/{key.hex()}.llblk"


def test_round_trip(tier: RemoteTier):
    entries = chain(20)
    keys = [e.key for e in entries]
    assert tier.known(keys) == set()
    for entry in entries[:15]:
        assert tier.put(entry)
        assert not tier.put(entry)
    other = again(tier)
    assert other.known(keys) == set(keys[:15])
    assert not other.put(entries[0])
    for entry in entries[:15]:
        back = other.get(entry.key)
        np.testing.assert_array_equal(back.image, entry.image)
        assert (back.key, back.parent) == (entry.key, entry.parent)
    assert other.get(keys[15]) is None
    stats = other.stats()
    assert (stats.reads, stats.hits, stats.writes, stats.damaged, stats.failures) == (16, 15, 0, 0, 0)
    assert tier.stats().writes == 15
    assert not [name for name in tier._fs.find(tier.path) if name.endswith(".tmp")]
    other.close()


def test_the_same_bytes_as_on_disk(tier: RemoteTier):
    tier.put(block())
    assert tier._fs.cat_file(object_of(tier, block().key)) == block().image.tobytes()


def test_tails(tier: RemoteTier):
    parent = block().key
    assert tier.tails(parent) == []
    for tail in (3, 0, 61, 7):
        tier.put(anchor(parent, 1, tail))
    tier.put(anchor(parent, 1, 7, seed="another"))
    tier.put(block(parent, 1))
    tier._fs.pipe_file(f"{tier.path}/tails/{parent.hex()}/README", b"")
    assert again(tier).tails(parent) == [61, 7, 3, 0]
    tier.put(anchor(parent, 1, 9))
    assert tier.tails(parent) == [61, 9, 7, 3, 0]  # its own are known at once
    assert tier.tails(b"x" * 32) == []


def test_damaged_objects(tier: RemoteTier):
    entry = block(n_bytes=3000)
    image = entry.image.tobytes()
    flipped = bytearray(image)
    flipped[2000] ^= 1
    for data in (bytes(flipped), image[:-1], b"x", block(seed="another").image.tobytes()):
        tier.put(entry)
        tier._fs.pipe_file(object_of(tier, entry.key), data)
        assert tier.get(entry.key) is None
        assert tier.known([entry.key]) == set()
        assert not tier._fs.exists(object_of(tier, entry.key))
    assert tier.stats().damaged == 4
    assert tier.put(entry)
    assert tier.get(entry.key) is not None


def test_an_empty_object_is_none(tier: RemoteTier):
    tier.put(block())
    tier._fs.pipe_file(object_of(tier, block().key), b"")
    assert tier.get(block().key) is None


def test_what_is_gone_is_a_miss(tier: RemoteTier):
    tier.put(block())
    tier._fs.rm_file(object_of(tier, block().key))
    assert tier.known([block().key]) == {block().key}  # believed, until somebody wants it
    assert tier.get(block().key) is None
    assert tier.known([block().key]) == set()
    assert tier.put(block())
    assert tier.get(block().key) is not None


def test_no_question_is_asked_twice(tier: RemoteTier, monkeypatch: pytest.MonkeyPatch):
    entries = chain(40)
    keys = [e.key for e in entries]
    for entry in entries[:30]:
        tier.put(entry)
    other = again(tier)
    asked: list[str] = []
    real = other._fs.info
    monkeypatch.setattr(other._fs, "info", lambda path, **more: (asked.append(path), real(path, **more))[1])
    for _ in range(3):
        assert other.known(keys) == set(keys[:30])
    assert len(asked) == len(set(asked)) == 40
    monkeypatch.setattr(remote, "ABSENT_SECONDS", 0.0)
    tier.put(entries[30])
    asked.clear()
    assert other.known(keys) == set(keys[:31])
    assert len(asked) == 10
    other.close()


def test_memory_is_bounded(tier: RemoteTier, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "REMEMBERED", 10)
    keys = [e.key for e in chain(30)]
    for entry in chain(30):
        tier.put(entry)
        tier.tails(entry.key)
    tier.known([bytes([i]) * 32 for i in range(30)])
    assert len(tier._present) <= 10
    assert len(tier._absent) <= 11
    assert len(tier._lengths) <= 10
    assert tier.known(keys) == set(keys)


# --- latency ----------------------------------------------------------------------------------------------------------


class Slow(LocalFileSystem):
    """Each question takes a while; how many are under way at a time at most."""

    protocol = "slow"
    cachable = False

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.lock, self.now, self.most = threading.Lock(), 0, 0

    def info(self, path: str, **more: Any) -> Any:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.02)
        with self.lock:
            self.now -= 1
        return super().info(path, **more)


def test_the_keys_of_a_prefix_are_asked_for_side_by_side(tmp_path: Path):
    entries = chain(64)
    filled = RemoteTier(tmp_path)
    for entry in entries[:50]:
        filled.put(entry)
    slow = Slow()
    tier = RemoteTier(slow, str(tmp_path), parallel=32)
    assert tier.known([e.key for e in entries]) == {e.key for e in entries[:50]}
    assert 2 <= slow.most <= 32
    tier.close()


def test_an_asynchronous_file_system(tmp_path: Path):
    """As those of object stores are: questions side by side, writes straight to their names."""
    fs = AsyncFileSystemWrapper(LocalFileSystem(auto_mkdir=True), asynchronous=False)
    tier = RemoteTier(fs, str(tmp_path))
    assert tier._parallel == 32
    entries = chain(10)
    for entry in entries:
        assert tier.put(entry)
    tier.put(anchor(ROOT, 0, 3))
    other = RemoteTier(fs, str(tmp_path))
    assert other.known([e.key for e in entries] + [b"x" * 32]) == {e.key for e in entries}
    assert other.get(entries[3].key) is not None
    assert other.tails(ROOT) == [3]
    tier.close()
    other.close()


# --- failures ---------------------------------------------------------------------------------------------------------


class Broken(LocalFileSystem):
    """Fails when it is told to, with what network libraries raise."""

    protocol = "broken"
    cachable = False
    error: Exception | None = None

    def _check(self) -> None:
        if self.error is not None:
            self.calls += 1
            raise self.error

    calls = 0

    def info(self, path: str, **more: Any) -> Any:
        self._check()
        return super().info(path, **more)

    def ls(self, path: str, **more: Any) -> Any:
        self._check()
        return super().ls(path, **more)

    def cat_file(self, path: str, **more: Any) -> Any:
        self._check()
        return super().cat_file(path, **more)

    def pipe_file(self, path: str, value: bytes, **more: Any) -> Any:
        self._check()
        return super().pipe_file(path, value, **more)


@pytest.mark.parametrize(
    "error", [TimeoutError("slow"), ConnectionResetError("gone"), RuntimeError("SDK"), OSError(5, "x")]
)
def test_failures_are_misses(tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch):
    clock = [1000.0]
    monkeypatch.setattr(remote.time, "monotonic", lambda: clock[0])
    fs = Broken()
    tier = RemoteTier(fs, str(tmp_path))
    entries = chain(3)
    tier.put(entries[0])
    tier.put(entries[1])
    fs.error = error
    with pytest.warns(RuntimeWarning, match="cannot be reached") as caught:
        assert tier.known([entries[2].key]) == set()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        calls = fs.calls
        assert tier.get(entries[0].key) is None
        assert tier.tails(ROOT) == []
        assert not tier.put(entries[2])
        assert fs.calls == calls  # nobody waits for it again so soon
        pauses = []
        for _ in range(9):
            before = clock[0]
            while fs.calls == calls:
                clock[0] += 0.25
                assert tier.get(entries[0].key) is None
            calls = fs.calls
            pauses.append(clock[0] - before)
        assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
        fs.error = None
        clock[0] += 60
        assert tier.get(entries[0].key) is not None
        assert tier.put(entries[2])
        fs.error = error
        assert tier.get(entries[1].key) is None
        clock[0] += 1.1  # after a success the pauses begin anew
        fs.error = None
        assert tier.get(entries[1].key) is not None
    assert tier.stats().failures == 11


def test_a_write_that_breaks_off_leaves_nothing(tmp_path: Path):
    fs = Broken()
    tier = RemoteTier(fs, str(tmp_path))
    real = fs.pipe_file

    def half(path: str, value: bytes, **more: Any) -> None:
        real(path, value[:100])
        raise ConnectionResetError("gone")

    fs.pipe_file = half  # type: ignore[method-assign]
    with pytest.warns(RuntimeWarning, match="gone"):
        assert not tier.put(block())
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_place_that_is_not_there_is_told(tmp_path: Path):
    """A bucket that does not exist: every write says so as it would of a file."""
    fs = Broken()
    tier = RemoteTier(fs, str(tmp_path))
    assert tier.known([block().key]) == set()  # no news
    fs.makedirs = lambda path, exist_ok: None  # type: ignore[method-assign]
    with pytest.warns(RuntimeWarning, match="FileNotFoundError"):
        assert not tier.put(block())


def test_without_fsspec(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ImportError, match=r"pip install 'llamastate\[remote\]'"):
        RemoteTier("memory://x")


def test_arguments(tmp_path: Path):
    with pytest.raises(InvalidArgumentError):
        RemoteTier(fsspec.filesystem("memory"))
    with pytest.raises(InvalidArgumentError):
        RemoteTier("nosuchprotocol://x")
    tier = RemoteTier(f"file://{tmp_path}")
    tier.close()
    tier.close()
    with pytest.raises(ClosedError):
        tier.known([b"x" * 32])


FORK = """
import os, sys
from llamastate.prefix.remote import RemoteTier
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.local import LocalFileSystem
from tests.prefix.entries import chain
fs = AsyncFileSystemWrapper(LocalFileSystem(auto_mkdir=True), asynchronous=False)
tier = RemoteTier(fs, sys.argv[1])
entries = chain(8)
for entry in entries[:4]:
    tier.put(entry)
assert len(tier.known([e.key for e in entries])) == 4
child = os.fork()
if child == 0:
    ok = len(tier.known([e.key for e in entries])) == 4 and tier.put(entries[5])
    ok = ok and tier.get(entries[0].key) is not None and tier.stats().failures == 0
    os._exit(0 if ok else 1)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert tier.get(entries[5].key) is not None
tier.close()
print("done")
"""


def test_fork(tmp_path: Path):
    result = children.run(FORK, tmp_path)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


def test_nothing_is_imported_before_it_is_needed():
    result = children.run("import sys, llamastate.prefix; print('fsspec' in sys.modules)")
    assert result.stdout == "False\n", result.stderr


def test_by_its_name():
    import llamastate.prefix

    assert llamastate.prefix.RemoteTier is RemoteTier
    with pytest.raises(AttributeError, match="Nothing"):
        _ = llamastate.prefix.Nothing
