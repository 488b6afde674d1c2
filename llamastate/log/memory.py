"""A store in memory: for tests, and for what need not last."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from itertools import islice

from llamastate.errors import ClosedError, HeadMovedError
from llamastate.log.chaining import StoredEntry, require_chain
from llamastate.log.store import Head, LogInfo, check_limit, exists, first_facts, not_found, time_of
from llamastate.names import check_name

__all__ = ["MemoryLogStore"]


class MemoryLogStore:
    """Logs in this process's memory; a :class:`LogStore`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._logs: dict[str, list[StoredEntry]] = {}
        # lengths before the innermost transaction that is under way; 0 for what was not there
        self._before: dict[str, int] | None = None
        self._closed = False

    def create(self, session_id: str, entries: Sequence[StoredEntry]) -> None:
        """Add a session (:meth:`LogStore.create`)."""
        session_id = check_name(session_id)
        first_facts(entries)
        require_chain(entries, 0, None)
        with self._lock:
            self._check_open()
            if session_id in self._logs:
                raise exists(session_id)
            self._remember(session_id, 0)
            self._logs[session_id] = list(entries)

    def append(self, session_id: str, entries: Sequence[StoredEntry]) -> None:
        """Add entries (:meth:`LogStore.append`)."""
        with self._lock:
            log = self._log(session_id)
            if not entries:
                return
            if entries[0].prev_hash != log[-1].hash:
                raise moved(session_id, entries[0].prev_hash, log[-1].hash)
            require_chain(entries, len(log), log[-1].hash)
            self._remember(session_id, len(log))
            log += entries

    def head(self, session_id: str) -> Head:
        """Where a log ends (:meth:`LogStore.head`)."""
        with self._lock:
            log = self._log(session_id)
            return Head(len(log), log[-1].hash)

    def read(self, session_id: str, start: int = 0, stop: int | None = None) -> list[StoredEntry]:
        """Entries (:meth:`LogStore.read`)."""
        with self._lock:
            return self._log(session_id)[max(start, 0) : stop if stop is None else max(stop, 0)]

    def find(self, session_id: str, entry_hash: str) -> int | None:
        """Where an entry is (:meth:`LogStore.find`)."""
        with self._lock:
            return next((e.index for e in self._log(session_id) if e.hash == entry_hash), None)

    def sessions(self, *, limit: int | None = None, before: str | None = None) -> list[LogInfo]:
        """Sessions, newest first (:meth:`LogStore.sessions`)."""
        limit = check_limit(limit)
        with self._lock:
            self._check_open()
            ids = iter(reversed(self._logs))
            if before is not None:
                self._log(before)
                for name in ids:
                    if name == before:
                        break
            return [self.info(name) for name in islice(ids, limit)]

    def info(self, session_id: str) -> LogInfo:
        """What is known of a session (:meth:`LogStore.info`)."""
        with self._lock:
            log = self._log(session_id)
            relation, origin = first_facts(log[:1])
            return LogInfo(session_id, len(log), log[-1].hash, time_of(log[0]), time_of(log[-1]), relation, origin)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing (:meth:`LogStore.transaction`)."""
        with self._lock:
            self._check_open()
            outer, self._before = self._before, {}
            try:
                yield
            except BaseException:
                for name, n in self._before.items():
                    del self._logs[name][n:]
                    if not n:
                        del self._logs[name]
                raise
            else:
                if outer is not None:
                    for name, n in self._before.items():
                        outer.setdefault(name, n)
            finally:
                self._before = outer

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._logs.clear()
            self._closed = True

    def __enter__(self) -> MemoryLogStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<llamastate.log.MemoryLogStore {len(self._logs)} sessions>"

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the store is closed", what="store")

    def _log(self, session_id: str) -> list[StoredEntry]:
        self._check_open()
        try:
            return self._logs[session_id]
        except (KeyError, TypeError):
            raise not_found(session_id) from None

    def _remember(self, session_id: str, n: int) -> None:
        if self._before is not None:
            self._before.setdefault(session_id, n)


def moved(session_id: str, expected: str | None, found: str) -> HeadMovedError:
    """The error for an append that came too late."""
    return HeadMovedError(
        f"somebody else has appended to session {session_id!r}: its head is {found[:12]}, not {str(expected)[:12]}",
        expected=expected,
        found=found,
    )
