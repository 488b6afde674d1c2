"""The table of entries: what it answers, what it lets go first, and what it survives."""

from __future__ import annotations

import os
import random
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamastate.errors import ClosedError, StoreLockedError, VersionMismatchError
from llamastate.prefix.entry import Kind
from llamastate.prefix.index import Index, Root, Row, Totals
from tests import children
from tests.prefix.entries import ROOT


def key(*what: object) -> bytes:
    return random.Random(repr(what)).randbytes(32)


def row(i: int, *, depth: int = 0, parent: bytes = ROOT, used: int = 1000, kind: Kind = Kind.BLOCK, **more: int) -> Row:
    return Row(key(i), parent, ROOT, kind, depth * 8, more.get("tail", 8), more.get("nbytes", 100), used)


def add(index: Index, *rows: Row) -> None:
    for each in rows:
        assert index.add(each, lambda: None)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "index.sqlite")


@pytest.fixture
def index(path: str) -> Iterator[Index]:
    made = Index(path, lambda: ((), ()))
    yield made
    made.close()


def test_known(index: Index):
    rows = [row(i) for i in range(700)]
    add(index, *rows[::2])
    assert index.known([]) == set()
    for n in (1, 2, 7, 8, 9, 63, 64, 65, 255, 256, 257, 700):
        assert index.known([r.key for r in rows[:n]]) == {r.key for r in rows[:n:2]}
    assert index.find(rows[2].key) == rows[2]
    assert index.find(rows[3].key) is None
    assert not index.add(rows[2], lambda: None)
    assert {r.key for r in index.rows(batch=50)} == {r.key for r in rows[::2]}
    assert list(index.rows(b"other" * 6 + b"xx")) == []


def test_every_row_is_under_its_first_byte(index: Index):
    rows = [
        Row(bytes([b]) + bytes([e] * 31), ROOT, ROOT, Kind.BLOCK, 0, 8, 5, 1) for b in (0, 7, 255) for e in (0, 255)
    ]
    add(index, *rows)
    assert [len(index.sizes(b)) for b in (0, 1, 7, 254, 255)] == [2, 0, 2, 0, 2]


def test_tails_are_each_there_once(index: Index):
    parent = key("parent")
    for i in range(50):
        add(index, row(i, parent=parent, kind=Kind.ANCHOR, tail=(3, 0, 61, 7)[i % 4]))
    add(index, row(100, parent=parent, tail=5), row(101, parent=key("other"), kind=Kind.ANCHOR, tail=9))
    assert index.tails(parent) == [61, 7, 3, 0]
    assert index.tails(key("other")) == [9]
    assert index.tails(key("none")) == []


def test_least_recently_used_goes_first(index: Index):
    add(index, *(row(i, used=100 - i) for i in range(10)))
    assert index.evict(250, anchor_share=1) == [(key(9), 100), (key(8), 100), (key(7), 100)]
    assert index.evict(0, anchor_share=1) == []
    assert len(index.evict(10**9, anchor_share=1, limit=4)) == 4
    assert len(index.evict(10**9, anchor_share=1)) == 3
    assert index.totals() == Totals(0, 0, 0, 0, 0)


def test_nothing_goes_before_what_stands_on_it(index: Index):
    """Whatever is used in whatever order: an entry that goes has no child left."""
    chance = random.Random(3)
    parents: dict[bytes, bytes] = {}
    depths = {ROOT: 0}
    for i in range(300):
        parent = chance.choice([ROOT, *list(parents)[-40:]])
        new = row(i, parent=parent, depth=depths[parent], used=i + 1)
        add(index, new)
        index.touch({parent: i + 1})
        parents[new.key], depths[new.key] = parent, depths[parent] + 1
    for stamp in range(1000, 1040):
        index.touch({chance.choice(list(parents)): stamp + chance.randrange(3) for _ in range(5)})
    while gone := index.evict(100, anchor_share=1):
        ((name, _),) = gone
        del parents[name]
        assert name not in parents.values()
    assert not parents


