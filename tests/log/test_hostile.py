"""What programs, people and disks do to a log that they should not."""

from __future__ import annotations

import contextlib
import itertools
import json
import linecache
import os
import sqlite3
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamastate.cli import main
from llamastate.errors import (
    ClosedError,
    CorruptStateError,
    HeadMovedError,
    InvalidArgumentError,
    LlamaStateError,
    SessionNameError,
    SessionNotFoundError,
    StoreFullError,
)
from llamastate.log import (
    MemoryLogStore,
    SessionLog,
    SessionOrigin,
    SessionStart,
    SQLiteLogStore,
    TurnEnd,
    UnknownEntry,
    assistant,
    chain,
    forest,
    import_jsonl,
    salvage,
    tree_dot,
    tree_svg,
    tree_text,
    user,
)
from llamastate.log.entries import MAX_DEPTH
from tests import children


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    made = MemoryLogStore() if request.param == "memory" else SQLiteLogStore(tmp_path / "log.db")
    with made:
        yield made


# --- threads ----------------------------------------------------------------------------------------------------------


def together(*works: Callable[[], None]) -> None:
    """Run them at once; a deadlock is a failure."""
    failures: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "they wait for each other"
    assert not failures, failures


def test_threads_that_write_to_several_logs_in_one_transaction(store: Any) -> None:
    """Each begins with another log, and all want all."""
    logs = [SessionLog.create(store) for _ in range(3)]

    def work(first: int) -> Callable[[], None]:
        mine = logs[first:] + logs[:first]

        def write() -> None:
            for n in range(30):
                with mine[0].transaction():
                    for log in mine:
                        log.save_turn_end(n)
                mine[1].save_turn_end(n)
                mine[1].refresh()
                with store.transaction():
                    mine[2].save_turn_end(n)
                mine[2].ensure_head_or_fork()
                mine[0].restore()

        return write

    together(*(work(i) for i in range(3)))
    assert [log.verify() for log in logs] == [1 + 3 * 30 * 5 // 3] * 3
    assert len(store.sessions()) == 3, "forked without need"


def test_threads_share_one_log(store: Any) -> None:
    log = SessionLog.create(store)

    def write() -> None:
        for n in range(50):
            log.save_delta([user(str(n)), assistant("ok")])
            assert log.refresh() in (False, True)

    together(write, write, write)
    assert log.verify() == log.n_entries == 1 + 3 * 50 * 2


def test_a_failure_in_a_block_within_a_block(store: Any) -> None:
    """It is taken back alone, and the logs' heads with it."""
    log, other = SessionLog.create(store), SessionLog.create(store)
    with log.transaction():
        log.save_turn_end(1)
        for _ in range(2):
            with pytest.raises(InvalidArgumentError), log.transaction(), other.transaction():  # noqa: PT012
                log.save_turn_end(7)
                other.save_turn_end(7)
                log.save_delta([user(float("nan"))])
        with pytest.raises(InvalidArgumentError):
            log.save_delta([user("x"), user(float("nan"))])
        with pytest.raises(HeadMovedError):
            store.append(log.id, chain([TurnEnd(9)], index=1, prev_hash="00" * 32))
        other.save_turn_end(2)
        log.save_turn_end(3)
    assert [stored.entry.turn_count for stored in log.entries() if stored.index] == [1, 3]
    assert [stored.entry.turn_count for stored in other.entries() if stored.index] == [2]
    with pytest.raises(KeyboardInterrupt), log.transaction():  # noqa: PT012
        log.save_turn_end(4)
        raise KeyboardInterrupt
    log.save_turn_end(5)
    assert log.verify() == 4


def test_a_full_disk_in_the_middle_of_a_block(tmp_path: Path) -> None:
    """Who goes on all the same after an append that failed gets nothing recorded, and is told."""
    with SQLiteLogStore(tmp_path / "log.db") as store:
        log = SessionLog.create(store)
        (pages,) = store._db().execute("PRAGMA page_count").fetchone()
        store._db().execute(f"PRAGMA max_page_count = {pages + 3}")
        with pytest.raises(StoreFullError), log.transaction():  # noqa: PT012
            log.save_turn_end(1)
            with pytest.raises(StoreFullError):
                log.save_delta([user("x" * 3000) for _ in range(20)])
            with contextlib.suppress(StoreFullError):
                log.save_turn_end(2)
        assert log.n_entries == log.verify() == 1
        log.save_turn_end(1)
        # In a block within: it alone, or all, if SQLite had to give up the whole transaction. Never a part.
        with contextlib.suppress(StoreFullError), log.transaction():
            log.save_turn_end(2)
            with pytest.raises(StoreFullError):
                fill_in_a_block(log)
            log.save_turn_end(3)
        turns = [stored.entry.turn_count for stored in log.entries() if stored.index]
        assert turns in ([1], [1, 2, 3])
        assert log.verify() == log.n_entries
        log.save_turn_end(4)


def fill_in_a_block(log: SessionLog) -> None:
    with log.transaction():
        log.save_delta([user("x" * 3000) for _ in range(20)])


def test_interrupted_anywhere(tmp_path: Path) -> None:
    """A Ctrl-C between any two lines leaves a store that goes on, and an append that is there or not."""
    with SQLiteLogStore(tmp_path / "log.db") as store:
        log = SessionLog.create(store)
        finished = False
        for at in itertools.count(1):
            left = at

            def trace(frame: Any, event: str, arg: Any) -> Any:
                nonlocal left
                if "llamastate/log" not in frame.f_code.co_filename:
                    return None
                # signals are looked at when something is called
                if event == "line" and "(" in linecache.getline(frame.f_code.co_filename, frame.f_lineno):
                    left -= 1
                if not left:
                    raise KeyboardInterrupt
                return trace

            traced = sys.gettrace()
            try:
                sys.settrace(trace)
                with log.transaction():
                    log.save_turn_end(at)
                finished = True
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(traced)
            assert not store._db().in_transaction, at
            if finished:
                break
            if store.head(log.id).hash != log.head_hash:
                log.refresh()
            log.save_turn_end(0)
        assert at > 50
        assert log.verify() == log.n_entries


FORKED = """
import os, sys, threading, time
from llamastate.log import SessionLog, SQLiteLogStore
store = SQLiteLogStore(sys.argv[1])
log = SessionLog.create(store, session_id="a")
started, end = threading.Event(), threading.Event()

def hold():
    with store.transaction():
        SessionLog.create(store, session_id="b")
        started.set()
        end.wait()

thread = threading.Thread(target=hold)
thread.start()
started.wait()
pid = os.fork()
if not pid:  # the thread that holds the store is not here
    ids = [info.id for info in store.sessions()]
    os._exit(0 if ids == ["a"] else 1)
assert os.waitpid(pid, 0)[1] == 0
end.set()
thread.join()
assert [info.id for info in store.sessions()] == ["b", "a"]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_while_another_thread_writes(tmp_path: Path) -> None:
    done = children.run(FORKED, tmp_path / "log.db")
    assert done.returncode == 0, done.stderr


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", "a\0b", "\ud800", "a\nb", "con", "x" * 101, 5, None, b"a"]
)
def test_session_ids_that_are_none(name: Any, store: Any) -> None:
    log = SessionLog.create(store, session_id="good")
    for call in (
        lambda: SessionLog.create(store, session_id=name) if name is not None else SessionLog.open(store, name),
        lambda: SessionLog.open(store, name),
        lambda: log.fork(session_id=name) if name is not None else store.head(name),
        lambda: store.info(name),
        lambda: store.append(name, chain([TurnEnd(1)], index=1, prev_hash=log.head_hash)),
        lambda: store.append(name, []),
        lambda: store.read(name),
        lambda: store.find(name, log.head_hash),
    ):
        with pytest.raises((SessionNameError, SessionNotFoundError)):
            call()
    assert [info.id for info in store.sessions()] == ["good"]


def test_one_text_in_two_spellings_is_one_session(store: Any) -> None:
    log = SessionLog.create(store, session_id="caf\u00e9")
    assert SessionLog.open(store, "cafe\u0301").head_hash == log.head_hash


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for i in range(depth):
        value = {"a": value} if i % 2 else {"a": [value]}
    return value


def test_what_is_deep_can_be_forked_and_read_from_deep_down(store: Any) -> None:
    log = SessionLog.create(store)
    deepest = 0
    for depth in range(MAX_DEPTH):
        try:
            log.save_delta([user(nested(depth))])
            log.save_cache_locked(1, state=nested(depth))
            deepest = depth
        except InvalidArgumentError:  # noqa: PERF203
            break
    assert MAX_DEPTH / 2 < deepest < MAX_DEPTH
    with pytest.raises(InvalidArgumentError):
        log.save_delta([user(nested(deepest + 3))])
    fork = log.fork().fork()
    limit = sys.getrecursionlimit()

    def down(n: int) -> None:
        if n:
            down(n - 1)
        else:
            assert fork.restore() == log.restore()

    down(limit - MAX_DEPTH - 200 - len(_stack()))


def _stack() -> list[Any]:
    frames, frame = [], sys._getframe()
    while frame is not None:
        frames.append(frame.f_code)
        frame = frame.f_back  # type: ignore[assignment]
    return frames


def test_a_large_entry(store: Any) -> None:
    log = SessionLog.create(store)
    text = "€" * 3_000_000
    log.save_delta([user(text), assistant("short")])
    assert log.restore().history[0]["content"] == text
    assert log.verify() == 3


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the limit cannot be set before")
def test_an_entry_too_large_for_sqlite(tmp_path: Path) -> None:
    with SQLiteLogStore(tmp_path / "log.db") as store:
        log = SessionLog.create(store)
        store._db().setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)
        with pytest.raises(InvalidArgumentError):
            log.save_delta([user("fine"), user("x" * 20_000)])
        assert log.verify() == log.n_entries == 1
        log.save_delta([user("fine")])


def test_a_clock_that_goes_backwards(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are recorded as they are told; order is the order of appending."""
    times = iter([10**12 - n * 10**9 for n in range(5000)])
    for module in ("entries", "sessionlog"):
        monkeypatch.setattr(f"llamastate.log.{module}.now_ms", lambda: next(times))
    logs = [SessionLog.create(store) for _ in range(3)]
    for n in range(10):
        logs[0].save_delta([user(str(n))])
    fork = logs[0].fork()
    assert [item["content"] for item in fork.restore().history] == [str(n) for n in range(10)]
    assert logs[0].verify() == 11
    assert [info.id for info in store.sessions()] == [log.id for log in (fork, *logs[::-1])]
    info = store.info(logs[0].id)
    assert info.updated < info.created
    assert len({log.id for log in logs}) == 3
    tree_text(forest(store))


@pytest.mark.parametrize("ts", [-(10**30), -1, 2**63, 10**30])
def test_times_that_are_none(ts: int, store: Any) -> None:
    log = SessionLog.create(store, session_id="a")
    log.append(UnknownEntry({"kind": "dream", "ts": ts}))
    assert log.verify() == 2
    assert abs(store.info("a").updated) <= 2**63
    assert "a" in tree_text(forest(store))
    assert tree_svg(forest(store))


def test_what_is_no_argument(store: Any) -> None:
    log = SessionLog.create(store)
    for call in (
        lambda: log.save_turn_end(-1),
        lambda: log.save_turn_end(1.5),
        lambda: log.save_turn_end("1"),
        lambda: log.save_usage(1, -5),
        lambda: log.save_delta("text"),
        lambda: log.save_delta(5),
        lambda: log.save_delta({"role": "user"}),
        lambda: log.append("text"),
        lambda: log.append(SessionStart()),
        lambda: log.append(UnknownEntry({"kind": "session_start"})),
        lambda: log.append(UnknownEntry({"kind": 5})),
        lambda: log.append(UnknownEntry({})),
        lambda: log.append(UnknownEntry([])),
        lambda: log.append(TurnEnd("x")),
        lambda: log.append(TurnEnd(1, ts="x")),
        lambda: SessionLog.create(store, system_prompt=5),
        lambda: SessionLog.create(store, config=[]),
        lambda: SessionLog.create(store, config={1: 2}),
        lambda: SessionLog.create(store, system_prompt="\ud800"),
        lambda: log.save_outcome({1, 2}),
        lambda: store.sessions(limit=-1),
        lambda: store.sessions(limit="many"),
        lambda: import_jsonl(store, ["text"]),
        lambda: import_jsonl(store, b"bytes"),
    ):
        with pytest.raises(InvalidArgumentError):
            call()
    assert log.verify() == log.n_entries == len(store.sessions()) == 1


def test_a_newer_version_has_written(store: Any) -> None:
    """Fields and kinds go through fork, fork of fork, and export, as they are."""
    start = {"kind": "session_start", "ts": 1, "mood": "good", "history": [user("a")], "config": {"t": 1}}
    later = [
        {"kind": "user_input", "ts": 2, "item": user("b"), "from": "phone"},
        {"kind": "dream", "ts": 3, "of": [1, None, {"deep": 1.5}]},
        {"kind": "locked", "ts": 4, "locked_prefix_len": 2, "state": {"cloud": {"at": "s3://x"}}, "by": "cron"},
    ]
    store.create("new", chain([json.dumps(e, sort_keys=True).encode() for e in (start, *later)]))
    log = SessionLog.open(store, "new")
    for found in (log, log.fork(), log.fork().fork()):
        state = found.restore()
        assert [item["content"] for item in state.history] == ["a", "b"]
        kept = [k.entry for k in state.unknown]
        assert kept[0] == {k: v for k, v in start.items() if k != "history"}
        assert kept[1] == {k: v for k, v in later[0].items() if k != "item"}
        assert kept[2:] == later[1:]
        assert state.states[0].state == {"cloud": {"at": "s3://x"}}
        assert state.locked_prefix_len == 2


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        "id = CAST('a' AS BLOB)", "head = 'text'", "created = 'yesterday'", "updated = 1.5", "relation = 'cousin'",
        "relation = 'fork'", "relation = 'fork', origin_id = X'05', origin_hash = 'x'", "origin_id = 'x'",
        "n_entries = -1", "n_entries = 'x'",
    ],
)  # fmt: skip
def test_a_row_that_makes_no_sense(change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.db"
    with SQLiteLogStore(path) as store:
        SessionLog.create(store, session_id="a")
    with sqlite3.connect(path) as raw:
        raw.execute(f"UPDATE sessions SET {change}")
    raw.close()
    with SQLiteLogStore(path) as store, pytest.raises(CorruptStateError) as caught:
        store.sessions()
    assert caught.value.path == str(path)
    for command in ("ls", "tree", "verify"):
        assert main(["log", command, str(path)]) == 1
    capsys.readouterr()


def test_what_is_told_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A log can come from anybody, and must not command the terminal of who looks at it."""
    path, bad = tmp_path / "log.db", "\x1b[2J\x9b\u202e\r"
    with SQLiteLogStore(path) as store:
        origin = SessionOrigin(bad, "00" * 32)
        store.create("a", chain([SessionStart(system_prompt=bad, config={bad: bad}, forked_from=origin)]))
        log = SessionLog.open(store, "a")
        log.save_delta([{"role": bad, "type": bad, "content": bad}, user(bad), {"n": bad}])
        log.append(UnknownEntry({"kind": bad, bad: bad}))
        log.save_outcome(bad)
    with sqlite3.connect(path) as raw:
        raw.execute(
            "INSERT INTO sessions SELECT n + 1, ?, n_entries, head, 0, 0, NULL, NULL, NULL FROM sessions", (bad,)
        )
    raw.close()
    for words in (["ls"], ["show", "a"], ["show", "a", "--state"], ["verify"], ["tree"], ["tree", "a"]):
        main(["log", words[0], str(path), *words[1:]])
        said = capsys.readouterr()
        for text in (said.out, said.err):
            assert not {*"\x1b\x9b\u202e\r"} & {*text}, words


def test_salvage_through_a_link(tmp_path: Path) -> None:
    """What is not brought home yet lies beside the file, not beside the link."""
    path, link = tmp_path / "log.db", tmp_path / "elsewhere" / "link.db"
    link.parent.mkdir()
    with SQLiteLogStore(path) as store:
        log = SessionLog.create(store)
        log.save_turn_end(1)
        link.symlink_to(path)
        assert len(list(salvage(link))) == 2


UNPRIVILEGED = """
import os, sys
from llamastate.errors import FileAccessError, LlamaStateError, SaveError
from llamastate.log import SessionLog, SQLiteLogStore
folder = sys.argv[1]
with SQLiteLogStore(folder + "/log.db") as store:
    SessionLog.create(store, session_id="a").save_turn_end(1)
os.chmod(folder + "/log.db", 0o444)
os.chmod(folder, 0o555)
if not os.getuid():
    os.setuid(65534)
with SQLiteLogStore(folder + "/log.db", read_only=True) as store:
    assert SessionLog.open(store, "a").verify() == 2
for attempt in (
    lambda: SQLiteLogStore(folder + "/new.db"),
    lambda: SessionLog.open(SQLiteLogStore(folder + "/log.db"), "a").save_turn_end(2),
):
    try:
        attempt()
    except (FileAccessError, SaveError) as error:
        assert error.path
    else:
        raise AssertionError("written where nothing can be written")
with SQLiteLogStore(folder + "/log.db", read_only=True) as store:
    assert SessionLog.open(store, "a").verify() == 2
"""


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="no users")
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    folder = Path("/tmp") / f"llamastate-{os.getpid()}-{tmp_path.name}"
    folder.mkdir()
    try:
        done = children.run(UNPRIVILEGED, folder)
        assert done.returncode == 0, done.stderr
    finally:
        folder.chmod(0o755)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def test_closed_in_the_middle(tmp_path: Path) -> None:
    store = SQLiteLogStore(tmp_path / "log.db")
    log = SessionLog.create(store)
    with pytest.raises(LlamaStateError), log.transaction():  # noqa: PT012
        log.save_turn_end(1)
        store.close()
    with pytest.raises(ClosedError):
        log.save_turn_end(1)
    with SQLiteLogStore(tmp_path / "log.db") as again:
        assert SessionLog.open(again, log.id).verify() == 1


def test_a_long_chain_of_compactions() -> None:
    """Each from the one before; and a circle, which only an import can make."""
    store = MemoryLogStore()
    last = chain([SessionStart(ts=0)])
    store.create("s0", last)
    for n in range(1, 3000):
        origin = SessionOrigin(f"s{n - 1}", last[0].hash)
        last = chain([SessionStart(ts=n, compacted_from=origin)])
        store.create(f"s{n}", last)
    roots = forest(store)
    assert [root.info.id for root in roots] == ["s0"]
    assert [branch.info.id for branch in forest(store, "s2999")] == ["s0"]
    assert tree_text(roots).count("\n") == 3000
    store.create("x", chain([SessionStart(ts=0, forked_from=SessionOrigin("y", "00" * 32))]))
    store.create("y", chain([SessionStart(ts=0, forked_from=SessionOrigin("x", "00" * 32))]))
    store.create("z", chain([SessionStart(ts=0, forked_from=SessionOrigin("z", "00" * 32))]))
    roots = forest(store)
    assert sorted(root.info.id for root in roots) == ["s0", "x", "z"]
    assert sum(1 for root in roots for _ in walk(root)) == 3003
    assert '"x" -> "y"' in tree_dot(roots)
    assert forest(store, "y")


def walk(root: Any) -> Any:
    todo = [root]
    while todo:
        branch = todo.pop()
        yield branch
        todo += branch.branches
