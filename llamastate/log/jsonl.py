"""Logs as JSON Lines: one stored entry a line, hashes and bytes intact (docs/log.md).

    {"session":"...","index":0,"hash":"...","prev_hash":null,"entry":{...}}

The entry is the last member and stands there byte for byte as it is hashed, so that also a program that cannot write
canonical JSON can cut it out of the line and recompute the chain.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import IO, NamedTuple

import msgspec

from llamastate.errors import CorruptStateError, InvalidArgumentError, LogTamperedError
from llamastate.log.chaining import StoredEntry, checked
from llamastate.log.entries import canonical
from llamastate.log.store import LogStore, read_all

__all__ = ["Imported", "export_jsonl", "export_lines", "import_jsonl", "parse_lines"]

#: Where the entry begins in a line. What is before it has no strings in it but the session's id, which can hold neither
#: quotation marks nor backslashes.
_LINE = re.compile(
    rb'\{"session":"([^"\\]+)","index":(0|[1-9][0-9]{0,18}),"hash":"([0-9a-f]{64})",'
    rb'"prev_hash":(?:null|"([0-9a-f]{64})"),"entry":(\{.*\})\}\r?\n?',
    re.DOTALL,
)
#: Entries that are appended at once.
_CHUNK = 4096


class Imported(NamedTuple):
    """What an import has done.

    Attributes
    ----------
    sessions : dict of str to int
        Entries of each session that were added.
    broken : dict of str to LogTamperedError
        Sessions of which only the beginning was, and why.
    """

    sessions: dict[str, int]
    broken: dict[str, LogTamperedError]


def line_of(session_id: str, stored: StoredEntry) -> bytes:
    """One line, its end included."""
    prev = "null" if stored.prev_hash is None else f'"{stored.prev_hash}"'
    name = canonical(session_id).decode()
    head = f'{{"session":{name},"index":{stored.index},"hash":"{stored.hash}","prev_hash":{prev},"entry":'
    return b"".join((head.encode(), stored.data, b"}\n"))


def export_lines(store: LogStore, sessions: Iterable[str] | None = None) -> Iterator[bytes]:
    """Sessions as lines.

    Parameters
    ----------
    store : LogStore
    sessions : iterable of str, optional
        Their ids, in the order wanted; all, the oldest first, if not given.

    Yields
    ------
    bytes
        One line, its end included.

    Raises
    ------
    LogTamperedError
        An entry does not hold: what was given until then is sound. :func:`llamastate.log.salvage` goes on.
    SessionNotFoundError
    """
    names = [info.id for info in reversed(store.sessions())] if sessions is None else list(sessions)
    for name in names:
        n, head = store.head(name)
        for stored in checked(read_all(store, name, stop=n), n_entries=n, head_hash=head):
            yield line_of(name, stored)


def export_jsonl(store: LogStore, file: IO[bytes], sessions: Iterable[str] | None = None) -> int:
    """Write sessions to a binary file; how many lines. See :func:`export_lines`."""
    n = 0
    for line in export_lines(store, sessions):
        file.write(line)
        n += 1
    return n


def parse_lines(lines: Iterable[bytes]) -> Iterator[tuple[str, StoredEntry]]:
    """Read lines without judging the chain. Empty ones are passed over.

    Raises
    ------
    CorruptStateError
        A line is none; ``offset`` is its number, from 1.
    """
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, bytes):
            raise InvalidArgumentError(
                f"lines are bytes, not {type(line).__name__}: open the file as binary", name="lines", value=line
            )
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        try:
            if match is None:
                raise ValueError("it is cut short, or not such a line")
            name, index, found, prev, data = match.groups()
            msgspec.json.decode(data)  # what is one object and no more
            stored = StoredEntry(int(index), found.decode(), None if prev is None else prev.decode(), data)
            session = name.decode()
        except (ValueError, RecursionError) as error:
            raise CorruptStateError(
                f"line {number} is no entry of a log: {error}", reason=str(error), offset=number, section="line"
            ) from None
        yield session, stored


def import_jsonl(store: LogStore, lines: Iterable[bytes], *, partial: bool = False) -> Imported:
    """Add sessions from lines, such as a file opened as binary has.

    Parameters
    ----------
    store : LogStore
    lines : iterable of bytes
        The entries of a session stand together, in order.
    partial : bool
        Of a session that does not hold take what does, and go on with the next.

    Returns
    -------
    Imported

    Raises
    ------
    CorruptStateError, LogTamperedError, SessionExistsError, SessionNameError
        Without ``partial`` nothing is added then.
    """
    done: dict[str, int] = {}
    broken: dict[str, LogTamperedError] = {}
    with store.transaction():
        for name, run in groupby(parse_lines(lines), lambda pair: pair[0]):
            done.setdefault(name, 0)
            for part, problem in _parts(checked(stored for _, stored in run)):
                if part:
                    add = store.append if done[name] else store.create
                    add(name, part)
                    done[name] += len(part)
                if problem is not None:
                    if not partial:
                        raise problem
                    broken[name] = problem
    return Imported(done, broken)


def _parts(entries: Iterator[StoredEntry]) -> Iterator[tuple[list[StoredEntry], LogTamperedError | None]]:
    """Pieces of a size to be appended; the last comes with what is wrong behind it."""
    part: list[StoredEntry] = []
    try:
        for stored in entries:
            part.append(stored)
            if len(part) == _CHUNK:
                yield part, None
                part = []
    except LogTamperedError as error:
        yield part, error
    else:
        yield part, None
