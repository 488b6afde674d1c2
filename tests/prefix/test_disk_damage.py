"""Damaged files, what crashes leave, an index that is lost: dropped, mended, made anew; never believed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llamastate.errors import CorruptStateError, VersionMismatchError
from llamastate.prefix.disk import DiskTier
from llamastate.prefix.entry import Entry, Kind, build
from tests.prefix.disks import file_of, flip, sound
from tests.prefix.entries import ROOT, SIZE, anchor, block, chain

# --- damage -----------------------------------------------------------------------------------------------------------


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "short": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "long": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "empty": lambda p: p.write_bytes(b""),
    "header only": lambda p: p.write_bytes(p.read_bytes()[:256]),
    "foreign": lambda p: p.write_bytes(b"GGUF" * 500),
    "another": lambda p: p.write_bytes(block(seed="another").image.tobytes()),
    "huge": lambda p: os.truncate(p, 1 << 42),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_dropped(tier: DiskTier, damage: Callable[[Path], object]):
    entries = chain(3)
    for entry in entries:
        tier.put(entry)
    damage(file_of(tier, entries[1]))
    assert tier.get(entries[1].key) is None
    assert tier.stats().damaged == 1
    assert tier.known([e.key for e in entries]) == {entries[0].key, entries[2].key}
    assert not file_of(tier, entries[1]).exists()
    sound(tier)
    assert tier.put(entries[1])
    assert tier.get(entries[1].key) is not None


def test_flipped_bits_never_come_through(tier: DiskTier):
    chance = np.random.default_rng(2)
    entry = block(n_bytes=2000)
    for _ in range(200):
        assert tier.put(entry)
        path = file_of(tier, entry)
        data = bytearray(path.read_bytes())
        data[chance.integers(len(data))] ^= 1 << int(chance.integers(8))
        path.write_bytes(data)
        assert tier.get(entry.key) is None
    sound(tier)


def test_a_row_without_a_file(tier: DiskTier):
    tier.put(block())
    file_of(tier, block()).unlink()
    assert tier.known([block().key]) == {block().key}
    assert tier.get(block().key) is None
    assert tier.known([block().key]) == set()
    tier.put(block())
    file_of(tier, block()).unlink()
    assert not tier.put(block())  # its row is there: only the file is written again
    assert tier.get(block().key) is not None
    sound(tier)


def test_a_block_of_a_newer_version_is_left_alone(tier: DiskTier):
    import xxhash

    tier.put(block())
    path = file_of(tier, block())
    data = bytearray(path.read_bytes())
    data[8] = 2
    data[224:240] = xxhash.xxh3_128_digest(bytes(data[:224]))
    path.write_bytes(data)
    assert tier.get(block().key) is None
    assert tier.verify() == []
    tier.gc()
    tier.rebuild()
    tier.gc()
    assert path.read_bytes() == data


@pytest.mark.parametrize("drop", [True, False])
def test_verify(tier: DiskTier, drop: bool):
    entries = chain(6)
    for entry in entries:
        tier.put(entry)
    assert tier.verify() == []
    flip(file_of(tier, entries[2]))
    file_of(tier, entries[4]).unlink()
    found = {damaged.key: damaged for damaged in tier.verify(drop=drop)}
    assert set(found) == {entries[2].key, entries[4].key}
    assert found[entries[2].key].path == str(file_of(tier, entries[2]))
    assert "checksum" in found[entries[2].key].reason
    assert "No such file" in found[entries[4].key].reason
    assert tier.stats().entries == (4 if drop else 6)
    if drop:
        sound(tier)
        assert tier.verify() == []


def test_mended_meanwhile(tier: DiskTier, monkeypatch: pytest.MonkeyPatch):
    """A sound file that has taken the place of the damaged one is not dropped in its stead."""
    tier.put(block())
    flip(file_of(tier, block()))
    real = tier._folder.read

    def read(key: bytes, allocate: object) -> Entry:
        try:
            return real(key, allocate)
        finally:
            other.drop(key)
            other.put(block())

    other = DiskTier(tier.path)
    monkeypatch.setattr(tier._folder, "read", read)
    assert tier.get(block().key) is None
    monkeypatch.undo()
    assert tier.get(block().key) is not None
    other.close()


def test_a_newer_store_is_left_alone(tmp_path: Path):
    DiskTier(tmp_path).close()
    (tmp_path / "store.json").write_text('{"format": "llamastate prefix store", "version": 2, "more": []}')
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(VersionMismatchError) as caught:
        DiskTier(tmp_path)
    assert (caught.value.expected, caught.value.found) == (1, 2)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": "1"}', "nonsense"])
def test_a_store_that_does_not_say_what_it_is(tmp_path: Path, text: str):
    DiskTier(tmp_path).close()
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(CorruptStateError):
        DiskTier(tmp_path)


# --- what crashes leave -----------------------------------------------------------------------------------------------


def dead_pid() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_gc(tier: DiskTier):
    entries = chain(8)
    for entry in entries:
        tier.put(entry)
    size = entries[0].nbytes
    nothing = tier.gc()
    assert (nothing.adopted, nothing.lost, nothing.damaged, nothing.temporary) == (0, 0, 0, 0)
    # a writer died before the row, one damaged that; one died in the middle of a file; one is still at it
    tier._index.remove([entries[1].key, entries[2].key])
    flip(file_of(tier, entries[2]))
    file_of(tier, entries[3]).unlink()
    litter = file_of(tier, entries[4]).with_name(f".{'a' * 64}.llblk.{dead_pid()}-0123abcd.tmp")
    alive = litter.with_name(f".{'b' * 64}.llblk.{os.getppid()}-0123abcd.tmp")
    root = Path(tier.path, f".store.json.{dead_pid()}-0123abcd.tmp")
    for path in (litter, alive, root):
        path.write_bytes(bytes(100))
    empty = Path(
        tier.path, "blocks", next(f"{i:02x}" for i in range(256) if not Path(tier.path, "blocks", f"{i:02x}").exists())
    )
    empty.mkdir()
    result = tier.gc()
    assert (result.adopted, result.lost, result.damaged, result.temporary) == (1, 1, 1, 2)
    assert result.folders >= 1
    assert result.nbytes == size + 200
    assert alive.exists()
    assert not any(path.exists() for path in (litter, root, empty))
    alive.unlink()
    assert tier.known([e.key for e in entries]) == {e.key for i, e in enumerate(entries) if i not in (2, 3)}
    sound(tier)
    again = tier.gc()
    assert (again.adopted, again.lost, again.damaged, again.temporary, again.nbytes) == (0, 0, 0, 0, 0)


def test_gc_corrects_a_length(tier: DiskTier):
    """Two writers of one key with different bytes (one knew the logits): the file of one, the row of the other."""
    entry = block()
    tier.put(entry)
    other = build(
        Kind.BLOCK, key=entry.key, parent=ROOT, root=ROOT, start=0, tokens=entry.tokens, rows=np.zeros(900, np.uint8)
    )
    from llamastate.prefix.entry import seal

    seal(other)
    file_of(tier, entry).write_bytes(other.image.tobytes())
    assert tier.get(entry.key).nbytes == other.nbytes
    assert tier.gc().adopted == 1
    sound(tier)


@pytest.mark.parametrize("how", ["lost", "damaged", "asked for"])
def test_the_index_is_made_anew(tmp_path: Path, how: str):
    tier = DiskTier(tmp_path)
    entries = [*chain(20), anchor(ROOT, 0, 4)]
    for entry in entries:
        tier.put(entry)
    tier.add_root(ROOT, "{}", SIZE, "iswa")
    tier.pin(b"name", 8, [entries[0].key])
    before = {row.key: row for row in tier.entries()}
    flip_header = file_of(tier, entries[7])
    data = bytearray(flip_header.read_bytes())
    data[40] ^= 1
    if how == "asked for":
        tier.rebuild()
    else:
        tier.close()
        flip_header.write_bytes(data)
        if how == "lost":
            (tmp_path / "index.sqlite").unlink()
        else:
            (tmp_path / "index.sqlite").write_bytes(os.urandom(10000))
        tier = DiskTier(tmp_path)
        del before[entries[7].key]
    assert tier.stats().rebuilt == 1
    after = {row.key: row for row in tier.entries()}
    assert set(after) == set(before)
    for key, row in after.items():
        old = before[key]
        assert (row.parent, row.root, row.kind, row.start, row.tail, row.nbytes) == (
            old.parent,
            old.root,
            old.kind,
            old.start,
            old.tail,
            old.nbytes,
        )
        assert abs(row.used - old.used) < 5_000_000  # by the times of the files
    assert [(r.root, r.kind) for r in tier.roots()] == [(ROOT, "iswa")]
    assert tier.tails(ROOT) == [4]
    assert tier.stats().pinned_bytes == (entries[0].nbytes if how == "asked for" else 0)
    tier.gc()
    sound(tier)
    assert tier.verify() == []
    tier.close()


def test_others_wait_while_it_is_made_anew(tmp_path: Path):
    tier = DiskTier(tmp_path)
    for entry in chain(50):
        tier.put(entry)
    tier.close()
    (tmp_path / "index.sqlite").unlink()
    counts: list[tuple[int, int]] = []

    def opening() -> None:
        one = DiskTier(tmp_path)
        counts.append((one.stats().blocks, one.stats().rebuilt))
        one.close()

    threads = [threading.Thread(target=opening) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [blocks for blocks, _ in counts] == [50] * 6
    assert sum(rebuilt for _, rebuilt in counts) == 1
