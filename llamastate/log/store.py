"""What a store of logs has to do, and what all of them share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import msgspec

from llamastate.arrays import as_index
from llamastate.errors import InvalidArgumentError, SessionExistsError, SessionNotFoundError
from llamastate.log.chaining import StoredEntry, tampered
from llamastate.log.entries import SessionOrigin, SessionStart

__all__ = ["Head", "LogInfo", "LogStore", "read_all"]

#: Entries that are read at once.
CHUNK = 4096


class Head(NamedTuple):
    """Where a log ends.

    Attributes
    ----------
    n_entries : int
    hash : str
        Of the last entry.
    """

    n_entries: int
    hash: str


class LogInfo(msgspec.Struct, frozen=True):
    """What a store tells of a session without reading its log.

    Attributes
    ----------
    id : str
    n_entries : int
    head_hash : str
    created, updated : int
        Time of the first and of the last entry, in milliseconds since the epoch.
    relation : {"fork", "compact"} or None
        How it comes from another session.
    origin : SessionOrigin or None
        From which, and from where in it.
    """

    id: str
    n_entries: int
    head_hash: str
    created: int
    updated: int
    relation: str | None = None
    origin: SessionOrigin | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return fields


@runtime_checkable
class LogStore(Protocol):
    """Where logs are. :mod:`llamastate.log.conformance` tells whether an implementation is one.

    A store takes entries that are chained already and gives them back byte for byte; it never needs to understand more
    than the first. All calls may come from any thread.
    """

    def create(self, session_id: str, entries: Sequence[StoredEntry]) -> None:
        """Add a session with its first entries (at least one), all or none.

        Raises
        ------
        SessionExistsError
            There is one of that id; nothing has changed.
        """
        ...

    def append(self, session_id: str, entries: Sequence[StoredEntry]) -> None:
        """Add entries to a session, all or none, if its last entry is still the one before the first of them.

        Comparing and appending are one step that no other thread or process gets in between.

        Raises
        ------
        HeadMovedError
            It is not. ``expected`` and ``found`` are hashes; nothing has changed.
        SessionNotFoundError
        """
        ...

    def head(self, session_id: str) -> Head:
        """Where a log ends, as the store has it on record.

        Raises
        ------
        SessionNotFoundError
        """
        ...

    def read(self, session_id: str, start: int = 0, stop: int | None = None) -> Sequence[StoredEntry]:
        """The entries whose index is in ``[start, stop)``, in order, as they lie there: nothing is verified.

        ``prev_hash`` is the hash of the entry before, as that lies there.

        Raises
        ------
        SessionNotFoundError
        """
        ...

    def find(self, session_id: str, entry_hash: str) -> int | None:
        """The index of the entry with that hash, or None.

        Raises
        ------
        SessionNotFoundError
        """
        ...

    def sessions(self, *, limit: int | None = None, before: str | None = None) -> Sequence[LogInfo]:
        """Sessions, the one that was added last first.

        Parameters
        ----------
        limit : int, optional
            At most so many, 0 or more.
        before : str, optional
            Only those that were added before this one: the id of the last of a page gives the next.

        Raises
        ------
        SessionNotFoundError
            There is no session ``before``.
        """
        ...

    def info(self, session_id: str) -> LogInfo:
        """What is known of one session.

        Raises
        ------
        SessionNotFoundError
        """
        ...

    def transaction(self) -> contextlib.AbstractContextManager[None]:
        """What this thread creates and appends inside the block is there at its end: all of it, or nothing.

        It counts as recorded when the outermost block has been left. A block within another can fail alone: what was
        done in it is taken back, and the other goes on. Until the end other threads wait, and so does whoever else
        writes to the store.
        """
        ...

    def close(self) -> None:
        """Give everything back. Idempotent; every other call fails from then on."""
        ...


def read_all(store: LogStore, session_id: str, *, stop: int | None = None) -> Iterator[StoredEntry]:
    """All entries of a session (or those before ``stop``), a few thousand at a time."""
    end = store.head(session_id).n_entries if stop is None else stop
    start = 0
    while start < end:
        entries = store.read(session_id, start, min(end, start + CHUNK))
        yield from entries
        start += CHUNK
        if not entries:
            break
    if stop is None:  # what came meanwhile, or lies there and should not
        yield from store.read(session_id, min(start, end), None)


def first_facts(entries: Sequence[StoredEntry]) -> tuple[str | None, SessionOrigin | None]:
    """How a session comes from another, as its first entry says: ``relation`` and ``origin`` of :class:`LogInfo`.

    Raises
    ------
    InvalidArgumentError
        There is no first entry, or it is not the start of a session.
    """
    if not entries or entries[0].index:
        raise InvalidArgumentError("a session begins with its first entry", name="entries", limit="index 0")
    start = entries[0].entry
    if not isinstance(start, SessionStart):
        raise InvalidArgumentError(
            f"a session begins with a session_start, not a {start.kind}", name="entries", value=start.kind
        )
    if start.forked_from is not None:
        return "fork", start.forked_from
    return ("compact", start.compacted_from) if start.compacted_from is not None else (None, None)


class _Time(msgspec.Struct):
    ts: Any = 0


_time_decoder = msgspec.json.Decoder(_Time)


def time_of(stored: StoredEntry) -> int:
    """The time of an entry in milliseconds, within what an integer of 64 bits holds."""
    try:
        ts = _time_decoder.decode(stored.data).ts
    except (ValueError, RecursionError) as error:
        raise tampered(stored.index, f"entry {stored.index} cannot be read: {error}") from None
    return max(-(2**63), min(2**63 - 1, ts)) if isinstance(ts, int) else 0


def check_limit(limit: object) -> int | None:
    """A number of sessions, or None for all."""
    if limit is None:
        return None
    number = as_index(limit, "limit", InvalidArgumentError)
    if number < 0:
        raise InvalidArgumentError(f"limit = {number} is negative", name="limit", value=number, limit=0)
    return min(number, 2**62)


def not_found(session_id: object) -> SessionNotFoundError:
    """The error for an id that is not there."""
    return SessionNotFoundError(f"no session {session_id!r:.120} in this store", name=str(session_id))


def exists(session_id: str) -> SessionExistsError:
    """The error for an id that is there already."""
    return SessionExistsError(
        f"there is a session {session_id!r} in this store already", name=session_id, reason="it exists"
    )
