"""What can still be read of a damaged database."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from typing import Any

from llamastate.log.chaining import StoredEntry
from llamastate.log.jsonl import line_of
from llamastate.log.sqlerrors import translated
from llamastate.log.sqlite import ROOM, SQLiteLogStore

__all__ = ["salvage"]

_MAX = 2**63 - 1
_FAILURES = (sqlite3.Error, OverflowError, UnicodeError)


def salvage(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Give every readable entry of a damaged store as a line of JSON Lines, good ones and others.

    Parameters
    ----------
    path : path-like
        Is only read.

    Yields
    ------
    bytes
        As :func:`llamastate.log.export_lines`; sessions in the order in which they were added. ``import_jsonl(...,
        partial=True)`` takes of each session what holds from its beginning on. An entry behind one that is lost is
        given too, with a ``prev_hash`` of null; one whose bytes or hash were changed is given as it lies there, and
        will not hold.

    Raises
    ------
    LlamaStateError
        Not even the list of tables can be read, or the file is something else, or newer.

    Notes
    -----
    A page of the database that is lost costs the entries in it, one of its inner pages all below; a few dozen lookups
    find where to go on.
    """
    with SQLiteLogStore(path, read_only=True) as store:
        with translated(store.path):
            connection = store._db()
            names = {row[0]: row[1] for row in _rows(connection, "sessions", "n", "id") if _is_name(row)}
        last: tuple[int, StoredEntry] | None = None
        for place, found, data in _rows(connection, "entries", "place", "hash, data"):
            if not (isinstance(found, bytes) and isinstance(data, bytes) and len(found) == 32 and place >= ROOM):
                continue
            session, index = divmod(place, ROOM)
            prev = last[1].hash if last is not None and last[0] == session and last[1].index == index - 1 else None
            stored = StoredEntry(index, found.hex(), prev, data)
            last = session, stored
            if b"\n" in data or b"\r" in data:
                continue  # no entry of ours, and it would be no line
            yield line_of(names.get(session, f"salvaged-{session}"), stored)


def _is_name(row: Any) -> bool:
    return isinstance(row[1], str) and not set(row[1]) & set('"\\\n\r')


def _rows(connection: sqlite3.Connection, table: str, key: str, columns: str) -> Iterator[Any]:
    """Every row of a table that can be reached, in order of its key."""
    statement = f"SELECT {key}, {columns} FROM {table} WHERE {key} >= ? ORDER BY {key}"
    at: int | None = 0
    while at is not None:
        for row in _until_failure(connection, statement, at):
            if row is None:
                at = _next_readable(connection, table, key, at)
                break
            at = row[0] + 1
            yield row
        else:
            return


def _until_failure(connection: sqlite3.Connection, statement: str, at: int) -> Iterator[Any]:
    """Rows from a key on; None where they cannot be read any more."""
    try:
        yield from connection.execute(statement, (at,))
    except _FAILURES:
        yield None


def _next_readable(connection: sqlite3.Connection, table: str, key: str, at: int) -> int | None:
    """Where to go on behind rows that are lost: steps that double lead out of them, halving finds their end."""

    def fails(place: int) -> bool:
        try:
            connection.execute(f"SELECT * FROM {table} WHERE {key} >= ? ORDER BY {key} LIMIT 1", (place,)).fetchone()
        except _FAILURES:
            return True
        return False

    step = 1
    while at + step <= _MAX and fails(at + step):
        step *= 2
    if at + step > _MAX:
        return None
    bad, good = at + step // 2, at + step
    while good - bad > 1:
        middle = (bad + good) // 2
        bad, good = (middle, good) if fails(middle) else (bad, middle)
    return good
