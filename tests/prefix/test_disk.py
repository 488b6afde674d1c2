"""Entries on disk: there when they should be, never wrong, and gone in order."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from llamastate.errors import (
    ClosedError,
    InvalidArgumentError,
    SaveError,
    StoreFullError,
)
from llamastate.prefix import recency
from llamastate.prefix.disk import DiskTier
from llamastate.prefix.entry import Kind, build
from tests import children
from tests.prefix.disks import file_of, files, sound
from tests.prefix.entries import ROOT, SIZE, anchor, block, chain


def test_round_trip(tier: DiskTier):
    entries = [*chain(5), anchor(ROOT, 0, 3)]
    for entry in entries:
        assert tier.put(entry)
        assert not tier.put(entry)
    assert tier.known([e.key for e in entries] + [b"x" * 32]) == {e.key for e in entries}
    assert tier.tails(ROOT) == [3]
    for entry in entries:
        back = tier.get(entry.key)
        assert back is not None
        np.testing.assert_array_equal(back.image, entry.image)
        assert file_of(tier, entry).read_bytes() == entry.image.tobytes()
    assert tier.get(b"x" * 32) is None
    stats = tier.stats()
    assert (stats.blocks, stats.anchors, stats.entries) == (5, 1, 6)
    assert (stats.reads, stats.hits, stats.writes, stats.damaged, stats.rebuilt) == (7, 6, 6, 0, 0)
    assert stats.written_bytes == stats.read_bytes == stats.bytes == sum(e.nbytes for e in entries)
    sound(tier)


def test_read_into_memory_of_the_callers(tier: DiskTier):
    tier.put(block())
    memory = np.zeros(10_000, np.uint8)
    back = tier.get(block().key, allocate=lambda n: memory[:n])
    assert np.shares_memory(back.image, memory)
    np.testing.assert_array_equal(memory[: back.nbytes], block().image)


def test_sealed_before_it_is_written(tier: DiskTier):
    ids = np.arange(SIZE, dtype=np.int32)
    entry = build(Kind.BLOCK, key=b"k" * 32, parent=ROOT, root=ROOT, start=0, tokens=ids, rows=300)
    entry.rows[:] = 9
    assert tier.put(entry)
    assert tier.get(b"k" * 32).rows.tolist() == [9] * 300


def test_it_is_all_there_the_next_time(tmp_path: Path):
    entries = chain(4)
    with_old = DiskTier(tmp_path)
    for entry in entries:
        with_old.put(entry)
    with_old.add_root(ROOT, '{"a": 1}', SIZE, "dense")
    with_old.pin(b"name", 8, [entries[0].key])
    with_old.close()
    again = DiskTier(tmp_path)
    assert again.known([e.key for e in entries]) == {e.key for e in entries}
    (root,) = again.roots()
    assert (root.root, json.loads(root.fingerprint), root.block_tokens, root.kind) == (ROOT, {"a": 1}, SIZE, "dense")
    assert again.stats().pinned_bytes == entries[0].nbytes
    assert again.stats().rebuilt == 0
    again.close()
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")) == [
        "blocks",
        "index.sqlite",
        "roots",
        "store.json",
    ]


def test_entries_of_one_root(tier: DiskTier):
    other = b"else" * 8
    mine, yours = chain(3), chain(2, seed="other", root=other)
    for entry in mine + yours:
        tier.put(entry)
    assert [row.key for row in tier.entries(other)] == [e.key for e in yours]
    assert [(row.start, row.tail, row.root) for row in tier.entries(ROOT)] == [(i * SIZE, SIZE, ROOT) for i in range(3)]
    assert {root.root for root in tier.roots()} == {ROOT, other}


def test_drop(tier: DiskTier):
    entry = block()
    assert not tier.drop(entry.key)
    tier.put(entry)
    tier.pin(b"name", 8, [entry.key])
    assert tier.drop(entry.key)
    assert tier.get(entry.key) is None
    assert not files(tier)
    assert tier.stats().pinned_bytes == 0


# --- room -------------------------------------------------------------------------------------------------------------


def limited(path: Path, n: float, **more: float) -> DiskTier:
    return DiskTier(path, disk_bytes=int(n * block().nbytes), **more)


def test_what_was_not_used_for_longest_goes(tmp_path: Path):
    tier = limited(tmp_path, 10)
    entries = [block(seed=i) for i in range(12)]
    for entry in entries[:10]:
        tier.put(entry)
    tier.touch([entries[0].key, entries[2].key])
    tier.put(entries[10])
    assert entries[1].key not in tier.known([e.key for e in entries])
    tier.put(entries[11])
    left = tier.known([e.key for e in entries])
    assert {entries[0].key, entries[2].key, entries[10].key, entries[11].key} <= left
    assert tier.stats().bytes <= tier.disk_bytes
    assert tier.stats().evictions == 12 - len(left)
    sound(tier)
    tier.close()


def test_touches_are_written_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tier = limited(tmp_path, 10)
    tier.put(block())
    before = next(tier.entries()).used
    tier.touch([block().key])
    assert next(tier.entries()).used == before
    monkeypatch.setattr(recency, "TOUCH_SECONDS", 0.0)
    tier.touch([block().key])
    assert next(tier.entries()).used > before
    tier.close()


def test_a_chain_keeps_its_beginning(tmp_path: Path):
    """What does not fit is refused; what the new one stands on never goes for it."""
    tier = limited(tmp_path, 10)
    others = [block(seed=i) for i in range(10)]
    for entry in others:
        tier.put(entry)
    entries = chain(15, seed="long")
    for entry in entries[:10]:
        assert tier.put(entry)
    assert tier.known([e.key for e in entries]) == {e.key for e in entries[:10]}
    with pytest.raises(StoreFullError) as caught:
        tier.put(entries[10])
    assert caught.value.path == str(tmp_path)
    assert caught.value.needed == entries[10].nbytes
    assert caught.value.available < entries[10].nbytes
    # somebody else's are another matter: the later blocks go first
    tier.put(block(seed="new"))
    left = [e.key in tier.known([e.key for e in entries]) for e in entries[:10]]
    assert left == sorted(left, reverse=True)
    assert not all(left)
    sound(tier)
    tier.close()


def test_pins_are_honoured(tmp_path: Path):
    tier = limited(tmp_path, 4)
    entries = [block(seed=i) for i in range(6)]
    for entry in entries[:4]:
        tier.put(entry)
    assert tier.pin(b"three", 3, [e.key for e in entries[:3]]) == set()
    assert tier.pin(b"five", 5, [entries[3].key, b"nothing"]) == {b"nothing"}
    other = DiskTier(tmp_path)  # another process would see them too
    assert other.evict(10**9) == entries[3].nbytes
    other.close()
    tier.put(entries[4])
    tier.pin(b"one", 1, [entries[4].key])
    with pytest.raises(StoreFullError):
        tier.put(entries[5])
    assert tier.known([e.key for e in entries]) == {e.key for e in (*entries[:3], entries[4])}
    assert [tier.unpin(b"three") for _ in range(2)] == [3, 0]
    assert tier.unpin(b"five") == 0
    assert tier.put(entries[5])
    assert entries[0].key not in tier.known([entries[0].key])
    tier.close()


def test_too_big_for_any_room_evicts_nothing(tmp_path: Path):
    tier = limited(tmp_path, 4)
    entries = [block(seed=i) for i in range(4)]
    for entry in entries:
        tier.put(entry)
    with pytest.raises(StoreFullError):
        tier.put(block(seed="big", n_bytes=4000))
    assert tier.known([e.key for e in entries]) == {e.key for e in entries}
    tier.close()


def test_anchors_take_their_share(tmp_path: Path):
    tier = limited(tmp_path, 20, anchor_share=0.25)
    for i in range(60):
        tier.put(block(seed=i))
        tier.put(anchor(ROOT, 0, i))
    stats = tier.stats()
    assert stats.bytes <= tier.disk_bytes
    assert stats.anchor_bytes <= 0.25 * stats.bytes + 2 * anchor(ROOT, 0, 59).nbytes
    assert stats.blocks > stats.anchors
    sound(tier)
    tier.close()


def test_evict(tier: DiskTier):
    for i in range(300):
        tier.put(block(seed=i))
    size = block().nbytes
    assert tier.evict(0) == 0
    assert tier.evict(1) == size
    assert tier.evict(289 * size) == 289 * size  # more than goes in one transaction
    assert tier.evict(10**9) == 10 * size
    assert tier.evict(10**9) == 0
    assert not files(tier)
    with pytest.raises(InvalidArgumentError):
        tier.evict(-1)


def test_no_room_at_all(tmp_path: Path):
    tier = DiskTier(tmp_path, disk_bytes=0)
    with pytest.raises(StoreFullError):
        tier.put(block())
    assert tier.known([block().key]) == set()
    tier.close()


# --- a disk that does not take it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES])
def test_refused_by_the_disk(tier: DiskTier, code: int, monkeypatch: pytest.MonkeyPatch):
    tier.put(block(seed="before"))
    real = os.write

    def fail(fd: int, data: bytes) -> int:
        real(fd, data[: len(data) // 2])
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(StoreFullError, match=os.strerror(code)) as caught:
        tier.put(block())
    monkeypatch.undo()
    assert caught.value.needed == block().nbytes
    assert [p.stem for p in files(tier)] == [block(seed="before").key.hex()]  # and no litter
    sound(tier)
    assert tier.put(block())


def test_the_index_is_full(tier: DiskTier):
    """SQLite's own limit: what it says when the disk is full."""
    tier.put(block(seed="before"))
    writer = tier._index.database._writer()
    (pages,) = writer.execute("PRAGMA page_count").fetchone()
    writer.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(StoreFullError, match="full"):  # noqa: PT012
        for i in range(100):
            tier.put(block(seed=i))
    sound(tier)
    writer.execute("PRAGMA max_page_count=1000000")
    assert tier.put(block(seed=99))
    sound(tier)


