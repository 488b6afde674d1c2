"""A store in one SQLite file, for any number of processes."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import struct
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from llamastate.errors import (
    BadMagicError,
    ClosedError,
    CorruptStateError,
    FileAccessError,
    InvalidArgumentError,
    LlamaStateError,
    LogTamperedError,
    StateFileNotFoundError,
    VersionMismatchError,
)
from llamastate.log.chaining import StoredEntry, is_hash, require_chain
from llamastate.log.entries import SessionOrigin
from llamastate.log.memory import moved
from llamastate.log.sqlerrors import BUSY, code_of, translated
from llamastate.log.store import Head, LogInfo, check_limit, exists, first_facts, not_found, time_of
from llamastate.names import check_name

__all__ = ["SCHEMA_VERSION", "SQLiteLogStore"]

#: In the file's header (``user_version``), beside the number that says whose it is (``application_id``, "LLSL").
SCHEMA_VERSION = 1
APPLICATION_ID = 0x4C4C534C

# An entry's place is the number of its session and its index in one integer: a session's entries lie together, in
# order, and no index beside them takes room. prev_hash is the hash of the row before and is not stored twice.
_SCHEMA = (
    """CREATE TABLE sessions (
        n INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, n_entries INTEGER NOT NULL, head BLOB NOT NULL,
        created INTEGER NOT NULL, updated INTEGER NOT NULL, relation TEXT, origin_id TEXT, origin_hash TEXT
    )""",
    "CREATE TABLE entries (place INTEGER PRIMARY KEY, hash BLOB NOT NULL, data BLOB NOT NULL)",
)
#: Entries that a session has room for.
ROOM = 1 << 32
_SYNC = {"normal": "NORMAL", "full": "FULL"}
#: Pages of the write-ahead log at which it is brought home: that costs an fsync or two, and so not often.
_CHECKPOINT = 8192
_INFO = "id, n_entries, head, created, updated, relation, origin_id, origin_hash"
# IMMEDIATE: who reads first and writes later can find that another has written in between.
_OUTER = "BEGIN IMMEDIATE", "COMMIT", "ROLLBACK"
_INNER = "SAVEPOINT s", "RELEASE s", "ROLLBACK TO s"
_INSERT = "INSERT INTO entries (place, hash, data) VALUES (?, ?, ?)"


class SQLiteLogStore:
    """Logs in a file; a :class:`LogStore`.

    Parameters
    ----------
    path : path-like
        Made if it is not there. Beside it SQLite keeps ``-wal`` and ``-shm`` while it is open; they belong to it.
    sync : {"normal", "full"}
        What has been recorded survives the end of the process, however that comes; with "full" also the machine's loss
        of power, at the price of waiting for the disk with every call.
    timeout : float
        Seconds to wait for other processes that write.
    create : bool
        Make the file if it is not there.
    read_only : bool
        Change nothing, not even what a crash has left to be tidied.

    Raises
    ------
    StateFileNotFoundError
        It is not there, and is not to be made.
    FileAccessError, BadMagicError, CorruptStateError
        It cannot be opened, is something else, or is damaged.
    VersionMismatchError
        A newer version of this package has made it. It is left as it is.
    StoreLockedError
        Others did not let go of it in time; any method can raise that.

    Notes
    -----
    Threads take turns. After ``os.fork`` the child opens the file anew; if another thread was writing at that moment,
    SQLite lets the child read and not write (:class:`StoreLockedError`).

    Examples
    --------
    >>> store = SQLiteLogStore("chats.db")  # doctest: +SKIP
    >>> log = SessionLog.create(store, system_prompt="Be brief.")  # doctest: +SKIP
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        sync: str = "normal",
        timeout: float = 30.0,
        create: bool = True,
        read_only: bool = False,
    ) -> None:
        if sync not in _SYNC:
            raise InvalidArgumentError(f"sync is {sync!r}, not one of {list(_SYNC)}", name="sync", value=sync)
        if not timeout >= 0:
            raise InvalidArgumentError(f"timeout = {timeout} is negative", name="timeout", value=timeout, limit=0)
        try:
            #: Absolute.
            self.path = os.path.abspath(os.fsdecode(path))
            if "\0" in self.path:
                raise ValueError("embedded null byte")
            exists_already = os.path.exists(self.path)
        except (TypeError, ValueError) as error:
            raise FileAccessError(f"cannot use {path!r:.120}: {error}", reason="not a path") from None
        if not exists_already and (read_only or not create):
            raise StateFileNotFoundError(f"there is no {self.path!r}", path=self.path, reason="not there")
        self._sync, self._timeout, self._read_only = _SYNC[sync], timeout, read_only
        self._lock = threading.RLock()
        self._depth = 0
        # an append that failed half-way, in a transaction that goes on
        self._spoilt: BaseException | None = None
        self._forked = False
        self._numbers: dict[str, int] = {}  # of sessions that were appended to
        self._connection: sqlite3.Connection | None = None
        self._connection = self._open()
        _open_stores.add(self)

    # --- opening ------------------------------------------------------------------------------------------------------

    def _open(self) -> sqlite3.Connection:
        check_header(self.path)
        with translated(self.path):
            if self._read_only:
                return self._open_read_only()
            connection = self._connect(self.path)
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
            return connection

    def _connect(self, name: str, *, uri: bool = False) -> sqlite3.Connection:
        connection = sqlite3.connect(
            name, timeout=self._timeout, isolation_level=None, check_same_thread=False, cached_statements=64, uri=uri
        )
        # Files come from anywhere (https://sqlite.org/security.html).
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA cell_size_check = ON")
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        if not self._is_ours(connection):
            # While the file is new its journal is an ordinary one: so its version is in the header and not in a -wal
            # from the beginning on, where check_header() finds it without touching anything.
            connection.execute("BEGIN IMMEDIATE")
            if not self._is_ours(connection):  # nobody was faster
                for statement in _SCHEMA:
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.execute("COMMIT")
        self._switch_to_wal(connection)
        connection.execute(f"PRAGMA synchronous = {self._sync}")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT}")
        if self._sync == "FULL":
            connection.execute("PRAGMA fullfsync = 1")  # macOS: past the disk's own cache

    def _is_ours(self, connection: sqlite3.Connection) -> bool:
        """Whether the tables are there; an error if the file is something else."""
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if (
            not application
            and not version
            and not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        ):
            return False
        _check_numbers(self.path, application, version)
        return True

    def _switch_to_wal(self, connection: sqlite3.Connection) -> None:
        # SQLite does not wait for its turn when two processes do this to a new file at once.
        end = time.monotonic() + self._timeout
        while not _try_wal(connection, patient=time.monotonic() < end):
            time.sleep(0.01)

    def _open_read_only(self) -> sqlite3.Connection:
        name = "file:" + self.path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
        connection = self._connect(f"{name}?mode=ro", uri=True)
        try:
            try:
                ours = self._is_ours(connection)
            except sqlite3.OperationalError:
                # SQLite wants to make its -shm even to read. In a folder where it cannot, and without a -wal, the file
                # is all there is and nobody can be changing it.
                if os.access(os.path.dirname(self.path), os.W_OK) or os.path.exists(f"{self.path}-wal"):
                    raise
                connection.close()
                connection = self._connect(f"{name}?mode=ro&immutable=1", uri=True)
                ours = self._is_ours(connection)
            if not ours:
                raise BadMagicError(f"{self.path!r} is no store of logs: it is empty", path=self.path, reason="empty")
        except BaseException:
            connection.close()
            raise
        return connection

    def _db(self) -> sqlite3.Connection:
        """The connection. To be called, and its result used, under the lock."""
        if self._connection is None:
            if not self._forked:
                raise ClosedError("the store is closed", what="store")
            self._connection = self._open()
            self._forked = False
        return self._connection

    def _after_fork(self) -> None:
        """In a child: a connection must not cross a fork, not even to be closed, and nobody is left to unlock."""
        self._lock = threading.RLock()
        self._depth, self._spoilt = 0, None
        if self._connection is not None:
            _abandoned.append(self._connection)
            self._connection, self._forked = None, True

    # --- writing ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing (:meth:`LogStore.transaction`): one wait for the disk, or for others, instead of many."""
        with self._lock, translated(self.path):
            db = self._db()
            depth = self._depth
            begin, end, back = _INNER if depth else _OUTER
            if self._spoilt is not None:
                raise self._spoilt
            try:
                self._depth = depth + 1
                db.execute(begin)  # in here, for what Ctrl-C interrupts has to be ended too
                yield
                if self._spoilt is not None:
                    raise self._spoilt
                db.execute(end)
            except BaseException as error:
                self._spoilt = None
                try:
                    if depth or db.in_transaction:
                        db.execute(back)
                    if depth:
                        db.execute(end)
                except sqlite3.Error:
                    # a full disk can make SQLite give up the whole transaction: then the outer blocks fail as well
                    self._spoilt = error if depth else None
                raise
            finally:
                self._depth = depth

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """As :meth:`transaction`, for a few statements that do not fail by themselves.

        In a transaction that is under way they need no savepoint then: should the disk be full half-way, the whole of
        it cannot end well any more.
        """
        with self._lock:
            if not self._depth:
                with self.transaction():
                    yield self._db()
                return
            with translated(self.path):
                if self._spoilt is not None:
                    raise self._spoilt
                try:
                    yield self._db()
                except LlamaStateError:
                    raise  # refused, before anything was written
                except BaseException as error:
                    self._spoilt = error
                    raise

    def create(self, session_id: str, entries: Sequence[StoredEntry]) -> None:
        """Add a session (:meth:`LogStore.create`)."""
        session_id = check_name(session_id)
        relation, origin = first_facts(entries)
        require_chain(entries, 0, None)
        origin_id, origin_hash = (None, None) if origin is None else (origin.session_id, origin.at_hash)
        last = entries[-1]
        with self._writing() as db:
            if db.execute("SELECT 1 FROM sessions WHERE id = ?", (session_id,)).fetchone() is not None:
                raise exists(session_id)
            n = db.execute(
                f"INSERT INTO sessions ({_INFO}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    session_id, len(entries), bytes.fromhex(last.hash), time_of(entries[0]), time_of(last),
                    relation, origin_id, origin_hash,
                ),
            ).lastrowid  # fmt: skip
            assert n is not None
            db.executemany(_INSERT, [(n * ROOM + e.index, bytes.fromhex(e.hash), e.data) for e in entries])

    def append(self, session_id: str, entries: Sequence[StoredEntry]) -> None:
        """Add entries (:meth:`LogStore.append`)."""
        if not entries:
            self.head(session_id)
            return
        with self._writing() as db:
            # Comparing is part of the statement. Which number a session has never changes, so it need not be asked.
            n = self._numbers.get(session_id)
            if n is None or not self._advance(db, session_id, n, entries):
                if not _is_text(session_id):
                    raise not_found(session_id)
                row = db.execute("SELECT n, n_entries, head FROM sessions WHERE id = ?", (session_id,)).fetchone()
                if row is None:
                    raise not_found(session_id)
                n, n_entries, head = row[0], row[1], _hex(row[2])
                if entries[0].prev_hash != head:
                    raise moved(session_id, entries[0].prev_hash, head)
                require_chain(entries, n_entries, head)
                if not self._advance(db, session_id, n, entries):
                    raise self._damaged(f"session {session_id!r:.60} cannot be changed")
                if len(self._numbers) >= 4096:
                    self._numbers.clear()
                self._numbers[session_id] = n
            rows = [(n * ROOM + e.index, bytes.fromhex(e.hash), e.data) for e in entries]
            if len(rows) == 1:
                db.execute(_INSERT, rows[0])
            else:
                db.executemany(_INSERT, rows)

    def _advance(self, db: sqlite3.Connection, session_id: str, n: int, entries: Sequence[StoredEntry]) -> bool:
        """Move a session's head, if it is still where the entries begin."""
        first, last = entries[0], entries[-1]
        if first.prev_hash is None or not is_hash(first.prev_hash):
            return False
        try:
            require_chain(entries, first.index, first.prev_hash)
        except LogTamperedError:
            return False  # whether it comes too late is told first
        done = db.execute(
            "UPDATE sessions SET n_entries = ?, head = ?, updated = ? "
            "WHERE n = ? AND id = ? AND n_entries = ? AND head = ?",
            (
                last.index + 1, bytes.fromhex(last.hash), time_of(last),
                n, session_id, first.index, bytes.fromhex(first.prev_hash),
            ),
        )  # fmt: skip
        return done.rowcount == 1

    # --- reading ------------------------------------------------------------------------------------------------------

    def _rows(self, statement: str, parameters: Sequence[Any] = ()) -> list[Any]:
        with self._lock, translated(self.path):
            return self._db().execute(statement, parameters).fetchall()

    def _session(self, session_id: str, columns: str = "n") -> tuple[Any, ...]:
        if not _is_text(session_id):
            raise not_found(session_id)
        rows = self._rows(f"SELECT {columns} FROM sessions WHERE id = ?", (session_id,))
        if not rows:
            raise not_found(session_id)
        row: tuple[Any, ...] = rows[0]
        return row

    def head(self, session_id: str) -> Head:
        """Where a log ends (:meth:`LogStore.head`)."""
        n_entries, head = self._session(session_id, "n_entries, head")
        return Head(self._whole(n_entries), _hex(head))

    def _whole(self, value: Any) -> int:
        """A number as it was written; SQLite would take anything in its place, and give it back."""
        if type(value) is not int or not 0 <= value <= ROOM:
            raise self._damaged(f"{value!r:.40} is no number of entries")
        return value

    def _damaged(self, reason: str) -> CorruptStateError:
        return CorruptStateError(
            f"{self.path!r} is damaged: {reason}", path=self.path, reason=reason, section="sessions"
        )

    def read(self, session_id: str, start: int = 0, stop: int | None = None) -> list[StoredEntry]:
        """Entries (:meth:`LogStore.read`)."""
        (n,) = self._session(session_id)
        start, end = max(start, 0), ROOM if stop is None else min(stop, ROOM)
        # one more, for its hash
        rows = self._rows(
            "SELECT place, hash, data FROM entries WHERE place >= ? AND place < ? ORDER BY place",
            (n * ROOM + max(start - 1, 0), n * ROOM + end),
        )
        entries, prev = [], None
        for place, found, data in rows:
            text = found.hex() if type(found) is bytes else _hex(found)
            if (i := place - n * ROOM) >= start:
                entries.append(StoredEntry(i, text, prev, data if type(data) is bytes else b""))
            prev = text
        return entries

    def find(self, session_id: str, entry_hash: str) -> int | None:
        """Where an entry is (:meth:`LogStore.find`)."""
        (n,) = self._session(session_id)
        if not is_hash(entry_hash):
            return None
        rows = self._rows(
            "SELECT place FROM entries WHERE place >= ? AND place < ? AND hash = ? LIMIT 1",
            (n * ROOM, (n + 1) * ROOM, bytes.fromhex(entry_hash)),
        )
        return rows[0][0] - n * ROOM if rows else None

    def sessions(self, *, limit: int | None = None, before: str | None = None) -> list[LogInfo]:
        """Sessions, newest first (:meth:`LogStore.sessions`)."""
        limit = check_limit(limit)
        top = 2**63 - 1 if before is None else self._session(before)[0]
        rows = self._rows(
            f"SELECT {_INFO} FROM sessions WHERE n < ? ORDER BY n DESC LIMIT ?", (top, -1 if limit is None else limit)
        )
        return [self._info(row) for row in rows]

    def info(self, session_id: str) -> LogInfo:
        """What is known of a session (:meth:`LogStore.info`)."""
        return self._info(self._session(session_id, _INFO))

    def _info(self, row: Any) -> LogInfo:
        session_id, n_entries, head, created, updated, relation, origin_id, origin_hash = row
        kinds = [type(value) for value in row]
        if (
            kinds[:5] != [str, int, bytes, int, int]
            or relation not in (None, "fork", "compact")
            or kinds[6:] != ([type(None)] * 2 if relation is None else [str] * 2)
        ):
            raise self._damaged(f"what it says of session {session_id!r:.60} makes no sense")
        origin = None if relation is None else SessionOrigin(origin_id, origin_hash)
        return LogInfo(session_id, self._whole(n_entries), head.hex(), created, updated, relation, origin)

    # --- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the file. Idempotent."""
        with self._lock:
            connection, self._connection, self._forked = self._connection, None, False
            if connection is not None:
                with translated(self.path):
                    connection.close()

    def __enter__(self) -> SQLiteLogStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        connection = getattr(self, "_connection", None)
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def __repr__(self) -> str:
        closed = self._connection is None and not self._forked
        return f"<llamastate.log.SQLiteLogStore {self.path!r}{' closed' if closed else ''}>"


