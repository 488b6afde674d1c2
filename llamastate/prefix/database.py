"""A SQLite file that many processes share, that outlives ``fork()``, and that is made anew when it is lost or damaged.

What is in it can be found again from elsewhere; so it is never mended, only moved aside and filled anew. That happens
under a lock on a file beside it, which whoever opens the database takes as well. A process that still has the old file
open sees at its next call that the name means another file.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TypeVar

from llamastate.errors import ClosedError, StoreLockedError, VersionMismatchError

__all__ = ["Database", "holding"]

T = TypeVar("T")

#: Seconds that SQLite waits for another process' transaction, and how often one is begun again.
BUSY = 2.0
TRIES = 4
#: KiB of pages that each of the two connections may keep.
CACHE = 4096

_open: weakref.WeakSet[Database] = weakref.WeakSet()


class Database:
    """Two connections to one file, so that in this process too reading never waits for writing.

    Parameters
    ----------
    path : str
    schema : str
        Statements that make the tables.
    version : int
        Of the tables; kept in ``user_version``.
    fill : callable
        Puts into new tables what is to be in them; how many rows that is.

    Raises
    ------
    VersionMismatchError
        The file is of a newer version.
    OSError, sqlite3.Error
        It cannot be opened or made.
    """

    def __init__(self, path: str, *, schema: str, version: int, fill: Callable[[sqlite3.Connection], int]) -> None:
        self.path = path
        self._schema, self._version, self._fill = schema, version, fill
        #: How often this process has made the file anew, and found something to fill it with.
        self.refilled = 0
        self._reset()
        self._closed = False
        _open.add(self)
        self._finalizer = weakref.finalize(self, _close, self._pair)
        self._reopen()

    def _reset(self) -> None:
        # Who needs both takes the one for writing first; only who holds both opens and closes.
        self._writing = threading.RLock()
        self._reading = threading.RLock()
        #: The reader, the writer; emptied in place, since the finalizer has it.
        self._pair: list[sqlite3.Connection] = []
        self._file: tuple[int, int] | None = None

    # --- use ----------------------------------------------------------------------------------------------------------

    def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """``work(connection)``, which only looks. Waits for no other process, unless the file is being made anew."""
        return self._attempt(lambda: self._read(work))

    def write(self, work: Callable[[sqlite3.Connection], T], *, wait: bool = True) -> T:
        """``work(connection)`` in a transaction: all of it or nothing. It may run again if the file was lost meanwhile.

        Raises
        ------
        StoreLockedError
            Another process kept the database to itself for long; or, if we are not to wait, somebody writes just now.
        """
        return self._attempt(lambda: self._write(work, wait))

    def checkpoint(self) -> None:
        """Move what is in the log into the file, as far as nobody reads it."""

        def work() -> None:
            with self._writing:
                self._writer().execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

        self._attempt(work)

    def rebuild(self) -> None:
        """Make the file anew. Others wait."""
        with self._writing, self._reading, holding(self.path + ".lock"):
            self._check_open()
            self._let_go()
            self._move_aside()
            self._connect()
            with contextlib.suppress(OSError):
                os.unlink(self.path + ".damaged")  # it was not

    def close(self) -> None:
        """Idempotent."""
        self._closed = True
        with self._writing, self._reading:
            self._let_go()

    def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        while True:
            with self._reading:
                if self._is_current():
                    return work(self._pair[0])
            self._reopen()

    def _write(self, work: Callable[[sqlite3.Connection], T], wait: bool) -> T:
        if not self._writing.acquire(blocking=wait):
            raise self._locked()
        try:
            connection = self._writer()
            if not any(_begin(connection, wait) for _ in range(TRIES if wait else 1)):
                raise self._locked()
            try:
                result = work(connection)
                connection.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back already, if that was where it failed
                if connection.in_transaction:
                    with contextlib.suppress(sqlite3.Error):
                        connection.execute("ROLLBACK")
                raise
            return result
        finally:
            self._writing.release()

    def _locked(self) -> StoreLockedError:
        return StoreLockedError(f"others keep writing to {self.path!r}", path=self.path)

    def _attempt(self, work: Callable[[], T]) -> T:
        """Do something, and once more with a new file if this one is damaged, or not the one of that name any more."""
        self._check_open()
        try:
            return work()
        except sqlite3.DatabaseError as error:
            if is_damage(error):
                self._mend()
            elif self._is_current():
                raise
        return work()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the store is closed", what="store")

    # --- opening ------------------------------------------------------------------------------------------------------

    def _is_current(self) -> bool:
        return self._file is not None and self._file == _identity(self.path)

    def _writer(self) -> sqlite3.Connection:
        if not self._is_current():
            self._reopen()
        return self._pair[1]

    def _reopen(self) -> None:
        with self._writing, self._reading, holding(self.path + ".lock"):
            if not self._is_current():
                self._check_open()
                self._let_go()
                self._connect()

    def _mend(self) -> None:
        """Make a damaged file anew, unless another process has done so already."""
        with self._writing, self._reading, holding(self.path + ".lock"):
            self._check_open()
            moved = not self._is_current()
            self._let_go()
            if not moved:
                self._move_aside()
            self._connect()

    def _connect(self) -> None:
        if _identity(self.path) is None:
            self._make()
        try:
            self._pair += [self._checked(), self._checked()]
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            self._let_go()
            self._move_aside()
            self._make()
            self._pair += [self._checked(), self._checked()]
        self._file = _identity(self.path)

    def _checked(self) -> sqlite3.Connection:
        connection = _connect(self.path)
        try:
            (found,) = connection.execute("PRAGMA user_version").fetchone()
            if found > self._version:
                raise VersionMismatchError(
                    f"{self.path!r} is of version {found}; this package reads {self._version}",
                    path=self.path,
                    reason="format version",
                    expected=self._version,
                    found=found,
                )
            if found != self._version:
                raise sqlite3.DatabaseError(f"no index of version {self._version}")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(f"PRAGMA cache_size=-{CACHE}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _let_go(self) -> None:
        self._file = None
        while self._pair:
            # SQLite leaves the logs alone if another file has the name by now
            self._pair.pop().close()

    def _move_aside(self) -> None:
        # The file goes first: without it nobody takes what is in its logs for anything.
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.path, self.path + ".damaged")

    def _make(self) -> None:
        """Under the lock, with no file of that name."""
        new = self.path + ".new"
        # A log of the file before would be applied to this one.
        for left in (f"{self.path}-wal", f"{self.path}-shm", new, f"{new}-journal"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(left)
        connection = _connect(new, create=True)
        try:
            connection.execute("PRAGMA journal_mode=OFF")
            connection.execute("PRAGMA synchronous=OFF")
            connection.execute(f"PRAGMA cache_size=-{16 * CACHE}")  # keys come in no order; for a moment only
            connection.executescript(self._schema)
            connection.execute("BEGIN")
            self.refilled += bool(self._fill(connection))
            connection.execute(f"PRAGMA user_version={self._version}")
            connection.execute("COMMIT")
            connection.execute("PRAGMA journal_mode=WAL").fetchall()
        finally:
            connection.close()
        fd = os.open(new, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(new, self.path)

    def _after_fork(self) -> None:
        # Neither used nor closed: SQLite's locks belong to the parent, and a thread that is not here may have been
        # inside. What is leaked is let go when the process ends.
        for connection in self._pair:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
        finalizer = getattr(self, "_finalizer", None)
        if finalizer is not None:
            finalizer.detach()
        self._reset()
        self._finalizer = weakref.finalize(self, _close, self._pair)


@contextlib.contextmanager
def holding(path: str, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file, against other processes and threads; whether it is held. It stays where it is."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        held = True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        try:
            yield held
        finally:
            if held:
                # not only closed: a child that was forked meanwhile has it open too
                fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the file is not what it should be. Being busy, full or unreadable are OperationalErrors."""
    return type(error) is sqlite3.DatabaseError or str(error).startswith("no such table")


def _begin(connection: sqlite3.Connection, wait: bool) -> bool:
    """Begin to write, unless somebody else does."""
    try:
        if not wait:
            connection.execute("PRAGMA busy_timeout=0")
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        if "locked" not in str(error) and "busy" not in str(error):
            raise
        return False
    finally:
        if not wait:
            connection.execute(f"PRAGMA busy_timeout={int(1000 * BUSY)}")
    return True


def _connect(path: str, *, create: bool = False) -> sqlite3.Connection:
    # by URI: a file that is gone must not be made again as an empty one
    name = path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    uri = f"file:{name}?mode={'rwc' if create else 'rw'}"
    return sqlite3.connect(uri, uri=True, timeout=BUSY, isolation_level=None, check_same_thread=False)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _close(pair: list[sqlite3.Connection]) -> None:
    while pair:
        pair.pop().close()


def now() -> int:
    """Microseconds since 1970, as rows have them."""
    return time.time_ns() // 1000


def _forked() -> None:
    for database in list(_open):
        database._after_fork()


os.register_at_fork(after_in_child=_forked)
