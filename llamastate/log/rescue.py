"""What can still be read of a damaged database.

SQLite finds a row through the pages above it, and reads nothing below one that is lost. Here every page is looked at
for itself: rows tell what they are by their form, their places tell their order, and the chain tells which are true.
So nothing is lost but what was on the pages that were hit. The format is that of https://sqlite.org/fileformat.html.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from llamastate.errors import BadMagicError
from llamastate.log.chaining import HASH_BYTES, StoredEntry
from llamastate.log.jsonl import line_of
from llamastate.log.sqlite import ROOM, check_header
from llamastate.statefiles import reading

__all__ = ["salvage"]

_TABLE_LEAF = 0x0D
_WAL_MAGIC = (0x377F0682, 0x377F0683)
#: Serial type of a hash in a record: a blob of 32 bytes.
_HASH = 12 + 2 * HASH_BYTES
#: Rows that may claim one page beyond their own.
_MAX_ROWS = 8
_ENTRY_COLUMNS, _SESSION_COLUMNS = 3, 9
#: Integers of a record by serial type: 8 and 9 are the numbers 0 and 1 without bytes.
_INTEGERS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8, 8: 0, 9: 0}


def salvage(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Give every readable entry of a damaged store as a line of JSON Lines, good ones and others.

    Parameters
    ----------
    path : path-like
        Is only read, the ``-wal`` beside it too. Nobody should be writing to it.

    Yields
    ------
    bytes
        As :func:`llamastate.log.export_lines`; sessions in the order in which they were added, those whose name is lost
        as "salvaged-N". ``import_jsonl(..., partial=True)`` takes of each session what holds from its beginning on. An
        entry behind one that is lost is given too, with a ``prev_hash`` of null; one that was changed is given as it
        lies there, and will not hold.

    Raises
    ------
    FileAccessError, StateFileNotFoundError
        It cannot be read.
    VersionMismatchError
        A newer version of this package has made it.
    BadMagicError
        It is something else, and nothing in it looks like an entry.

    Notes
    -----
    Reads the file once, and each entry once more; keeps some hundred bytes an entry.
    """
    with reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        data: Any = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""
    name, whole = os.fsdecode(path), True
    try:
        check_header(name)
    except BadMagicError:
        whole = False  # also what a lost first page looks like
    pages = _Pages(data, _wal(os.path.realpath(name)))
    names: dict[int, str] = {}
    places: dict[int, tuple[int, int]] = {}
    for number in pages:
        for offset in pages.cells(number):
            row = pages.row(number, offset)
            if row is None:
                continue
            if isinstance(row.value, str):
                names.setdefault(row.key, row.value)
            else:
                places.setdefault(row.key, (number, offset))
    if not places and not whole:
        raise BadMagicError(f"{name!r} is no store of logs", path=name, reason="nothing in it is an entry")
    last: tuple[int, StoredEntry] | None = None
    pages.again()
    for place in sorted(places):
        row = pages.row(*places[place])
        if row is None or isinstance(row.value, str):
            continue  # only if the file has changed meanwhile
        session, index = divmod(place, ROOM)
        follows = last is not None and last[0] == session and last[1].index == index - 1
        stored = StoredEntry(index, row.value[0].hex(), last[1].hash if last and follows else None, row.value[1])
        last = session, stored
        yield line_of(names.get(session, f"salvaged-{session}"), stored)


class _Row(NamedTuple):
    """An entry (hash and bytes), or a session (its id)."""

    key: int
    value: tuple[bytes, bytes] | str