def test_a_touch_reaches_what_it_stands_on(index: Index):
    rows = [row(0), row(1, depth=1, parent=key(0)), row(2, depth=2, parent=key(1)), row(3)]
    add(index, *rows)
    index.touch({key(1): 5000, key("nothing"): 6000})
    index.touch({key(0): 4000})  # earlier than what is known
    assert [index.find(key(i)).used for i in range(4)] == [5000, 5000, 1000, 1000]


def test_a_ring_of_parents_ends(index: Index):
    add(index, row(0, parent=key(1)), row(1, parent=key(0)))
    index.touch({key(0): 5000})
    assert index.evict(1, anchor_share=1, spare=key(0)) == []


def test_anchors_first_while_they_take_too_much(index: Index):
    add(index, *(row(i, used=i) for i in range(6)))
    add(index, *(row(10 + i, used=1000 + i, kind=Kind.ANCHOR) for i in range(6)))
    # 6 of 12, then 5 of 11: at most half of what is left are anchors
    gone = [name for name, _ in index.evict(300, anchor_share=0.45)]
    assert gone == [key(10), key(11), key(0)]
    assert index.totals() == Totals(5, 4, 900, 400, 0)


def test_pins(index: Index):
    add(index, row(0), row(1), row(2, kind=Kind.ANCHOR))
    assert index.pin(b"a", 8, [key(0)]) == set()
    assert index.pin(b"a", 24, [key(0), key(2)]) == set()
    assert index.pin(b"b", 16, [key(0), key("nothing")]) == {key("nothing")}
    assert index.totals().pinned_bytes == 200
    assert index.pins() == [(b"a", 8, [key(0)]), (b"a", 24, [key(0), key(2)])]
    assert index.evict(10**9, anchor_share=0.1) == [(key(1), 100)]
    assert [index.unpin(name) for name in (b"b", b"a")] == [0, 8]  # whoever pinned more still needs it
    assert index.evict(10**9, anchor_share=0.1) == []
    assert index.unpin(b"a") == 24
    assert index.find(key(0)).pinned == 0
    assert index.unpin(b"a") == 0
    assert sorted(index.evict(10**9, anchor_share=0.1)) == sorted([(key(0), 100), (key(2), 100)])
    assert index.totals() == Totals(0, 0, 0, 0, 0)


def test_what_comes_again_is_pinned_as_it_was(index: Index):
    add(index, row(0), row(1))
    for name in (b"a", b"b"):
        index.pin(name, 16, [key(0), key(1)])
    index.remove([key(0)])
    assert index.totals().pinned_bytes == 100
    assert index.unpin(b"a") == 16
    add(index, row(0))
    assert index.find(key(0)).pinned == index.find(key(1)).pinned == 1
    assert index.totals().pinned_bytes == 200
    index.unpin(b"b")
    assert index.totals().pinned_bytes == 0
    assert index.pins() == []


def test_totals_are_what_the_rows_come_to(index: Index):
    chance = random.Random(1)
    there: set[int] = set()
    for step in range(400):
        i = chance.randrange(40)
        what = chance.randrange(4)
        if what < 2:
            kind = chance.choice(list(Kind))
            assert index.add(row(i, kind=kind, nbytes=i, used=step), lambda: None) == (i not in there)
            there.add(i)
        elif what == 2:
            assert len(index.remove([key(i)])) == (i in there)
            there.discard(i)
        else:
            index.pin(bytes([i % 3]), 8, [key(i)]) if chance.random() < 0.6 else index.unpin(bytes([i % 3]))
        rows = list(index.rows())
        assert index.totals() == Totals(
            sum(r.kind == Kind.BLOCK for r in rows),
            sum(r.kind == Kind.ANCHOR for r in rows),
            sum(r.nbytes for r in rows),
            sum(r.nbytes for r in rows if r.kind == Kind.ANCHOR),
            sum(r.nbytes for r in rows if r.pinned),
        )


