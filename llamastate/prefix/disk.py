"""Entries on disk, shared by any number of processes.

What must stay true, whoever dies wherever: a file comes before its row and goes after it, so that the worst that is
left is a file without a row (found by :meth:`DiskTier.gc`) or a row without a file (found by whoever wants to read it).
Whether a file may go is decided in a transaction that nobody can add its row beside. No file is believed: every byte is
verified whenever it is read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from llamastate.errors import (
    BadMagicError,
    ClosedError,
    CorruptStateError,
    FileAccessError,
    LlamaStateError,
    SaveError,
    StoreFullError,
    StoreLockedError,
    VersionMismatchError,
)
from llamastate.prefix import housekeeping
from llamastate.prefix.checks import at_least, check_share
from llamastate.prefix.diskstats import DiskCounters, DiskStats
from llamastate.prefix.entry import Entry, seal
from llamastate.prefix.folder import Allocate, Folder, row_of
from llamastate.prefix.housekeeping import Damaged, Reclaimed
from llamastate.prefix.index import Index, Root, RootUse, Row
from llamastate.prefix.recency import Recency

__all__ = ["Damaged", "DiskStats", "DiskTier", "Reclaimed"]

T = TypeVar("T")

#: What is left of ``disk_bytes`` after an eviction: the next few puts find room.
FILL = 0.95
#: Failures to read that say nothing of the file.
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR)

_alive: weakref.WeakSet[DiskTier] = weakref.WeakSet()


class DiskTier:
    """Entries in a folder, each in a file of its own, under an index that can be made anew from them.

    Parameters
    ----------
    path : path-like
        Made if it is not there.
    disk_bytes : int, optional
        What all entries may take. What was not of use for longest goes for new ones; several processes that put at the
        same moment may go past it by what they put.
    anchor_share : float
        While anchors take more than this part of all bytes, they go first; in ``(0, 1]``.
    durable : bool
        Wait for the disk at every entry. Without it a power cut may take the last entries, or tear one, which its
        checksums tell: it is as if it had never been there. A process that is killed loses nothing either way.

    Raises
    ------
    VersionMismatchError
        A store of a newer version; it is left as it is.
    SaveError
        The folder cannot be made or read, or is none.
    CorruptStateError
        ``store.json`` cannot be understood.

    Notes
    -----
    Safe to use from several threads and processes, and after ``fork()``. Readers wait for nobody, except while a lost
    or damaged index is made anew: 256 bytes of every file are read then. Such an index has no pins.

    Where the folder cannot be written, what is there is read, and nothing else done (``readonly``).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        disk_bytes: int | None = None,
        anchor_share: float = 0.5,
        durable: bool = False,
    ) -> None:
        self.disk_bytes = None if disk_bytes is None else at_least("disk_bytes", disk_bytes, 0)
        self.anchor_share = check_share(anchor_share)
        self._closed = False
        self._warned = False
        self._counters = DiskCounters()
        self._lock = threading.Lock()
        self._recency = Recency(0)
        #: Keys of what cannot be read, nor done away with: here it is not there, until it is put again.
        self._refused: set[bytes] = set()
        self.readonly = False
        try:
            self.path = os.path.realpath(os.fsdecode(path))
            try:
                self._open(durable=durable)
            except (OSError, sqlite3.Error) as error:
                if not _is_refusal(error) or not os.path.isfile(os.path.join(self.path, "store.json")):
                    raise
                self.readonly = True
                self._open(durable=durable)
        except (OSError, TypeError, ValueError, sqlite3.Error) as error:
            if isinstance(error, LlamaStateError):
                raise
            reason = _reason(error)
            raise SaveError(f"cannot open the store {path!r}: {reason}", path=str(path), reason=reason) from error
        self._recency.seen(self._quietly(self._index.newest, 0))
        _alive.add(self)

    def _open(self, *, durable: bool) -> None:
        self._folder = Folder(self.path, durable=durable, readonly=self.readonly)
        self._index = Index(
            os.path.join(self.path, "index.sqlite"),
            lambda: (self._folder.roots(), self._folder.rows()),
            durable=durable,
            readonly=self.readonly,
        )

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._recency.reset()

    # --- looking ------------------------------------------------------------------------------------------------------

    def known(self, keys: Sequence[bytes]) -> set[bytes]:
        """Which of these are there. One query: about 3 µs a key in an index of a million."""
        found: set[bytes] = self._quietly(lambda: self._index.known(keys), set())
        return found - self._refused if self._refused else found

    def tails(self, parent: bytes) -> list[int]:
        """How many tokens after ``parent`` there are anchors, descending, each once."""
        return self._quietly(lambda: self._index.tails(parent), [])

    def get(self, key: bytes, *, allocate: Allocate | None = None) -> Entry | None:
        """The entry, read into memory of its own and verified; None if it is not there, or damaged and so dropped now.

        Parameters
        ----------
        key : bytes
        allocate : callable, optional
            ``allocate(n_bytes)`` gives uint8[n_bytes] to read into. The entry is a view of that.

        Notes
        -----
        Reads every byte twice, once from the disk's cache. The index is not asked. Of fresh memory the system has to
        make every page first: into memory that was used before it takes less than half the time.
        """
        self._check_open()
        entry = None
        seen = self._folder.identity(key)
        try:
            entry = self._folder.read(key, allocate)
        except VersionMismatchError:
            pass  # of a newer package, which shares this folder
        except FileNotFoundError:
            if not self.readonly:
                self._quietly(lambda: self._forget_lost(key), None)
        except (BadMagicError, CorruptStateError):
            self._count(damaged=1)
            self._forget(key, housekeeping.unchanged(self._folder, key, seen))
        except OSError as error:
            if error.errno not in _PASSING:
                self._refused.add(key)
            self._warn(error)
        self._count(reads=1, hits=int(entry is not None), read_bytes=0 if entry is None else entry.nbytes)
        return entry

    def entries(self, root: bytes | None = None) -> Iterator[Row]:
        """Rows of all entries, or of those of one root; from the index only.

        Yields
        ------
        Row
        """
        with self._typed(FileAccessError):
            yield from self._index.rows(root)

    def roots(self) -> list[Root]:
        """What has been put, by model and size of blocks, the oldest first."""
        with self._typed(FileAccessError):
            return self._index.roots()

    def known_roots(self) -> list[Root]:
        """As :meth:`roots`; none where the index cannot be read."""
        return self._quietly(self._index.roots, [])

    def use(self) -> list[RootUse]:
        """What there is of each root, the oldest first. Looks at every row of the index."""
        with self._typed(FileAccessError):
            return self._index.use()

    def stats(self) -> DiskStats:
        """What is there, and what this process has done. Looks at one row."""
        with self._typed(FileAccessError):
            totals = self._index.totals()
        with self._lock:
            return DiskStats(
                **vars(totals), limit=self.disk_bytes, **vars(self._counters), rebuilt=self._index.database.refilled
            )

    # --- putting in ---------------------------------------------------------------------------------------------------

    def put(self, entry: Entry) -> bool:
        """Write an entry, sealed before if need be; False if it was there already.

        Raises
        ------
        StoreFullError
            There is no room, and none can be made; or the disk does not take it. Nothing is left of it then.

        Notes
        -----
        Writes its bytes once, and about 20 kB to the index.
        """
        self._check_open()
        try:
            return self._put(entry)
        except StoreFullError:
            raise
        except (OSError, sqlite3.Error, StoreLockedError) as error:
            raise self._full(entry, error) from error

    def _put(self, entry: Entry) -> bool:
        key = entry.key
        refused = key in self._refused
        if not refused and self._index.known([key]) and self._folder.identity(key) is not None:
            self.touch([key])
            return False
        if self.readonly:
            raise OSError(errno.EROFS, "it can only be read", self.path)
        if not entry.sealed:
            seal(entry)
        self._make_room(entry)
        if refused:
            # its permissions would go over to the new one
            self._folder.unlink(key)
        self._folder.write(entry)
        try:
            new = self._index.add(row_of(entry, self._recency.now()), lambda: self._still_there(entry))
        except BaseException:
            with contextlib.suppress(LlamaStateError, sqlite3.Error):
                self._index.without_row([key], self._folder.unlink)
            raise
        # Written now and then: others must not see the beginning of a chain as older than its end for long.
        self.touch([entry.parent])
        self._refused.discard(key)
        new = new or refused
        if new:
            self._count(writes=1, written_bytes=entry.nbytes)
        return new

    def _still_there(self, entry: Entry) -> None:
        # Between the file and its row another process may have done away with a file of that name that it had evicted.
        if self._folder.identity(entry.key) is None:
            self._folder.write(entry)

    def _full(self, entry: Entry, error: Exception) -> StoreFullError:
        available = None
        with contextlib.suppress(OSError):
            status = os.statvfs(self.path)
            available = status.f_bavail * status.f_frsize
        return StoreFullError(
            f"{self.path!r} takes no {entry.nbytes} bytes more: {_reason(error)}",
            path=self.path,
            needed=entry.nbytes,
            available=available,
        )

    def add_root(self, root: bytes, fingerprint: str, block_tokens: int, kind: str = "") -> None:
        """Say what a root stands for: for listings. What cannot be written is left out.

        Parameters
        ----------
        root : bytes
        fingerprint : str
            JSON.
        block_tokens : int
        kind : str
            Of memory.
        """

        def work() -> None:
            if any(known.root == root and known.fingerprint for known in self._index.roots()):
                return
            new = Root(root, fingerprint, block_tokens, kind, self._recency.now())
            self._folder.write_root(new)
            self._index.add_root(new)

        if not self.readonly:
            self._quietly(work, None)

    def touch(self, keys: Iterable[bytes]) -> None:
        """These, and all that they stand on, were of use just now. Remembered, and written every few seconds."""
        if self.readonly:
            return
        self._recency.use(keys)
        if self._recency.due:
            self._try_touches(wait=False)

    def _try_touches(self, *, wait: bool) -> None:
        # Somebody is writing: later, then. The disk takes nothing: whoever puts is told.
        with contextlib.suppress(StoreLockedError, sqlite3.Error, OSError):
            self._write_touches(wait=wait)

    def _write_touches(self, *, wait: bool) -> None:
        self._recency.write(lambda used: self._index.touch(used, wait=wait))

    # --- letting go ---------------------------------------------------------------------------------------------------

    def pin(self, name: bytes, n_tokens: int, keys: Sequence[bytes]) -> set[bytes]:
        """Never evict these, until :meth:`unpin` of that name, here or in another process.

        Parameters
        ----------
        name : bytes
            Any number of pins may have it.
        n_tokens : int
            What :meth:`unpin` is to tell.
        keys : sequence of bytes

        Returns
        -------
        set of bytes
            Those that are not there. Nothing is pinned if there are any.
        """
        with self._typed(SaveError):
            return (set(keys) & self._refused) or self._index.pin(name, n_tokens, keys)

    def unpin(self, name: bytes) -> int:
        """Take the shortest :meth:`pin` of a name back; its ``n_tokens``, or 0 if there is none."""
        with self._typed(SaveError):
            return self._index.unpin(name)

    def evict(self, n_bytes: int) -> int:
        """Let so many bytes go, or a little more; less if all that is left is pinned.

        Returns
        -------
        int
            Bytes freed.
        """
        n_bytes = at_least("n_bytes", n_bytes, 0)
        with self._typed(SaveError):
            return self._evict(n_bytes, None)

    def _evict(self, n_bytes: int, spare: bytes | None) -> int:
        self._write_touches(wait=True)
        freed = 0
        while freed < n_bytes:
            gone = self._index.evict(n_bytes - freed, anchor_share=self.anchor_share, spare=spare)
            if not gone:
                break
            # Rows first. Whoever has put one of them again meanwhile keeps his file.
            self._index.without_row([key for key, _ in gone], self._folder.unlink)
            size = sum(nbytes for _, nbytes in gone)
            freed += size
            self._count(evictions=len(gone), evicted_bytes=size)
        if spare is not None:
            # another process may have met another clock
            self._recency.seen(self._index.newest())
        return freed

    def _make_room(self, entry: Entry) -> None:
        if self.disk_bytes is None:
            return
        totals = self._index.totals()
        excess = totals.bytes + entry.nbytes - self.disk_bytes
        if excess <= 0:
            return
        available = self.disk_bytes - totals.pinned_bytes
        if entry.nbytes <= available:
            # what it stands on stays: without it nobody would find it
            self._evict(excess + int((1 - FILL) * self.disk_bytes), entry.parent)
            available = self.disk_bytes - self._index.totals().bytes
        if entry.nbytes > available:
            raise StoreFullError(
                f"no room for {entry.nbytes} bytes in {self.path!r}: "
                f"{max(0, available)} of {self.disk_bytes} can be had",
                path=self.path,
                needed=entry.nbytes,
                available=max(0, available),
            )

    def drop(self, key: bytes) -> bool:
        """Remove an entry, pinned or not; whether it was there. If that cannot be done, nobody meets it here again."""
        return self._forget(key, lambda: True)

    def _forget(self, key: bytes, check: Callable[[], bool]) -> bool:
        self._refused.add(key)
        if self.readonly:
            return False

        def work() -> bool:
            gone = housekeeping.remove(self._folder, self._index, key, check)
            self._refused.discard(key)
            return gone

        return self._quietly(work, False)

    def _forget_lost(self, key: bytes) -> None:
        if self._index.known([key]):
            self._index.remove([key], lambda k: self._folder.identity(k) is None)

    # --- keeping house ------------------------------------------------------------------------------------------------

    def verify(self, *, drop: bool = True) -> list[Damaged]:
        """Read every file and check every byte.

        Parameters
        ----------
        drop : bool
            Remove what is damaged, unless the store can only be read.

        Returns
        -------
        list of Damaged
            Files of newer versions are not; rows whose file is gone are.
        """
        with self._typed(FileAccessError):
            found = housekeeping.verify(self._folder, self._index, drop=drop and not self.readonly)
        self._count(damaged=len(found))
        return found

    def gc(self) -> Reclaimed:
        """Mend what crashes have left: see :class:`Reclaimed`. Others go on meanwhile; a second caller waits.

        Notes
        -----
        Lists all files. Reads those that have no row.
        """
        self._check_open()
        with self._typed(SaveError):
            self._write_touches(wait=True)
            return housekeeping.gc(self._folder, self._index)

    def rebuild(self) -> None:
        """Make the index anew from the files. Pins are kept if the old one can be read. Others wait meanwhile."""
        pins = []
        with self._typed(SaveError):
            with contextlib.suppress(sqlite3.Error):
                pins = self._index.pins()
            self._index.database.rebuild()
            self._index.add_pins(pins)

    def flush(self) -> None:
        """Write down what was used, and move the index's log into its file."""
        self._check_open()
        self._try_touches(wait=True)
        # What cannot be moved is safe where it is.
        with contextlib.suppress(StoreLockedError, sqlite3.Error, OSError):
            self._index.database.checkpoint()

    def close(self) -> None:
        """:meth:`flush`, and let go. Idempotent."""
        if self._closed:
            return
        self._try_touches(wait=True)
        self._closed = True
        self._index.close()

    def __repr__(self) -> str:
        return f"<llamastate.prefix.DiskTier {self.path!r}>"

    # --- helpers ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _typed(self, kind: type[FileAccessError | SaveError]) -> Iterator[None]:
        """What cannot be passed over, by an error that says where."""
        self._check_open()
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            if isinstance(error, LlamaStateError):
                raise
            reason = _reason(error)
            message = f"the store {self.path!r} does not work as it should: {reason}"
            code = {"code": error.errno if isinstance(error, OSError) else None} if kind is FileAccessError else {}
            raise kind(message, path=self.path, reason=reason, **code) from error

    def _quietly(self, work: Callable[[], T], otherwise: T) -> T:
        """What must not fail because of the disk: a store that cannot be read is an empty one."""
        self._check_open()
        try:
            return work()
        except (sqlite3.Error, OSError, StoreLockedError) as error:
            self._warn(error)
            return otherwise

    def _warn(self, error: Exception) -> None:
        with self._lock:
            if self._warned:
                return
            self._warned = True
        warnings.warn(f"the store {self.path!r} does not work as it should: {error}", RuntimeWarning, stacklevel=4)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the store is closed", what="store")

    def _count(self, **by: int) -> None:
        with self._lock:
            for name, n in by.items():
                setattr(self._counters, name, getattr(self._counters, name) + n)


def _is_refusal(error: Exception) -> bool:
    """Whether somebody may read what he may not write."""
    if isinstance(error, OSError):
        return error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
    return "readonly" in str(error)


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _forked() -> None:
    for tier in list(_alive):
        tier._reset()


os.register_at_fork(after_in_child=_forked)
