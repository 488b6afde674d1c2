"""Which entries are on disk: what can be asked without opening a file.

An entry is never let go before what stands on it: whatever is used, its ancestors count as used at the same time
(:meth:`Index.touch`), and of two that were used at the same time the later in the chain goes first.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamastate.prefix.chain import KEY_BYTES
from llamastate.prefix.database import Database
from llamastate.prefix.entry import Kind

__all__ = ["VERSION", "Index", "Root", "RootUse", "Row", "Totals"]

VERSION = 2

# Rows stand in the order in which they came, and their keys in an index of their own: the lookup of a prefix reads
# that index only. Totals are kept by triggers: nothing ever adds a million rows up.
SCHEMA = """
CREATE TABLE roots (
    id INTEGER PRIMARY KEY, root BLOB NOT NULL UNIQUE, kind TEXT NOT NULL DEFAULT '',
    fingerprint TEXT NOT NULL DEFAULT '', block_tokens INTEGER NOT NULL DEFAULT 0, created INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE entries (
    id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, parent BLOB NOT NULL, root INTEGER NOT NULL,
    kind INTEGER NOT NULL, start INTEGER NOT NULL, tail INTEGER NOT NULL, nbytes INTEGER NOT NULL,
    used INTEGER NOT NULL, pinned INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX by_use ON entries (used, start DESC) WHERE pinned = 0;
CREATE INDEX anchors_by_use ON entries (used, start DESC) WHERE pinned = 0 AND kind = 2;
CREATE INDEX anchors ON entries (parent, tail) WHERE kind = 2;
CREATE TABLE pins (id INTEGER PRIMARY KEY, name BLOB NOT NULL, tokens INTEGER NOT NULL);
CREATE INDEX pins_by_name ON pins (name);
CREATE TABLE pinned (pin INTEGER NOT NULL, key BLOB NOT NULL);
CREATE INDEX pinned_by_pin ON pinned (pin);
CREATE INDEX pinned_by_key ON pinned (key);
CREATE TABLE totals (blocks INTEGER, anchors INTEGER, bytes INTEGER, anchor_bytes INTEGER, pinned_bytes INTEGER);
INSERT INTO totals VALUES (0, 0, 0, 0, 0);
CREATE TRIGGER added AFTER INSERT ON entries BEGIN
    UPDATE totals SET
        blocks = blocks + (NEW.kind <> 2), anchors = anchors + (NEW.kind = 2), bytes = bytes + NEW.nbytes,
        anchor_bytes = anchor_bytes + (NEW.kind = 2) * NEW.nbytes,
        pinned_bytes = pinned_bytes + (NEW.pinned > 0) * NEW.nbytes;
END;
CREATE TRIGGER removed AFTER DELETE ON entries BEGIN
    UPDATE totals SET
        blocks = blocks - (OLD.kind <> 2), anchors = anchors - (OLD.kind = 2), bytes = bytes - OLD.nbytes,
        anchor_bytes = anchor_bytes - (OLD.kind = 2) * OLD.nbytes,
        pinned_bytes = pinned_bytes - (OLD.pinned > 0) * OLD.nbytes;
END;
CREATE TRIGGER repinned AFTER UPDATE OF pinned ON entries WHEN (OLD.pinned > 0) <> (NEW.pinned > 0) BEGIN
    UPDATE totals SET pinned_bytes = pinned_bytes + ((NEW.pinned > 0) - (OLD.pinned > 0)) * NEW.nbytes;
END;
"""

#: Keys in one question; fewer are filled up, so that SQLite has to prepare few statements only.
SIZES = (1, 8, 64, 256)

_COLUMNS = "e.key, e.parent, r.root, e.kind, e.start, e.tail, e.nbytes, e.used, e.pinned"
_ROWS = f"SELECT {_COLUMNS} FROM entries e JOIN roots r ON r.id = e.root"

_USE = """
SELECT
    r.root, r.fingerprint, r.block_tokens, r.kind, r.created,
    coalesce(sum(e.kind <> 2), 0), coalesce(sum(e.kind = 2), 0), coalesce(sum(e.nbytes), 0),
    coalesce(sum((e.kind = 2) * e.nbytes), 0), coalesce(sum((e.pinned > 0) * e.nbytes), 0),
    coalesce(sum((e.kind <> 2) * e.tail), 0), coalesce(max(e.start + e.tail), 0), min(e.used), max(e.used)
FROM roots r LEFT JOIN entries e ON e.root = r.id GROUP BY r.id ORDER BY r.id
"""

# From one tail straight to the next, however many anchors have it.
_TAILS = """
WITH RECURSIVE t(tail) AS (
    SELECT max(tail) FROM entries WHERE parent = ?1 AND kind = 2
    UNION ALL
    SELECT (SELECT max(tail) FROM entries WHERE parent = ?1 AND kind = 2 AND tail < t.tail) FROM t
    WHERE t.tail IS NOT NULL
) SELECT tail FROM t WHERE tail IS NOT NULL
"""

_NEWEST = "SELECT used FROM entries WHERE pinned = 0 ORDER BY used DESC LIMIT 1"

_ANCESTORS = """
WITH RECURSIVE up(key) AS (SELECT ?1 UNION SELECT e.parent FROM up JOIN entries e ON e.key = up.key)
SELECT key FROM up
"""


@dataclass(frozen=True)
class Row:
    """What the index knows of an entry.

    Attributes
    ----------
    key, parent, root : bytes
    kind : Kind
    start, tail : int
        It holds the tokens ``[start, start + tail)``.
    nbytes : int
        Of its file.
    used : int
        When it was last of use, in microseconds since 1970.
    pinned : int
        How often.
    """

    key: bytes
    parent: bytes
    root: bytes
    kind: Kind
    start: int
    tail: int
    nbytes: int
    used: int
    pinned: int = 0


@dataclass(frozen=True)
class Root:
    """Where the chains of one model, with one size of blocks, begin.

    Attributes
    ----------
    root : bytes
    fingerprint : str
        JSON; empty, like ``kind``, if nobody has said.
    block_tokens : int
    kind : str
        Of memory.
    created : int
        Microseconds since 1970.
    """

    root: bytes
    fingerprint: str = ""
    block_tokens: int = 0
    kind: str = ""
    created: int = 0


@dataclass(frozen=True)
class Totals:
    """What all entries come to."""

    blocks: int
    anchors: int
    bytes: int
    anchor_bytes: int
    pinned_bytes: int


@dataclass(frozen=True)
class RootUse:
    """What there is of one root.

    Attributes
    ----------
    root : Root
    totals : Totals
    tokens : int
        Tokens of all blocks: what is shared counts once.
    longest : int
        Tokens of the longest prefix, from the first on.
    first_used, last_used : int or None
        When the entry that was of no use for longest, and the one used last, were of use; microseconds since 1970.
    """

    root: Root
    totals: Totals
    tokens: int
    longest: int
    first_used: int | None
    last_used: int | None


class Index:
    """The table of entries.

    Parameters
    ----------
    path : str
    scan : callable
        ``scan()`` gives the roots and the rows that are to be in a new index.
    durable, readonly : bool
        As for :class:`~llamastate.prefix.database.Database`.

    Raises
    ------
    VersionMismatchError
        The file is of a newer version; it is left as it is.
    StoreLockedError
        Of every method that writes.
    """

    def __init__(
        self,
        path: str,
        scan: Callable[[], tuple[Iterable[Root], Iterable[Row]]],
        *,
        durable: bool = False,
        readonly: bool = False,
    ) -> None:
        def fill(connection: sqlite3.Connection) -> int:
            roots, rows = scan()
            for root in roots:
                _add_root(connection, root)
            return insert(connection, rows)

        self.database = Database(path, schema=SCHEMA, version=VERSION, fill=fill, durable=durable, readonly=readonly)

    # --- looking ------------------------------------------------------------------------------------------------------

    def known(self, keys: Sequence[bytes]) -> set[bytes]:
        """Which of these are there. About 3 µs a key among a million."""
        if not keys:
            return set()
        return self.database.read(lambda c: _known(c, keys))

    def find(self, key: bytes) -> Row | None:
        """The row of a key."""
        found = self.database.read(lambda c: c.execute(f"{_ROWS} WHERE e.key = ?", (key,)).fetchone())
        return None if found is None else _row(found)

    def tails(self, parent: bytes) -> list[int]:
        """Lengths of the anchors after ``parent``, descending, each once. Cost: by lengths, not by anchors."""
        return self.database.read(lambda c: [tail for (tail,) in c.execute(_TAILS, (parent,))])

    def totals(self) -> Totals:
        """What all entries come to; a look at one row."""
        return self.database.read(_totals)

    def newest(self) -> int:
        """When an entry was last of use, of those that may go; 0 if there is none."""
        found = self.database.read(lambda c: c.execute(_NEWEST).fetchone())
        return 0 if found is None else int(found[0])

    def rows(self, root: bytes | None = None, *, batch: int = 512) -> Iterator[Row]:
        """All rows, in the order in which they came. What is added or removed meanwhile may or may not be seen."""
        where = "" if root is None else " AND r.root = ?3"
        query = _ROWS.replace("SELECT ", "SELECT e.id, ") + f" WHERE e.id > ?1{where} ORDER BY e.id LIMIT ?2"
        last = -1
        while True:
            values = (last, batch) if root is None else (last, batch, root)
            found = self.database.read(functools.partial(_fetch, query, values))
            for one in found:
                yield _row(one[1:])
            if len(found) < batch:
                return
            last = found[-1][0]

    def sizes(self, first: int) -> dict[bytes, int]:
        """Key and bytes of the file of all entries whose key begins with this byte."""
        query = "SELECT key, nbytes FROM entries WHERE key >= ? AND key < ?"
        low = bytes([first])
        high = bytes([first + 1]) if first < 255 else b"\xff" * (KEY_BYTES + 1)
        return dict(self.database.read(functools.partial(_fetch, query, (low, high))))

    def roots(self) -> list[Root]:
        """All roots, oldest first."""
        query = "SELECT root, fingerprint, block_tokens, kind, created FROM roots ORDER BY id"
        return [Root(*row) for row in self.database.read(lambda c: c.execute(query).fetchall())]

    def use(self) -> list[RootUse]:
        """What there is of each root, oldest first. Looks at every row: about half a second for a million."""
        found = self.database.read(lambda c: c.execute(_USE).fetchall())
        return [RootUse(Root(*row[:5]), Totals(*row[5:10]), *row[10:]) for row in found]

    # --- changing -----------------------------------------------------------------------------------------------------

    def add_root(self, root: Root) -> None:
        """Keep what is known of a root."""
        self.database.write(lambda c: _add_root(c, root))

    def add(self, row: Row, check: Callable[[], None]) -> bool:
        """Add a row; False if there is one of its key.

        ``check()`` runs in the same transaction: no other process adds or removes anything meanwhile.
        """

        def work(connection: sqlite3.Connection) -> bool:
            new = insert(connection, [row])
            check()
            return new == 1

        return self.database.write(work)

    def remove(self, keys: Iterable[bytes], check: Callable[[bytes], bool] = lambda _: True) -> list[tuple[bytes, int]]:
        """Remove the rows for which ``check(key)`` holds, asked in the transaction; key and bytes of each."""
        keys = list(keys)

        def work(connection: sqlite3.Connection) -> list[tuple[bytes, int]]:
            gone = []
            for key in keys:
                row = connection.execute("SELECT nbytes FROM entries WHERE key = ?", (key,)).fetchone()
                if row is not None and check(key):
                    connection.execute("DELETE FROM entries WHERE key = ?", (key,))
                    gone.append((key, row[0]))
            return gone

        return self.database.write(work)

    def without_row(self, keys: Iterable[bytes], work: Callable[[bytes], None]) -> None:
        """``work(key)`` for those that have no row, while nobody can add one."""
        keys = list(keys)

        def each(connection: sqlite3.Connection) -> None:
            for key in set(keys) - _known(connection, keys):
                work(key)

        self.database.write(each)

    def evict(
        self, n_bytes: int, *, anchor_share: float, spare: bytes | None = None, limit: int = 256
    ) -> list[tuple[bytes, int]]:
        """Remove rows that were not used for long, at most ``limit`` of them, and say which.

        Parameters
        ----------
        n_bytes : int
            So many bytes, or a little more.
        anchor_share : float
            While anchors take more than this part of all bytes, they go first.
        spare : bytes, optional
            Never this key, nor what it stands on.
        """

        def work(connection: sqlite3.Connection) -> list[tuple[bytes, int]]:
            keep = set() if spare is None else {key for (key,) in connection.execute(_ANCESTORS, (spare,))}
            victims = _victims(connection, n_bytes, anchor_share, keep, limit)
            connection.executemany("DELETE FROM entries WHERE id = ?", [(v[0],) for v in victims])
            return [(key, size) for _, key, size in victims]

        return self.database.write(work)

    def touch(self, stamps: Mapping[bytes, int], *, wait: bool = True) -> None:
        """Say when keys were last of use. What they stand on counts as used then too.

        Parameters
        ----------
        stamps : mapping of bytes to int
            Microseconds since 1970.
        wait : bool
            For others that write; :class:`StoreLockedError` at once if not.
        """
        # The latest first: the climbs of all others end where they meet one that came by before.
        order = sorted(stamps.items(), key=lambda item: -item[1])

        def work(connection: sqlite3.Connection) -> None:
            for key, stamp in order:
                _climb(connection, key, stamp)

        if order:
            self.database.write(work, wait=wait)

    def pin(self, name: bytes, n_tokens: int, keys: Sequence[bytes]) -> set[bytes]:
        """Keep these, under a name, until :meth:`unpin`; also those that are lost and come again.

        Returns
        -------
        set of bytes
            Those that are not there. Nothing is pinned if there are any.
        """

        def work(connection: sqlite3.Connection) -> set[bytes]:
            missing = set(keys) - _known(connection, keys)
            if not missing:
                _pin(connection, name, n_tokens, keys)
            return missing

        return self.database.write(work)

    def unpin(self, name: bytes) -> int:
        """Take back the shortest pin of a name; its tokens, or 0 if there is nothing of that name."""

        def work(connection: sqlite3.Connection) -> int:
            # whoever pinned more still needs it
            query = "SELECT id, tokens FROM pins WHERE name = ? ORDER BY tokens, id LIMIT 1"
            found = connection.execute(query, (name,)).fetchone()
            if found is None:
                return 0
            keys = connection.execute("SELECT key FROM pinned WHERE pin = ?", (found[0],)).fetchall()
            connection.executemany("UPDATE entries SET pinned = pinned - 1 WHERE key = ?", keys)
            connection.execute("DELETE FROM pinned WHERE pin = ?", (found[0],))
            connection.execute("DELETE FROM pins WHERE id = ?", (found[0],))
            return int(found[1])

        return self.database.write(work)

    def pins(self) -> list[tuple[bytes, int, list[bytes]]]:
        """Name, tokens and keys of every pin, the oldest first."""

        def work(connection: sqlite3.Connection) -> list[tuple[bytes, int, list[bytes]]]:
            query = "SELECT key FROM pinned WHERE pin = ?"
            return [
                (name, n, [key for (key,) in connection.execute(query, (number,))])
                for number, name, n in connection.execute("SELECT id, name, tokens FROM pins ORDER BY id").fetchall()
            ]

        return self.database.read(work)

    def add_pins(self, pins: Iterable[tuple[bytes, int, Sequence[bytes]]]) -> None:
        """Pin again what :meth:`pins` told, whether it is there or not."""

        def work(connection: sqlite3.Connection) -> None:
            for name, n_tokens, keys in pins:
                _pin(connection, name, n_tokens, keys)

        self.database.write(work)

    def close(self) -> None:
        """Idempotent."""
        self.database.close()


def insert(connection: sqlite3.Connection, rows: Iterable[Row]) -> int:
    """Add rows to the table, in a transaction of the caller's; how many were new."""
    roots: dict[bytes, int] = {}
    before = connection.total_changes

    def values() -> Iterator[tuple[object, ...]]:
        for r in rows:
            if r.root not in roots:
                roots[r.root] = _root_id(connection, r.root)
            yield (r.key, r.parent, roots[r.root], int(r.kind), r.start, r.tail, r.nbytes, r.used)

    # what was lost and comes again is pinned as it was
    query = "INSERT OR IGNORE INTO entries (key, parent, root, kind, start, tail, nbytes, used, pinned) VALUES "
    query += "(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, (SELECT count(*) FROM pinned WHERE key = ?1))"
    cursor = connection.executemany(query, values())
    return cursor.rowcount if cursor.rowcount >= 0 else connection.total_changes - before


def _pin(connection: sqlite3.Connection, name: bytes, n_tokens: int, keys: Iterable[bytes]) -> None:
    number = connection.execute("INSERT INTO pins (name, tokens) VALUES (?, ?)", (name, n_tokens)).lastrowid
    each = [(key,) for key in dict.fromkeys(keys)]
    connection.executemany("INSERT INTO pinned (pin, key) VALUES (?, ?)", [(number, key) for (key,) in each])
    connection.executemany("UPDATE entries SET pinned = pinned + 1 WHERE key = ?", each)


def _root_id(connection: sqlite3.Connection, root: bytes) -> int:
    connection.execute("INSERT OR IGNORE INTO roots (root) VALUES (?)", (root,))
    (number,) = connection.execute("SELECT id FROM roots WHERE root = ?", (root,)).fetchone()
    return int(number)


def _add_root(connection: sqlite3.Connection, root: Root) -> None:
    number = _root_id(connection, root.root)
    connection.execute(
        "UPDATE roots SET fingerprint = ?, block_tokens = ?, kind = ?, created = ? WHERE id = ?",
        (root.fingerprint, root.block_tokens, root.kind, root.created, number),
    )


@functools.cache
def _known_query(n: int) -> str:
    return f"SELECT key FROM entries WHERE key IN ({', '.join('?' * n)})"


def _known(connection: sqlite3.Connection, keys: Sequence[bytes]) -> set[bytes]:
    found: set[bytes] = set()
    for at in range(0, len(keys), SIZES[-1]):
        part = list(keys[at : at + SIZES[-1]])
        size = next(size for size in SIZES if size >= len(part))
        part += part[-1:] * (size - len(part))
        found.update(key for (key,) in connection.execute(_known_query(size), part))
    return found


def _fetch(query: str, values: tuple[object, ...], connection: sqlite3.Connection) -> list[tuple[Any, ...]]:
    return connection.execute(query, values).fetchall()


def _row(values: tuple[Any, ...]) -> Row:
    key, parent, root, kind, *rest = values
    return Row(key, parent, root, Kind(kind), *rest)


def _totals(connection: sqlite3.Connection) -> Totals:
    return Totals(*connection.execute("SELECT * FROM totals").fetchone())


def _climb(connection: sqlite3.Connection, key: bytes, stamp: int) -> None:
    """Set when a key, and what it stands on, was used, up to one that was used later."""
    while True:
        row = connection.execute("SELECT id, parent FROM entries WHERE key = ? AND used < ?", (key, stamp)).fetchone()
        if row is None:
            return
        connection.execute("UPDATE entries SET used = ? WHERE id = ?", (stamp, row[0]))
        key = row[1]


def _victims(
    connection: sqlite3.Connection, n_bytes: int, anchor_share: float, keep: set[bytes], limit: int
) -> list[tuple[int, bytes, int]]:
    """Id, key and bytes of rows to remove."""
    totals = _totals(connection)
    total, anchors = totals.bytes, totals.anchor_bytes
    query = "SELECT id, key, nbytes, kind FROM entries WHERE pinned = 0{} ORDER BY used, start DESC"
    lists = {
        True: iter(connection.execute(query.format(" AND kind = 2"))),
        False: iter(connection.execute(query.format(""))),
    }
    chosen: dict[int, tuple[int, bytes, int]] = {}
    freed = 0
    while freed < n_bytes and len(chosen) < limit:
        anchors_first = anchors > anchor_share * total
        row = next((r for r in lists[anchors_first] if r[0] not in chosen and r[1] not in keep), None)
        if row is None:
            if not anchors_first:
                break
            anchor_share = 1.0  # all that are left are pinned
            continue
        number, key, size, kind = row
        chosen[number] = number, key, size
        freed += size
        total -= size
        anchors -= size if kind == Kind.ANCHOR else 0
    return list(chosen.values())