class _Pages:
    """The pages of a database, the newest version of each."""

    def __init__(self, data: Any, newer: dict[int, bytes]) -> None:
        self._data, self._newer = data, newer
        self._size, reserved = 4096, 0
        head = newer.get(1, bytes(data[:100]))
        if head.startswith(b"SQLite format 3\0"):
            size = int.from_bytes(head[16:18], "big")
            size = 65536 if size == 1 else size
            if size in (1 << n for n in range(9, 17)):
                self._size, reserved = size, min(head[20], size - 480)
        self._usable = self._size - reserved
        self._n = max(-(-len(data) // self._size), max(newer, default=0))
        # How many rows a page has been read for: in a sound file one. In a file that was made to hurt, every row could
        # claim every page.
        self._rows_of = [0] * (self._n + 1)

    def __iter__(self) -> Iterator[int]:
        return iter(range(1, self._n + 1))

    def page(self, number: int) -> bytes:
        """A page's bytes; fewer where the file ends, none if there is no such page."""
        if number in self._newer:
            return self._newer[number]
        at = (number - 1) * self._size
        return bytes(self._data[at : at + self._size]) if number >= 1 else b""

    def cells(self, number: int) -> list[int]:
        """Where the rows of a page begin; none if it holds no rows."""
        page = self.page(number)
        at = 100 if number == 1 else 0
        if len(page) < at + 8 or page[at] != _TABLE_LEAF:
            return []
        n = int.from_bytes(page[at + 3 : at + 5], "big")
        pointers = page[at + 8 : at + 8 + 2 * n]
        found = struct.unpack(f">{len(pointers) // 2}H", pointers[: len(pointers) // 2 * 2])
        return [offset for offset in found if at + 8 + 2 * n <= offset < self._usable]

    def again(self) -> None:
        """Rows are about to be read a second time."""
        self._rows_of = [0] * (self._n + 1)

    def row(self, number: int, offset: int) -> _Row | None:
        """What begins there, if it is an entry or a session."""
        try:
            page = self.page(number)
            length, at = _varint(page, offset)
            key, at = _varint(page, at)
            return _parse(key, self._payload(page, at, length))
        except (IndexError, ValueError):
            return None

    def _payload(self, page: bytes, at: int, length: int) -> bytes:
        """The bytes of a row, those on other pages too (section 1.6 of the format)."""
        limit, least = self._usable - 35, (self._usable - 12) * 32 // 255 - 23
        if not 0 < length <= self._n * self._size:
            raise ValueError("longer than the file")
        local = length
        if length > limit:
            local = least + (length - least) % (self._usable - 4)
            local = least if local > limit else local
        if at + local > len(page):
            raise IndexError(at)
        parts, left = [page[at : at + local]], length - local
        next_page = int.from_bytes(page[at + local : at + local + 4], "big") if left else 0
        while left > 0:
            self._rows_of[next_page] += 1  # an IndexError if there is no such page
            if self._rows_of[next_page] > _MAX_ROWS:
                raise ValueError("a page of too many rows")
            more = self.page(next_page)[: self._usable]
            piece = more[4 : 4 + left]
            if not piece:
                raise IndexError(next_page)
            parts.append(piece)
            left -= len(piece)
            next_page = int.from_bytes(more[:4], "big")
        return b"".join(parts)


def _parse(key: int, record: bytes) -> _Row | None:
    end, at = _varint(record, 0)
    types = []
    while at < end:
        kind, at = _varint(record, at)
        types.append(kind)
    if not types or types[0] or at != end:
        return None  # the first column is the key, which a record does not repeat
    if len(types) == _ENTRY_COLUMNS and types[1] == _HASH and key >= ROOM:
        data = record[end + HASH_BYTES :]
        if types[2] != 12 + 2 * len(data) or data[:1] != b"{" or data[-1:] != b"}" or b"\n" in data or b"\r" in data:
            return None  # not what this package writes, and it could not stand in a line
        return _Row(key, (record[end : end + HASH_BYTES], data))
    if len(types) == _SESSION_COLUMNS and types[1] % 2 and types[1] >= 13 and types[2] in _INTEGERS:
        text = record[end : end + (types[1] - 13) // 2].decode()
        return _Row(key, text) if text and not set(text) & set('"\\\n\r') else None
    return None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An integer of SQLite's variable length, and where it ends."""
    value = 0
    for i in range(8):
        byte = data[at + i]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + i + 1
    value = value << 8 | data[at + 8]
    return value - (1 << 64) if value >> 63 else value, at + 9


def _wal(path: str) -> dict[int, bytes]:
    """Pages that were committed and not brought home yet (section 4 of the format)."""
    try:
        with open(f"{path}-wal", "rb") as file:
            data = file.read()
    except OSError:
        return {}
    if len(data) < 32:
        return {}
    magic, _, size, _, *salt = struct.unpack(">6I", data[:24])
    if magic not in _WAL_MAGIC or size not in (1 << n for n in range(9, 17)):
        return {}
    committed: dict[int, bytes] = {}
    pending: dict[int, bytes] = {}
    for at in range(32, len(data) - 24 - size + 1, 24 + size):
        number, commit, *salts = struct.unpack(">4I", data[at : at + 16])
        if salts != salt:
            break  # left from an earlier round
        pending[number] = data[at + 24 : at + 24 + size]
        if commit:
            committed.update(pending)
            pending.clear()
    return committed
