"""Whether an implementation of :class:`~llamastate.log.LogStore` is one.

    from llamastate.log import conformance

    conformance.check(lambda: MyStore(...))  # raises AssertionError, naming what does not hold

or, with pytest, one test a case::

    @pytest.mark.parametrize("case", conformance.CASES)
    def test_my_store(case, tmp_path):
        case(MyStore(tmp_path))

A case gets a store with nothing in it and leaves it open. It needs nothing but this package.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from llamastate.errors import (
    ClosedError,
    HeadMovedError,
    InvalidArgumentError,
    LlamaStateError,
    LogTamperedError,
    SessionExistsError,
    SessionNameError,
    SessionNotFoundError,
)
from llamastate.log.chaining import StoredEntry, chain
from llamastate.log.entries import SessionOrigin, SessionStart, TurnEnd, UnknownEntry
from llamastate.log.items import user
from llamastate.log.jsonl import export_lines, import_jsonl
from llamastate.log.sessionlog import SessionLog
from llamastate.log.store import LogStore

__all__ = ["CASES", "check"]


def check(make_store: Callable[[], LogStore]) -> None:
    """Run every case on a store of its own.

    Parameters
    ----------
    make_store : callable
        Makes a store with nothing in it; each is closed after use.

    Raises
    ------
    AssertionError
        A case does not hold.
    """
    for case in CASES:
        store = make_store()
        try:
            case(store)
        finally:
            store.close()


def is_a_store(store: LogStore) -> None:
    """It has the methods."""
    assert isinstance(store, LogStore), f"{type(store).__name__} lacks methods of LogStore"
    assert list(store.sessions()) == [], "a case needs a store with nothing in it"


def gives_back_what_it_took(store: LogStore) -> None:
    """Entries come back byte for byte, in order, whole or in part."""
    entries = _session(store, "a", 10)
    assert list(store.read("a")) == entries
    assert list(store.read("a", 3, 7)) == entries[3:7]
    assert list(store.read("a", 8)) == entries[8:]
    assert list(store.read("a", 10)) == []
    assert list(store.read("a", 5, 5)) == []
    assert list(store.read("a", 4, 1000)) == entries[4:]
    assert tuple(store.head("a")) == (10, entries[-1].hash)
    for stored in entries:
        assert store.find("a", stored.hash) == stored.index
    assert store.find("a", "00" * 32) is None
    assert store.find("a", "no hash") is None
    assert store.find("a", entries[1].hash.upper()) is None
    assert list(store.read("a", -5, 2)) == entries[:2]
    assert list(store.read("a", 0, -1)) == []


def keeps_sessions_apart(store: LogStore) -> None:
    """What is appended to one is not seen in another."""
    logs = {name: _session(store, name, 1) for name in ("a", "b", "c")}
    for turn in range(5):
        for name, entries in logs.items():
            more = _next(entries, TurnEnd(turn, ts=len(name)))
            store.append(name, more)
            entries += more
    for name, entries in logs.items():
        assert list(store.read(name)) == entries


def refuses_a_second_of_one_id(store: LogStore) -> None:
    """A session that exists is left alone."""
    entries = _session(store, "a", 3)
    _refuses(SessionExistsError, lambda: store.create("a", _start(other=True)))
    assert list(store.read("a")) == entries


def refuses_bad_names(store: LogStore) -> None:
    """Ids are names."""
    for name in ("", "a/b", "a\nb", "x" * 200, 'say "no"'):
        _refuses(SessionNameError, partial(store.create, name, _start()))
    assert list(store.sessions()) == []


def refuses_what_is_no_beginning(store: LogStore) -> None:
    """A session begins with its start."""
    _refuses(InvalidArgumentError, lambda: store.create("a", []))
    _refuses(InvalidArgumentError, lambda: store.create("a", chain([TurnEnd(1)])))
    _refuses(InvalidArgumentError, lambda: store.create("a", chain([TurnEnd(1)], index=1, prev_hash="00" * 32)))
    assert list(store.sessions()) == []


def compares_and_appends(store: LogStore) -> None:
    """Of two that extend one head the second is refused, and told the head."""
    entries = _session(store, "a", 3)
    first, second = _next(entries, TurnEnd(1, ts=1)), _next(entries, TurnEnd(2, ts=1))
    store.append("a", first)
    error = _refuses(HeadMovedError, lambda: store.append("a", second))
    assert (error.expected, error.found) == (entries[-1].hash, first[0].hash)
    for prev in (None, "no hash", "00" * 32):
        _refuses(HeadMovedError, partial(store.append, "a", [StoredEntry(4, "11" * 32, prev, second[0].data)]))
    assert list(store.read("a")) == entries + first


def appends_all_or_none(store: LogStore) -> None:
    """Several entries are one step; an empty list is none."""
    entries = _session(store, "a", 2)
    more = chain([TurnEnd(n, ts=n) for n in range(100)], index=2, prev_hash=entries[-1].hash)
    store.append("a", [])
    store.append("a", more)
    assert list(store.read("a")) == entries + more
    wrong = chain([TurnEnd(1)], index=102, prev_hash=more[-1].hash) + more[:1]
    _refuses(LogTamperedError, lambda: store.append("a", wrong))
    assert store.head("a").n_entries == 102


def refuses_what_would_not_hold(store: LogStore) -> None:
    """A store takes nothing in that it could never verify."""
    entries = _session(store, "a", 2)
    (good,) = _next(entries, TurnEnd(7, ts=1))
    for bad in (
        StoredEntry(good.index, "11" * 32, good.prev_hash, good.data),
        StoredEntry(good.index, good.hash, good.prev_hash, good.data.replace(b"7", b"8")),
        StoredEntry(good.index + 1, good.hash, good.prev_hash, good.data),
    ):
        _refuses(LogTamperedError, partial(store.append, "a", [bad]))
    for end in (b"\n", b"\r"):  # where it would be cut in two when it is exported
        (split,) = chain([good.data.replace(b",", b"," + end, 1)], index=2, prev_hash=good.prev_hash)
        _refuses(InvalidArgumentError, partial(store.append, "a", [split]))
    (start,) = _start()
    forged = StoredEntry(0, "11" * 32, None, start.data)
    _refuses(LogTamperedError, lambda: store.create("b", [forged]))
    assert list(store.read("a")) == entries
    assert [info.id for info in store.sessions()] == ["a"]


def knows_what_is_not_there(store: LogStore) -> None:
    """A session that does not exist is an error everywhere."""
    _session(store, "a", 1)
    for name in ("\ud800", "", "a/b", "A"):
        _refuses(SessionNotFoundError, partial(store.head, name))
    calls: tuple[Callable[[], Any], ...] = (
        lambda: store.head("b"),
        lambda: list(store.read("b")),
        lambda: store.find("b", "00" * 32),
        lambda: store.info("b"),
        lambda: store.append("b", _next(_start(), TurnEnd(1))),
        lambda: store.append("b", []),
        lambda: store.sessions(before="b"),
    )
    for call in calls:
        _refuses(SessionNotFoundError, call)


def lists_newest_first(store: LogStore) -> None:
    """In pages, whatever the ids are."""
    names = ["m", "z", "a", "k", "b"]
    for name in names:
        _session(store, name, 2)
    store.append("m", _next(list(store.read("m")), TurnEnd(9, ts=1234)))
    assert [info.id for info in store.sessions()] == names[::-1]
    assert [info.id for info in store.sessions(limit=2)] == ["b", "k"]
    assert [info.id for info in store.sessions(limit=2, before="k")] == ["a", "z"]
    assert [info.id for info in store.sessions(before="z")] == ["m"]
    assert list(store.sessions(limit=0)) == []
    _refuses(InvalidArgumentError, lambda: store.sessions(limit=-1))
    info = store.info("m")
    assert info == store.sessions()[-1]
    assert (info.n_entries, info.head_hash, info.updated) == (3, store.head("m").hash, 1234)
    assert (info.relation, info.origin) == (None, None)


def tells_lineage(store: LogStore) -> None:
    """Where a session comes from is told without reading its log."""
    origin = SessionOrigin("elsewhere", "ab" * 32)
    store.create("f", chain([SessionStart(forked_from=origin, ts=5)]))
    store.create("c", chain([SessionStart(compacted_from=origin, ts=6)]))
    assert (store.info("f").relation, store.info("f").origin) == ("fork", origin)
    assert (store.info("c").relation, store.info("c").origin) == ("compact", origin)
    assert (store.info("c").created, store.info("c").updated) == (6, 6)


def takes_transactions_back(store: LogStore) -> None:
    """A block that fails leaves nothing, one that ends leaves all; one within another can fail alone."""
    entries = _session(store, "a", 2)
    try:
        with store.transaction():
            store.append("a", _next(entries, TurnEnd(1)))
            with store.transaction():
                store.create("b", _start())
            store.append("b", _next(_start(), TurnEnd(1)))
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert list(store.read("a")) == entries
    assert [info.id for info in store.sessions()] == ["a"]
    with store.transaction():
        more = _next(entries, TurnEnd(1))
        store.append("a", more)
        _refuses(HeadMovedError, lambda: store.append("a", more))
        store.create("b", _start())
        try:
            with store.transaction():
                store.create("c", _start())
                store.append("a", _next(entries + more, TurnEnd(2)))
                store.append("b", _next(_start(), TurnEnd(2)))
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert list(store.read("a")) == entries + more, "the inner block was not taken back"
        with store.transaction():
            more += _next(entries + more, TurnEnd(3))
            store.append("a", more[-1:])
    assert list(store.read("a")) == entries + more
    assert [info.id for info in store.sessions()] == ["b", "a"]
    try:
        with store.transaction():
            with store.transaction():
                store.append("a", _next(entries + more, TurnEnd(4)))
                store.create("d", _start())
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert list(store.read("a")) == entries + more, "the outer block was not taken back"
    assert [info.id for info in store.sessions()] == ["b", "a"]


def keeps_what_it_does_not_know(store: LogStore) -> None:
    """Kinds and fields of a newer version go through it, also through export and import."""
    raw = b'{"from":"a newer version","kind":"turn_end","ts":3,"turn_count":1}'
    start = chain([SessionStart(ts=1), UnknownEntry({"kind": "dream", "ts": 2, "of": [None, 1.5, "\u2028"]}), raw])
    store.create("a", start)
    assert list(store.read("a")) == start
    lines = list(export_lines(store))
    renamed = [line.replace(b'{"session":"a"', b'{"session":"b"', 1) for line in lines]
    assert import_jsonl(store, renamed).sessions == {"b": 3}
    assert list(store.read("b")) == start


def holds_under_threads(store: LogStore) -> None:
    """Threads that append to one session: none lost, none doubled."""
    _session(store, "a", 1)
    n_threads, each = 4, 25
    failures: list[BaseException] = []

    def write(name: int) -> None:
        try:
            log = SessionLog.open(store, "a")
            for i in range(each):
                while True:
                    try:
                        log.save_delta([user(f"{name}-{i}")])
                        break
                    except HeadMovedError:
                        log.refresh()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    log = SessionLog.open(store, "a")
    assert log.verify() == 1 + n_threads * each
    said = [item["content"] for item in log.restore().history]
    assert sorted(said) == sorted(f"{t}-{i}" for t in range(n_threads) for i in range(each))
    for t in range(n_threads):
        mine = [text for text in said if text.startswith(f"{t}-")]
        assert mine == [f"{t}-{i}" for i in range(each)], "the entries of one thread changed places"


def closes(store: LogStore) -> None:
    """A store that is closed says so, and can be closed again."""
    _session(store, "a", 1)
    store.close()
    store.close()
    _refuses(ClosedError, lambda: store.head("a"))
    _refuses(ClosedError, lambda: store.create("b", _start()))
    _refuses(ClosedError, store.sessions)


#: Everything that is checked, in an order in which the first that fails says most.
CASES: tuple[Callable[[LogStore], None], ...] = (
    is_a_store,
    gives_back_what_it_took,
    keeps_sessions_apart,
    refuses_a_second_of_one_id,
    refuses_bad_names,
    refuses_what_is_no_beginning,
    compares_and_appends,
    appends_all_or_none,
    refuses_what_would_not_hold,
    knows_what_is_not_there,
    lists_newest_first,
    tells_lineage,
    takes_transactions_back,
    keeps_what_it_does_not_know,
    holds_under_threads,
    closes,
)


def _start(*, other: bool = False) -> list[StoredEntry]:
    return chain([SessionStart(ts=2 if other else 1)])


def _session(store: LogStore, name: str, n: int) -> list[StoredEntry]:
    entries = chain([SessionStart(ts=1), *(TurnEnd(i, ts=i) for i in range(1, n))])
    store.create(name, entries[:1])
    if n > 1:
        store.append(name, entries[1:])
    return entries


def _next(entries: list[StoredEntry], entry: TurnEnd) -> list[StoredEntry]:
    return chain([entry], index=len(entries), prev_hash=entries[-1].hash)


def _refuses(error: type[LlamaStateError], call: Callable[[], Any]) -> Any:
    try:
        call()
    except error as caught:
        return caught
    raise AssertionError(f"nothing raised {error.__name__}")