LIMIT = """
import resource, sys
from llamastate.errors import StoreFullError
from llamastate.prefix import disk
from llamastate.prefix.disk import DiskTier
from tests.prefix.entries import block
tier = DiskTier(sys.argv[1])
tier.put(block(seed="before"))
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))     # no file may be longer, nor the index and its log
try:
    tier.put(block(seed="big", n_bytes=1_000_000))
    sys.exit("it should have been refused")
except StoreFullError as error:
    print(error.needed)
refused = 0
for i in range(5000):
    try:
        tier.put(block(seed=i, n_bytes=10))
    except StoreFullError:
        refused += 1
        if refused == 3:
            break
assert refused, "the index never met its limit"
assert tier.get(block(seed="before").key) is not None
assert tier.known([block(seed=0).key])
print("done")
"""


def test_files_that_may_not_grow(tmp_path: Path):
    """The kernel's own refusal, for blocks and for the index: nothing is left, and what was there can be read."""
    result = children.run(LIMIT, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(block(n_bytes=1_000_000).nbytes), "done"]
    again = DiskTier(tmp_path)
    assert again.get(block(seed="before").key) is not None
    sound(again)
    assert again.put(block(seed="after"))
    assert again.gc().temporary == 0
    again.close()


def test_a_folder_that_cannot_be_one(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SaveError, match="not a folder"):
            DiskTier(path)
    with pytest.raises(SaveError) as caught:
        DiskTier(tmp_path / "file")
    assert caught.value.path == str(tmp_path / "file")
    with pytest.raises(SaveError):
        DiskTier(tmp_path / "nul\0")
    for share in (0, -1, 1.5, float("nan"), "half"):
        with pytest.raises(InvalidArgumentError):
            DiskTier(tmp_path / "x", anchor_share=share)
    with pytest.raises(InvalidArgumentError):
        DiskTier(tmp_path / "x", disk_bytes=-1)


