"""Databases that somebody or something has changed: verify tells where, errors are typed, the rest can be saved."""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from llamastate.errors import (
    BadMagicError,
    CorruptStateError,
    FileAccessError,
    LlamaStateError,
    LogTamperedError,
    SaveError,
    SessionExistsError,
    StateFileNotFoundError,
    StoreFullError,
    StoreLockedError,
    VersionMismatchError,
)
from llamastate.log import (
    MemoryLogStore,
    SessionLog,
    SQLiteLogStore,
    StoredEntry,
    UserInput,
    assistant,
    chain,
    export_lines,
    import_jsonl,
    rescue,
    salvage,
    user,
)
from llamastate.log.jsonl import parse_lines
from llamastate.log.sqlite import ROOM


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Three sessions, the last a fork."""
    path = tmp_path / "log.db"
    with SQLiteLogStore(path) as store:
        for name in ("a", "b"):
            log = SessionLog.create(store, session_id=name, system_prompt=name)
            for turn in range(3):
                log.save_delta([user(f"turn {turn}"), assistant("ok")])
                log.save_turn_end(turn + 1)
        log.fork(session_id="c")
    return path


def place(name: int, index: int) -> int:
    return name * ROOM + index


@pytest.mark.parametrize(
    ("statement", "index"),
    [
        (f"UPDATE entries SET data = replace(data, 'turn 1', 'turn 9') WHERE place = {place(1, 4)}", 4),
        (f"UPDATE entries SET data = CAST(data AS TEXT) WHERE place = {place(1, 4)}", 4),
        (f"UPDATE entries SET data = 5 WHERE place = {place(1, 0)}", 0),
        (f"UPDATE entries SET hash = zeroblob(32) WHERE place = {place(1, 3)}", 3),
        (f"UPDATE entries SET hash = zeroblob(31) WHERE place = {place(1, 9)}", 9),
        (f"UPDATE entries SET hash = 'text' WHERE place = {place(1, 2)}", 2),
        (f"DELETE FROM entries WHERE place = {place(1, 5)}", 5),
        (f"DELETE FROM entries WHERE place >= {place(1, 5)} AND place < {place(2, 0)}", 5),
        (f"DELETE FROM entries WHERE place < {place(2, 0)}", 0),
        (f"UPDATE entries SET place = place + 100 WHERE place = {place(1, 5)}", 5),
        (f"UPDATE entries SET place = place + 100 WHERE place = {place(1, 9)}", 9),
        (f"UPDATE entries SET place = place + {10 * ROOM} WHERE place = {place(1, 5)}", 5),
        (
            f"UPDATE entries SET data = (SELECT data FROM entries WHERE place = {place(1, 1)}) "
            f"WHERE place = {place(1, 4)}", 4,
        ),
        (f"INSERT INTO entries SELECT place + 1, hash, data FROM entries WHERE place = {place(1, 9)}", 10),
        (f"INSERT INTO entries SELECT place + 9999, hash, data FROM entries WHERE place = {place(1, 9)}", 10),
        ("UPDATE sessions SET n_entries = 9 WHERE id = 'a'", 9),
        ("UPDATE sessions SET n_entries = 11 WHERE id = 'a'", 10),
        ("UPDATE sessions SET head = zeroblob(32) WHERE id = 'a'", 9),
    ],
)  # fmt: skip
def test_verify_names_the_first_entry_that_does_not_hold(statement: str, index: int, path: Path) -> None:
    with sqlite3.connect(path) as raw:
        assert raw.execute(statement).rowcount
    raw.close()
    with SQLiteLogStore(path) as store:
        log = SessionLog.open(store, "a")
        with pytest.raises(LogTamperedError) as caught:
            log.verify()
        assert caught.value.index == index
        if "INSERT" not in statement:
            with pytest.raises(LogTamperedError):
                log.restore()
        for name in ("b", "c"):
            other = SessionLog.open(store, name)
            assert other.verify() == other.n_entries, "damage to one is damage to another"
        if not index:
            return
        # what is before can be taken over
        copy = MemoryLogStore()
        import_jsonl(copy, salvage(path), partial=True)
        assert copy.head("a").n_entries >= min(index, 10)
        assert SessionLog.open(copy, "b").verify() == 10


def test_a_number_that_is_none(path: Path) -> None:
    with sqlite3.connect(path) as raw:
        raw.execute("UPDATE sessions SET n_entries = 'many' WHERE id = 'a'")
    raw.close()
    with SQLiteLogStore(path) as store, pytest.raises(CorruptStateError):
        SessionLog.open(store, "a")


def test_a_chain_written_anew_is_found_by_a_head_that_was_noted(path: Path) -> None:
    with SQLiteLogStore(path) as store:
        log = SessionLog.open(store, "a")
        noted = log.head_hash
        log.save_turn_end(9)
        assert log.verify(head_hash=noted) == 11
        data = [stored.data for stored in log.entries()]
    data[1] = chain([UserInput(user("something else"), ts=1)])[0].data
    forged = chain(data)
    with sqlite3.connect(path) as raw:
        for stored in forged:
            raw.execute(
                "UPDATE entries SET hash = ?, data = ? WHERE place = ?",
                (bytes.fromhex(stored.hash), stored.data, place(1, stored.index)),
            )
        raw.execute("UPDATE sessions SET head = ? WHERE id = 'a'", (bytes.fromhex(forged[-1].hash),))
    raw.close()
    with SQLiteLogStore(path) as store:
        log = SessionLog.open(store, "a")
        assert log.verify() == 11
        with pytest.raises(LogTamperedError):
            log.verify(head_hash=noted)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 500 pages of the database, sessions small and large."""
    path = tmp_path_factory.mktemp("large") / "log.db"
    with SQLiteLogStore(path) as store:
        for i in range(120):
            log = SessionLog.create(store, session_id=f"s{i}", system_prompt="x" * 50)
            with log.transaction():
                for turn in range(200 if i % 20 == 3 else 5):
                    log.save_delta([user(f"turn {turn} " + "y" * 200), assistant("z" * 300)])
                    log.save_turn_end(turn)
            if i % 10 == 0:
                log.fork()
    return path


