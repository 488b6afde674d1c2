"""A SQLite file that many processes share, that outlives ``fork()``, and that is made anew when it is lost or damaged.

What is in it can be found again from elsewhere; so it is never mended, only moved aside and filled anew. That happens
under a lock on a file beside it, which whoever opens the database takes as well. A process that still has the old file
open sees at its next call that the name means another file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from llamastate import lifetimes
from llamastate.atomic import fsync_folder
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
    durable : bool
        Wait for the disk at every transaction.
    readonly : bool
        Neither lock nor file can be written: what can be read is read, or else made anew in memory.

    Raises
    ------
    VersionMismatchError
        The file is of a newer version.
    OSError, sqlite3.Error
        It cannot be opened or made.
    """

    def __init__(
        self,
        path: str,
        *,
        schema: str,
        version: int,
        fill: Callable[[sqlite3.Connection], int],
        durable: bool = False,
        readonly: bool = False,
    ) -> None:
        self.path = path
        self.readonly = readonly
        self._durable = durable
        self._schema, self._version, self._fill = schema, version, fill
        #: How often this process has made the file anew, and found something to fill it with.
        self.refilled = 0
        self._reset()
        self._closed = False
        _open.add(self)
        lifetimes.databases.add(self)
        self._watch()
        self._reopen()

    def _reset(self) -> None:
        # Who needs both takes the one for writing first; only who holds both opens and closes.
        self._writing = threading.RLock()
        self._reading = threading.RLock()
        #: The reader, the writer; emptied in place, since the finalizer has it.
        self._pair: list[sqlite3.Connection] = []
        self._file: tuple[int, ...] | None = None
        #: Of a file that cannot be written: whether nobody else can write it either, as far as SQLite is told.
        self._frozen = False

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
        OSError
            It can only be read.
        """
        self._check_writable()
        return self._attempt(lambda: self._write(work, wait))

    def checkpoint(self) -> None:
        """Move what is in the log into the file, as far as nobody reads it."""
        if self.readonly:
            return

        def work() -> None:
            with self._writing:
                self._writer().execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

        self._attempt(work)

    def rebuild(self) -> None:
        """Make the file anew. Others wait."""
        self._check_writable()
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

    def _check_writable(self) -> None:
        if self.readonly:
            raise OSError(errno.EROFS, "it can only be read", self.path)

    # --- opening ------------------------------------------------------------------------------------------------------

    def _is_current(self) -> bool:
        return self._file is not None and self._file in ((), self._identity())

    def _identity(self) -> tuple[int, ...] | None:
        return _identity(self.path, contents=self._frozen)

    def _lock(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self.readonly else holding(self.path + ".lock")

    def _writer(self) -> sqlite3.Connection:
        if not self._is_current():
            self._reopen()
        return self._pair[1]

    def _reopen(self) -> None:
        with self._writing, self._reading, self._lock():
            if not self._is_current():
                self._check_open()
                self._let_go()
                self._connect()

    def _mend(self) -> None:
        """Make a damaged file anew, unless another process has done so already."""
        with self._writing, self._reading, self._lock():
            self._check_open()
            moved = not self._is_current()
            self._let_go()
            if self.readonly:
                self._remake()
                return
            if not moved:
                self._move_aside()
            self._connect()

    def _connect(self) -> None:
        if self.readonly:
            self._connect_readonly()
            return
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

    def _connect_readonly(self) -> None:
        # Others may write it, with the logs that SQLite keeps beside it. Where these are not there and cannot be made,
        # nobody does at the moment.
        for frozen in (False, True):
            self._frozen = frozen
            try:
                if frozen and _size(self.path + "-wal"):
                    break  # it would be left out
                how = "mode=ro&immutable=1" if frozen else "mode=ro"
                self._pair += [self._checked(how), self._checked(how)]
                self._file = self._identity()
                return
            except sqlite3.Error as error:
                self._let_go()
                if is_damage(error):
                    break
        self._remake()

    def _remake(self) -> None:
        """In memory, what cannot be read."""
        connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._pair += [connection, connection]
        connection.executescript(self._schema)
        self.refilled += bool(self._fill(connection))
        self._file = ()

    def _checked(self, how: str = "mode=rw") -> sqlite3.Connection:
        connection = _connect(self.path, how)
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
            connection.execute(f"PRAGMA synchronous={'FULL' if self._durable else 'NORMAL'}")
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
        connection = _connect(new, "mode=rwc")
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
        if self._durable:
            fsync_folder(os.path.dirname(self.path))

    def _after_fork(self) -> None:
        # Neither used nor closed: SQLite's locks belong to the parent, and a thread that is not here may have been
        # inside. What is leaked is let go when the process ends.
        for connection in self._pair:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
        finalizer = getattr(self, "_finalizer", None)
        if finalizer is not None:
            finalizer.detach()
        self._reset()
        self._watch()

    def _watch(self) -> None:
        self._finalizer = weakref.finalize(self, _close, self._pair)
        # Not at exit, while a thread may be writing: what is alive then is closed in order.
        self._finalizer.atexit = False


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


def _connect(path: str, how: str) -> sqlite3.Connection:
    # by URI: a file that is gone must not be made again as an empty one
    name = path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    return sqlite3.connect(f"file:{name}?{how}", uri=True, timeout=BUSY, isolation_level=None, check_same_thread=False)


def _identity(path: str, *, contents: bool = False) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    if contents:
        return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
    return status.st_dev, status.st_ino


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _close(pair: list[sqlite3.Connection]) -> None:
    while pair:
        pair.pop().close()


def now() -> int:
    """Microseconds since 1970, as rows have them."""
    return time.time_ns() // 1000


#: Locks that are held while this process forks: SQLite has some of its own for all databases, and a child that was made
#: while another thread was inside could never get them.
_paused: list[Any] = []
#: Seconds that a fork waits for each.
PAUSE = 1.0


def _pause() -> None:
    for database in list(_open):
        _paused.extend(lock for lock in (database._writing, database._reading) if lock.acquire(timeout=PAUSE))


def _go_on() -> None:
    while _paused:
        _paused.pop().release()


def _forked() -> None:
    _paused.clear()
    for database in list(_open):
        database._after_fork()


os.register_at_fork(before=_pause, after_in_parent=_go_on, after_in_child=_forked)