_open_stores: weakref.WeakSet[SQLiteLogStore] = weakref.WeakSet()
#: Connections of the process that this one was forked from: kept, since letting go would close them.
_abandoned: list[sqlite3.Connection] = []


def _after_fork() -> None:
    for store in list(_open_stores):
        store._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _try_wal(connection: sqlite3.Connection, *, patient: bool) -> bool:
    try:
        connection.execute("PRAGMA journal_mode = WAL")
    except sqlite3.OperationalError as error:
        if code_of(error) != BUSY or not patient:
            raise
        return False
    return True


def check_header(path: str) -> None:
    """Refuse a file that is not ours, or newer, before SQLite touches it."""
    try:
        with open(path, "rb") as file:
            head = file.read(100)
    except FileNotFoundError:
        return
    except OSError as error:
        raise FileAccessError(
            f"cannot read {path!r}: {error.strerror}", path=path, reason=error.strerror, code=error.errno
        ) from None
    if not head:
        return  # about to be made by somebody, or left by one who died before anything was in it
    if len(head) < 100 or not head.startswith(b"SQLite format 3\0"):
        raise BadMagicError(f"{path!r} is no SQLite file", path=path, reason="no SQLite file")
    (version,), (application,) = struct.unpack_from(">I", head, 60), struct.unpack_from(">I", head, 68)
    if version or application:
        _check_numbers(path, application, version)


def _check_numbers(path: str, application: int, version: int) -> None:
    if application != APPLICATION_ID:
        raise BadMagicError(
            f"{path!r} is a database of another program", path=path, reason="another program's",
            expected=APPLICATION_ID, found=application,
        )  # fmt: skip
    if version != SCHEMA_VERSION:
        raise VersionMismatchError(
            f"{path!r} has version {version} of the schema; this package knows {SCHEMA_VERSION}",
            path=path,
            reason="another version",
            expected=SCHEMA_VERSION,
            found=version,
        )


def _hex(value: Any) -> str:
    """A hash as text; of what is none something that no hash equals."""
    return value.hex() if isinstance(value, bytes) else f"not a hash: {value!r:.40}"


def _is_text(value: object) -> bool:
    """Whether it is text that can be in a database: half a character cannot."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False