# --- two at once ------------------------------------------------------------------------------------------------------


def test_evicted_by_another_between_file_and_row(tier: DiskTier, monkeypatch: pytest.MonkeyPatch):
    """The other had an entry of that name, has removed the row, and now removes what is the new file."""
    real = tier._folder.write
    monkeypatch.setattr(tier._folder, "write", lambda e: (real(e), monkeypatch.undo(), file_of(tier, e).unlink()))
    assert tier.put(block())
    assert tier.get(block().key) is not None
    sound(tier)


def test_put_again_while_it_is_evicted(tier: DiskTier, monkeypatch: pytest.MonkeyPatch):
    tier.put(block())
    other = DiskTier(tier.path)
    real = tier._index.evict
    monkeypatch.setattr(tier._index, "evict", lambda *a, **k: (real(*a, **k), other.put(block()))[0])
    assert tier.evict(1) == block().nbytes
    assert tier.get(block().key) is not None  # the file belongs to the new row
    sound(tier)
    other.close()


def test_two_writers_keep_one(tier: DiskTier):
    others = [DiskTier(tier.path) for _ in range(4)]
    entries = chain(30)
    new: list[bool] = []
    threads = [
        threading.Thread(target=lambda t=t: new.extend([t.put(entry) for entry in entries])) for t in [tier, *others]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(new), sum(new)) == (150, 30)
    sound(tier)
    for other in others:
        other.close()