def use(path: Path) -> None:
    """Everything that reads or writes."""
    with SQLiteLogStore(path) as store:
        for info in store.sessions():
            log = SessionLog.open(store, info.id)
            log.verify()
            log.restore()
        SessionLog.create(store).save_turn_end(1)


def check_salvage(path: Path, original: set[bytes]) -> int:
    """What holds of the salvaged lines is the truth; how many lines of the original are among all."""
    lines = list(salvage(path))
    store = MemoryLogStore()
    import_jsonl(store, lines, partial=True)
    for line in export_lines(store):
        assert line in original or b'"salvaged-' in line or b'"session_start"' not in line
    # of a line after a gap only its prev_hash is not there
    hashes = {stored.hash for _, stored in parse_lines(original)}
    return sum(stored.hash in hashes for _, stored in parse_lines(lines))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.3, 0.5, 0.9, 0.999])
def test_cut_short(share: float, large: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.db"
    data = large.read_bytes()
    with SQLiteLogStore(large) as store:
        original = set(export_lines(store))
    path.write_bytes(data[: int(len(data) * share)])
    if not share:  # nothing is left to tell that anything was there
        use(path)
        return
    with pytest.raises(LlamaStateError):
        use(path)
    shutil.copyfile(large, path)
    path.write_bytes(data[: int(len(data) * share)])
    try:
        n = check_salvage(path, original)
    except (BadMagicError, CorruptStateError, FileAccessError):
        assert share < 0.03, "only a file without its first pages gives nothing"
    else:
        assert n > 0.8 * share * len(original) - 50, (n, len(original))


def test_flipped_bits(large: Path, tmp_path: Path) -> None:
    """Anywhere in the file: a typed error, or nothing of the log was hit."""
    chance = random.Random(7)
    data = large.read_bytes()
    with SQLiteLogStore(large) as store:
        lines = list(export_lines(store))
    original = set(lines)
    found = 0
    for run in range(24):
        path = tmp_path / f"{run}.db"
        changed = bytearray(data)
        for _ in range(chance.choice([1, 3, 40])):
            at = chance.randrange(0 if run % 4 else 4096, len(changed) if run % 4 else 2 * 4096)
            changed[at] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        try:
            with SQLiteLogStore(path, read_only=True) as store:
                for info in store.sessions():
                    SessionLog.open(store, info.id).verify()
                same = list(export_lines(store)) == lines
            assert same, "changed, and verify did not see it"
        except LlamaStateError:
            found += 1
        try:
            check_salvage(path, original)
        except (BadMagicError, CorruptStateError, FileAccessError, VersionMismatchError):
            continue  # the first pages were hit
    assert found > 12


def test_pages_overwritten(large: Path, tmp_path: Path) -> None:
    """Three lost pages cost what was in them."""
    path = tmp_path / "log.db"
    data = bytearray(large.read_bytes())
    with SQLiteLogStore(large) as store:
        original = set(export_lines(store))
    for page in (100, 102, 250):
        data[page * 4096 : (page + 1) * 4096] = b"\xff" * 4096
    path.write_bytes(data)
    assert check_salvage(path, original) > 0.97 * len(original)


def test_a_file_made_to_hurt(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of rows that each claim to go on through the same pages, in circles: those are read a few times."""
    path = tmp_path / "log.db"
    data = bytearray(large.read_bytes())
    n, half, cells = len(data) // 4096, len(data) // 8192, 300
    length = 489 + 4092 * (n - 1)  # of which 489 bytes lie in the page itself
    cell = bytes([0x80 | length >> 14 & 0x7F, 0x80 | length >> 7 & 0x7F, length & 0x7F, 1]) + b"\x04" * 489
    for page in range(3, n):
        at = (page - 1) * 4096
        if page < half:
            data[at : at + 8] = bytes([13, 0, 0]) + cells.to_bytes(2, "big") + bytes(3)
            data[at + 8 : at + 8 + 2 * cells] = (1000).to_bytes(2, "big") * cells
            data[at + 1000 : at + 1000 + len(cell) + 4] = cell + half.to_bytes(4, "big")
        else:
            data[at : at + 4] = (page + 1 if page + 1 < n else half).to_bytes(4, "big")
    path.write_bytes(data)
    reads = 0
    read = rescue._Pages.page

    def count(self: rescue._Pages, number: int) -> bytes:
        nonlocal reads
        reads += 1
        return read(self, number)

    monkeypatch.setattr(rescue._Pages, "page", count)
    with contextlib.suppress(LlamaStateError):
        for _ in salvage(path):
            pass
    assert half * cells < reads < half * cells + 20 * n


def test_a_newer_version_is_left_as_it_is(path: Path) -> None:
    with sqlite3.connect(path) as raw:
        raw.execute("PRAGMA user_version = 2")
    raw.close()
    before = path.read_bytes()
    for options in ({}, {"read_only": True}):
        with pytest.raises(VersionMismatchError) as caught:
            SQLiteLogStore(path, **options)
        assert (caught.value.expected, caught.value.found) == (1, 2)
    with pytest.raises(VersionMismatchError):
        list(salvage(path))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def other_program(path: Path) -> None:
    with sqlite3.connect(path) as raw:
        raw.execute("CREATE TABLE x (y)")
    raw.close()


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda path: path.write_bytes(b"hello " * 100), BadMagicError),
        (lambda path: path.write_bytes(b"short"), BadMagicError),
        (other_program, BadMagicError),
        (lambda path: path.mkdir(), FileAccessError),
    ],
)
def test_files_of_others(make: Callable[[Path], object], error: type[LlamaStateError], tmp_path: Path) -> None:
    path = tmp_path / "x"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    for options in ({}, {"read_only": True}, {"create": False}):
        with pytest.raises(error) as caught:
            SQLiteLogStore(path, **options)
        assert caught.value.path == str(path)
    assert before is None or path.read_bytes() == before


def test_paths_that_are_none(tmp_path: Path) -> None:
    for options in ({"create": False}, {"read_only": True}):
        with pytest.raises(StateFileNotFoundError):
            SQLiteLogStore(tmp_path / "x", **options)
    assert not list(tmp_path.iterdir())
    for bad in ("a\0b", 5, None, tmp_path / "no" / "such"):
        with pytest.raises(FileAccessError):
            SQLiteLogStore(bad)


def test_held_by_another(path: Path) -> None:
    with SQLiteLogStore(path, timeout=0.05) as store, SQLiteLogStore(path) as other:
        log = SessionLog.open(store, "a")
        with other.transaction():
            with pytest.raises(StoreLockedError) as caught:
                log.save_turn_end(9)
            assert caught.value.path == str(path)
            assert log.verify() == 10, "readers do not wait"
        log.save_turn_end(9)


def test_no_room(path: Path) -> None:
    with SQLiteLogStore(path) as store:
        (pages,) = store._db().execute("PRAGMA page_count").fetchone()
        store._db().execute(f"PRAGMA max_page_count = {pages}")
        log = SessionLog.open(store, "a")
        with pytest.raises(StoreFullError):
            log.save_delta([user("x" * 100_000)])
        assert log.verify() == log.n_entries == 10
        store._db().execute(f"PRAGMA max_page_count = {2 * pages + 1000}")
        log.save_delta([user("x" * 100_000)])


def test_read_only(path: Path) -> None:
    with SQLiteLogStore(path, read_only=True) as store:
        log = SessionLog.open(store, "a")
        assert log.verify() == 10
        with pytest.raises(SaveError):
            log.save_turn_end(1)
        with pytest.raises(SaveError):
            SessionLog.create(store)


# --- JSON Lines -------------------------------------------------------------------------------------------------------


def test_any_changed_byte_of_a_line_is_found(path: Path) -> None:
    """Or it changes nothing: a space for the end of a line, the name of the session."""
    with SQLiteLogStore(path) as store:
        lines = list(export_lines(store, ["a"]))[:3]
    whole = b"".join(lines)
    chance = random.Random(3)
    name = range(len(b'{"session":"'), len(b'{"session":"a'))
    for at in range(len(whole)):
        bad = bytearray(whole)
        bad[at] ^= 1 << chance.randrange(8)
        store = MemoryLogStore()
        try:
            import_jsonl(store, bytes(bad).splitlines(keepends=True))
        except LlamaStateError:
            assert store.sessions() == [], "something was added all the same"
        else:
            assert at in name or chr(whole[at]) in "\r\n" or len(store.sessions()) > 1, chr(whole[at])


def test_imports_are_all_or_nothing(path: Path) -> None:
    with SQLiteLogStore(path) as store:
        lines = list(export_lines(store))
        with pytest.raises(SessionExistsError):
            import_jsonl(store, [line.replace(b'"session":"a"', b'"session":"x"') for line in lines])
        assert len(store.sessions()) == 3
    gap = MemoryLogStore()
    with pytest.raises(LogTamperedError) as caught:
        import_jsonl(gap, lines[:13] + lines[14:])
    assert caught.value.index == 3
    assert gap.sessions() == []
    done = import_jsonl(gap, lines[:13] + lines[14:], partial=True)
    assert done.sessions == {"a": 10, "b": 3, "c": 1}
    assert done.broken["b"].index == 3
    for line in (b"{}\n", lines[0][:-3], b"\xff\xff", lines[0].replace(b'"entry":{', b'"entry":{{')):
        with pytest.raises(CorruptStateError) as bad:
            import_jsonl(gap, [b"\n", line])
        assert bad.value.offset == 2


def test_a_stored_entry_that_is_none() -> None:
    """Its hash holds, but what was hashed is no entry."""
    store = MemoryLogStore()
    log = SessionLog.create(store)
    for data in (b"[]", b"{}", b'{"kind":5}', b'{"kind":"turn_end","turn_count":"x"}', b"\xff", b"[" * 100_000):
        (bad,) = chain([data], index=1, prev_hash=log.head_hash)
        store._logs[log.id] = [*store._logs[log.id][:1], bad]
        with pytest.raises(LogTamperedError) as caught:
            SessionLog.open(store, log.id).restore()
        assert caught.value.index == 1
        assert isinstance(bad, StoredEntry)