def test_no_question_looks_at_every_row(index: Index):
    """SQLite's own plan: a search in every step, never a scan of the table."""
    from llamastate.prefix import index as module

    statements = [
        module._known_query(64),
        module._TAILS,
        module._NEWEST,
        module._ANCESTORS,
        "SELECT id, key, nbytes, kind FROM entries WHERE pinned = 0 ORDER BY used, start DESC LIMIT 1",
        "SELECT id, key, nbytes, kind FROM entries WHERE pinned = 0 AND kind = 2 ORDER BY used, start DESC LIMIT 1",
        "SELECT id, parent FROM entries WHERE key = ? AND used < ?",
    ]
    for statement in statements:
        values = [b""] * (64 if "IN (" in statement else statement.count("?") if "?1" not in statement else 1)
        plan = index.database.read(
            lambda c, s=statement, v=values: [r[3] for r in c.execute(f"EXPLAIN QUERY PLAN {s}", v)]
        )
        assert any("entries" in step or " e " in step for step in plan), plan
        for step in plan:
            assert "TEMP B-TREE" not in step, plan
            if step.startswith(("SCAN entries", "SCAN TABLE entries")):
                assert "USING INDEX" in step or "USING COVERING INDEX" in step, plan


def test_a_failing_check_adds_nothing(index: Index):
    def fail() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        index.add(row(0), fail)
    assert index.known([key(0)]) == set()
    add(index, row(0))


def test_roots(index: Index):
    add(index, row(0))
    assert index.roots() == [Root(ROOT)]
    index.add_root(Root(ROOT, "{}", 64, "dense", 7))
    index.add_root(Root(b"x" * 32, "{}", 32, "iswa", 8))
    assert index.roots() == [Root(ROOT, "{}", 64, "dense", 7), Root(b"x" * 32, "{}", 32, "iswa", 8)]


# --- what it survives -------------------------------------------------------------------------------------------------


def reborn() -> tuple[list[Root], list[Row]]:
    return [Root(ROOT, "{}", 8, "dense", 1)], [row(77)]


def test_a_newer_one_is_left_alone(path: str):
    Index(path, lambda: ((), ())).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version=3")
    connection.close()
    before = Path(path).read_bytes()
    with pytest.raises(VersionMismatchError) as caught:
        Index(path, reborn)
    assert (caught.value.expected, caught.value.found, caught.value.path) == (2, 3, path)
    assert Path(path).read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.unlink(),
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(b"not a database" * 1000),
        lambda p: p.write_bytes(p.read_bytes()[:5000]),
        lambda p: p.write_bytes(p.read_bytes()[:100] + bytes(len(p.read_bytes()) - 100)),
    ],
    ids=["gone", "empty", "foreign", "short", "zeros"],
)
def test_lost_or_damaged_before_it_is_opened(path: str, damage):
    first = Index(path, lambda: ((), ()))
    add(first, *(row(i) for i in range(200)))
    first.close()
    damage(Path(path))
    again = Index(path, reborn)
    assert again.known([key(1), key(77)]) == {key(77)}
    assert again.totals().blocks == 1
    assert again.roots()[0].kind == "dense"
    add(again, row(1))
    again.close()


def test_lost_while_it_is_open(path: str):
    """By name or altogether: the next call sees a new one, in every object and thread that has it open."""
    one, other = Index(path, reborn), Index(path, reborn)
    add(one, row(1))
    for left in (path, f"{path}-wal"):
        os.unlink(left)
    assert one.known([key(1), key(77)]) == {key(77)}
    add(one, row(2))
    assert other.known([key(1), key(2), key(77)]) == {key(2), key(77)}
    other.close()
    add(one, row(3))
    one.close()
    last = Index(path, lambda: ((), ()))
    assert last.known([key(2), key(3), key(77)]) == {key(2), key(3), key(77)}
    last.close()