def test_its_folder_goes_while_it_is_written(tier: DiskTier, monkeypatch: pytest.MonkeyPatch):
    """As a gc() of another process does with an empty one."""
    real = os.mkdir
    gone: list[str] = []

    def mkdir(path: str, *args: object, **options: object) -> None:
        real(path, *args, **options)
        if not gone:
            gone.append(path)
            os.rmdir(path)

    monkeypatch.setattr(os, "mkdir", mkdir)
    assert tier.put(block())
    assert gone
    assert tier.get(block().key) is not None


FORK = """
import os, sys
from llamastate.prefix import disk
from llamastate.prefix.disk import DiskTier
from tests.prefix.entries import block
tier = DiskTier(sys.argv[1])
tier.put(block(seed=0))
tier.touch([block(seed=0).key])
with tier._lock, tier._recency._lock:                    # as another thread might, when the child is made
    child = os.fork()
    if child == 0:
        ok = tier.get(block(seed=0).key) is not None and tier.put(block(seed=1)) and tier.stats().entries == 2
        tier.flush()
        tier.close()
        os._exit(0 if ok else 1)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert tier.known([block(seed=1).key]) and tier.put(block(seed=2))
tier.close()
print("done")
"""


def test_fork(tmp_path: Path):
    result = children.run(FORK, tmp_path)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


@pytest.mark.parametrize("durable", [True, False])
def test_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool):
    """What is in an entry, and every name on the way to it, reach the disk before its row does; then so does that."""
    synced: set[str] = set()
    real = os.fsync

    def fsync(fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        real(fd)
        synced.add(path)

    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / "a" / "store"
    tier = DiskTier(path, durable=durable)
    entry = block()
    before: set[str] = set()
    add = tier._index.add
    monkeypatch.setattr(tier._index, "add", lambda *args: (before.update(synced), add(*args))[1])
    tier.put(entry)
    folders = {str(tmp_path), str(tmp_path / "a"), str(path), str(path / "blocks"), str(file_of(tier, entry).parent)}
    assert (folders <= before) is durable
    assert any(f".{entry.key.hex()}" in name for name in before) is durable
    # of the connection that writes: 2 waits for the disk at every transaction, 1 only now and then
    level = tier._index.database.write(lambda c: c.execute("PRAGMA synchronous").fetchone()[0])
    assert level == (2 if durable else 1)
    tier.close()


def test_the_clock_is_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What was used while it was wrong is not kept for ever, and new entries do not push out each other."""
    ahead = 10 * 365 * 86400 * 10**6
    right = recency.now
    monkeypatch.setattr(recency, "now", lambda: right() + ahead)
    tier = limited(tmp_path, 6)
    old = [block(seed=i) for i in range(6)]
    for entry in old:
        tier.put(entry)
    monkeypatch.setattr(recency, "now", right)
    for again in (False, True):
        if again:
            tier.close()
            tier = limited(tmp_path, 6)
        for turn in range(3):
            new = [block(seed=("new", again, turn, i)) for i in range(4)]
            for entry in new:
                tier.put(entry)
                tier.touch([new[0].key])
            assert tier.known([e.key for e in new]) == {e.key for e in new}
    assert not tier.known([e.key for e in old])
    tier.close()


def test_another_process_met_another_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tier, other = limited(tmp_path, 4), limited(tmp_path, 4)
    right = recency.now
    monkeypatch.setattr(recency, "now", lambda: right() + 10**12)
    for i in range(4):
        other.put(block(seed=i))
    monkeypatch.setattr(recency, "now", right)
    new = [block(seed=("new", i)) for i in range(3)]
    for entry in new:
        tier.put(entry)
    assert tier.known([e.key for e in new]) == {e.key for e in new}
    tier.close()
    other.close()


def test_files_from_the_future(tmp_path: Path):
    with contextlib.closing(DiskTier(tmp_path)) as tier:
        entries = [block(seed=i) for i in range(3)]
        for entry in entries:
            tier.put(entry)
            os.utime(file_of(tier, entry), (4e9, 4e9))
        tier.rebuild()
        assert all(row.used <= recency.now() for row in tier.entries())


def test_closed(tmp_path: Path):
    tier = DiskTier(tmp_path)
    tier.close()
    tier.close()
    for call in (lambda: tier.get(b"x" * 32), lambda: tier.put(block()), lambda: tier.known([]), tier.flush, tier.gc):
        with pytest.raises(ClosedError):
            call()