def test_damaged_while_it_is_open(path: str):
    index = Index(path, reborn)
    add(index, *(row(i) for i in range(100, 2000)))
    index.database.checkpoint()
    size = os.path.getsize(path)
    with open(path, "r+b") as file:  # every page but the first
        file.seek(4096)
        file.write(os.urandom(size - 4096))
    with sqlite3.connect(path) as connection, pytest.raises(sqlite3.DatabaseError):
        connection.execute("SELECT count(*) FROM entries NOT INDEXED").fetchall()
    connection.close()
    # what its own pages still hold may be answered from memory, but nothing fails, and writing mends it
    for i in range(5000, 5300):
        index.known([key(j) for j in range(i - 64, i)])
        index.add(row(i), lambda: None)
    assert index.known([key(5299)]) == {key(5299)}
    index.close()
    assert os.path.exists(path + ".damaged")


def test_a_half_made_one_is_not_taken_for_one(path: str):
    Path(path + ".new").write_bytes(b"half")
    Path(path + "-wal").write_bytes(b"left by another")
    index = Index(path, reborn)
    assert index.known([key(77)]) == {key(77)}
    index.close()


def test_readers_do_not_wait_for_a_writer(index: Index, path: str):
    add(index, row(0))
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("DELETE FROM entries")
    assert index.known([key(0)]) == {key(0)}
    with pytest.raises(StoreLockedError):
        index.touch({key(0): 9999}, wait=False)
    writer.execute("ROLLBACK")
    writer.close()
    index.touch({key(0): 9999}, wait=False)
    assert index.find(key(0)).used == 9999


def test_a_writer_that_never_ends(index: Index, path: str, monkeypatch: pytest.MonkeyPatch):
    from llamastate.prefix import database

    monkeypatch.setattr(database, "TRIES", 1)
    index.database._writer().execute("PRAGMA busy_timeout=20")
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreLockedError) as caught:
        index.add(row(1), lambda: None)
    assert caught.value.path == path
    writer.close()


def test_threads(index: Index):
    """Eight at once, all adding, looking and removing."""
    errors: list[BaseException] = []

    def work(t: int) -> None:
        try:
            for i in range(60):
                add(index, row(1000 * t + i))
                assert index.known([key(1000 * t + j) for j in range(60)])
                index.touch({key(1000 * t + i): 2000 + i})
                if i % 3 == 0:
                    assert len(index.remove([key(1000 * t + i)])) == 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert index.totals().blocks == 8 * 40


FORK = """
import os, sys, threading
from llamastate.prefix.entry import Kind
from llamastate.prefix.index import Index, Row
def row(i):
    return Row(i.to_bytes(32, "big"), bytes(32), bytes(32), Kind.BLOCK, 0, 8, 100, 1)
index = Index(sys.argv[1], lambda: ((), ()))
index.add(row(1), lambda: None)
inside, go = threading.Event(), threading.Event()
def hold(connection):
    inside.set()
    go.wait()
reader = threading.Thread(target=lambda: index.database.read(hold))
reader.start()
inside.wait()                         # somebody is inside, holding the lock, when the child is made
child = os.fork()
if child == 0:
    assert index.known([row(1).key]) == {row(1).key}
    assert index.add(row(2), lambda: None)
    index.close()
    os._exit(0)
_, status = os.waitpid(child, 0)
go.set()
reader.join()
assert status == 0, status
assert index.known([row(1).key, row(2).key]) == {row(1).key, row(2).key}
assert index.add(row(3), lambda: None)
index.close()
print("done")
"""


def test_fork(path: str):
    result = children.run(FORK, path)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


def test_closed(path: str):
    index = Index(path, lambda: ((), ()))
    index.close()
    index.close()
    with pytest.raises(ClosedError):
        index.known([key(0)])
    with pytest.raises(ClosedError):
        index.add(row(0), lambda: None)


def test_odd_paths(tmp_path: Path):
    folder = tmp_path / "a?b#c%41 d'é"
    folder.mkdir()
    index = Index(str(folder / "index.sqlite"), lambda: ((), ()))
    add(index, row(0))
    index.close()
    assert (folder / "index.sqlite").stat().st_size > 4096
