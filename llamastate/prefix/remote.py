"""Entries on any file system that fsspec knows: an object store, another machine's disk, a folder.

::

    blocks/ab/<key>.llblk       the same bytes as on disk (llamastate.prefix.entry)
    tails/<parent>/<tail>       empty: there is an anchor so many tokens after that block
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import threading
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from llamastate.errors import ClosedError, InvalidArgumentError, LoadError, VersionMismatchError
from llamastate.prefix.entry import Entry, Kind, read, seal
from llamastate.prefix.folder import SUFFIX

__all__ = ["RemoteStats", "RemoteTier"]

T = TypeVar("T")

#: Keys whose presence is remembered; about 100 bytes each.
REMEMBERED = 1 << 17
#: Seconds for which it is believed that something is not there.
ABSENT_SECONDS = 30.0
#: Seconds without another try after a failure: doubled with each one that follows, up to the second.
BACK_OFF = (1.0, 60.0)

#: That there is no such file is a failure like any other.
_FAILURE = object()

_alive: weakref.WeakSet[RemoteTier] = weakref.WeakSet()


@dataclass
class RemoteStats:
    """What this process did at a remote place.

    Attributes
    ----------
    reads, hits, read_bytes, writes, written_bytes : int
        Entries that were asked for, those that came, and those that were written.
    damaged, failures : int
        Entries given up because their bytes were wrong; calls that failed.
    """

    reads: int = 0
    hits: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    damaged: int = 0
    failures: int = 0


class RemoteTier:
    """Entries on a file system of fsspec.

    Parameters
    ----------
    url_or_fs : str, path-like or fsspec.AbstractFileSystem
        Such as ``"s3://bucket/blocks"``; or a file system, and ``path`` says where in it.
    path : str, optional
        Below the URL, or in the file system.
    parallel : int, optional
        Questions at a time; by default 32 where the file system is asynchronous (object stores), else 1, for many of
        the others can be used by one thread at a time only.
    **storage_options
        For ``fsspec``, with a URL.

    Raises
    ------
    ImportError
        fsspec is not installed, or what it needs for this URL.
    InvalidArgumentError
        A file system without a path, or a protocol that fsspec does not know.

    Notes
    -----
    Nothing here fails because of the network: what cannot be reached is not there. The first failure is told by a
    warning; after each there is a pause without another try, of 1 s at first and a minute at most. How long a call may
    hang is the file system's own setting.

    Objects never change, and so what was found there is believed to be there: no question for it is asked twice. What
    was not found is asked for again after half a minute. The keys of a prefix are asked for side by side. Nothing is
    ever evicted: bound the place by its own means, such as a rule for the age of objects. What is gone there is a miss.
    """

    def __init__(
        self, url_or_fs: Any, path: str | None = None, *, parallel: int | None = None, **storage_options: Any
    ) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise ImportError("a remote tier needs fsspec: pip install 'llamastate[remote]'", name="fsspec") from error
        if isinstance(url_or_fs, (str, os.PathLike)):
            try:
                self._fs, base = fsspec.core.url_to_fs(os.fspath(url_or_fs), **storage_options)
            except ValueError as error:
                raise InvalidArgumentError(str(error), name="url_or_fs", value=url_or_fs) from error
            base = base if path is None else f"{base.rstrip('/')}/{path}"
        elif path is None or storage_options:
            raise InvalidArgumentError("a file system needs a path, and has its options", name="path", value=path)
        else:
            self._fs, base = url_or_fs, path
        self.path = str(base).rstrip("/")
        self._parallel = parallel or (32 if self._fs.async_impl else 1)
        self._stats = RemoteStats()
        self._closed = False
        self._warned = False
        self._inherited = False
        self._reset()
        _alive.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._present: OrderedDict[str, None] = OrderedDict()
        self._absent: dict[str, float] = {}
        self._lengths: dict[bytes, tuple[float, list[int]]] = {}
        self._failed = 0
        self._silent_until = 0.0

    # --- looking ------------------------------------------------------------------------------------------------------

    def known(self, keys: Sequence[bytes]) -> set[bytes]:
        """Which of these are there. Cost: about ``len(keys) / parallel`` round trips for those not asked for lately."""
        self._check_open()
        files = {self._file(key): key for key in keys}
        with self._lock:
            now = time.monotonic()
            there = {file for file in files if file in self._present}
            ask = [f for f in files if f not in there and now - self._absent.get(f, -ABSENT_SECONDS) >= ABSENT_SECONDS]
        there.update(self._ask(ask))
        return {files[file] for file in there}

    def _ask(self, files: list[str]) -> list[str]:
        if self._parallel == 1 or len(files) < 2:
            answers = [self._exists(file) for file in files]
        else:
            answers = list(self._threads().map(self._exists, files))
        return [file for file, answer in zip(files, answers, strict=True) if answer]

    def _exists(self, file: str) -> bool:
        # not exists(), to which a failure is a no
        there = self._attempt(lambda: bool(self._fs.info(file)), None, missing=False)
        if there is not None:
            self._remember(file, there)
        return bool(there)

    def tails(self, parent: bytes) -> list[int]:
        """How many tokens after ``parent`` there are anchors, descending, each once. One round trip, now and then."""
        self._check_open()
        with self._lock:
            asked, lengths = self._lengths.get(parent, (0.0, []))
            if asked and time.monotonic() - asked < ABSENT_SECONDS:
                return list(lengths)
        folder = self._tails(parent)

        def work() -> list[str]:
            self._fs.invalidate_cache(folder)
            return [str(name) for name in self._fs.ls(folder, detail=False)]

        names = self._attempt(work, None, missing=[])
        if names is None:
            return []
        found = {name.rstrip("/").rpartition("/")[2] for name in names}
        lengths = sorted((int(name) for name in found if name.isascii() and name.isdigit()), reverse=True)
        with self._lock:
            if len(self._lengths) >= REMEMBERED:
                self._lengths.clear()
            self._lengths[parent] = time.monotonic(), lengths
        return list(lengths)

    def get(self, key: bytes) -> Entry | None:
        """The entry, verified; None if it is not there, cannot be reached or is damaged.

        Notes
        -----
        One round trip. An object that is damaged when it is read a second time too is removed, so that a sound one can
        be put again.
        """
        self._check_open()
        self._count(reads=1)
        file = self._file(key)
        for last in (False, True):
            data = self._attempt(lambda: bytes(self._fs.cat_file(file)), None, missing=b"")
            if not data:
                if data is not None:
                    self._remember(file, there=False)
                return None
            try:
                entry = _read(data, key)
            except VersionMismatchError:
                return None
            except LoadError:
                if last:
                    self._count(damaged=1)
                    self._remove(file)
                continue
            self._remember(file, there=True)
            self._count(hits=1, read_bytes=entry.nbytes)
            return entry
        return None

    # --- putting in ---------------------------------------------------------------------------------------------------

    def put(self, entry: Entry) -> bool:
        """Write an entry, sealed before if need be; False if it was there already, or the place cannot be reached.

        Notes
        -----
        Two round trips for a block, three for an anchor. Where a write shows before it is complete (anything but an
        object store) it goes to another name first.
        """
        self._check_open()
        file = self._file(entry.key)
        if self.known([entry.key]):
            return False
        if not entry.sealed:
            seal(entry)
        if not self._attempt(lambda: self._write(file, entry.image.tobytes()), False):
            return False
        self._remember(file, there=True)
        self._count(writes=1, written_bytes=entry.nbytes)
        if entry.kind == Kind.ANCHOR:
            # after the anchor: a mark alone only costs a question
            marker = f"{self._tails(entry.parent)}/{entry.tail}"
            self._attempt(lambda: self._write(marker, b""), False)
            with self._lock:
                self._lengths.pop(entry.parent, None)
        return True

    def _write(self, file: str, data: bytes) -> bool:
        if self._fs.async_impl:
            self._fs.pipe_file(file, data)
            return True
        folder, _, name = file.rpartition("/")
        self._fs.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/.{name}.{secrets.token_hex(8)}.tmp"
        try:
            self._fs.pipe_file(temporary, data)
            self._fs.mv(temporary, file)
        except BaseException:
            with contextlib.suppress(Exception):
                self._fs.rm_file(temporary)
            raise
        return True

    def _remove(self, file: str) -> None:
        self._remember(file, there=False)
        self._attempt(lambda: self._fs.rm_file(file), None, missing=None)

    def touch(self, keys: Iterable[bytes]) -> None:
        """Nothing: nothing is evicted here."""

    def stats(self) -> RemoteStats:
        """What this process has done there."""
        with self._lock:
            return dataclasses.replace(self._stats)

    def close(self) -> None:
        """End the threads. The file system is the caller's. Idempotent."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __repr__(self) -> str:
        return f"<llamastate.prefix.RemoteTier {self.path!r} on {type(self._fs).__name__}>"

    # --- helpers ------------------------------------------------------------------------------------------------------

    def _file(self, key: bytes) -> str:
        name = key.hex()
        return f"{self.path}/blocks/{name[:2]}/{name}{SUFFIX}"

    def _tails(self, parent: bytes) -> str:
        return f"{self.path}/tails/{parent.hex()}"

    def _remember(self, file: str, there: bool) -> None:
        with self._lock:
            if there:
                self._absent.pop(file, None)
                self._present[file] = None
                if len(self._present) > REMEMBERED:
                    self._present.popitem(last=False)
            else:
                self._present.pop(file, None)
                if len(self._absent) >= REMEMBERED:
                    self._absent.clear()
                self._absent[file] = time.monotonic()

    def _attempt(self, work: Callable[[], T], otherwise: T, *, missing: Any = _FAILURE) -> T:
        """``work()``; ``otherwise`` if it fails or something has just failed, ``missing`` if there is no such file."""
        if time.monotonic() < self._silent_until:
            return otherwise
        try:
            if self._inherited:
                self._fs = type(self._fs)(*self._fs.storage_args, **self._fs.storage_options)
                self._inherited = False
            result = work()
        # Whatever it is, each library having errors of its own: decoding must go on.
        except Exception as error:
            if missing is _FAILURE or not isinstance(error, FileNotFoundError):
                self._fail(error)
                return otherwise
            result = missing
        self._failed = 0
        return result

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._stats.failures += 1
            if time.monotonic() >= self._silent_until:  # one of several at once makes the pause
                self._silent_until = time.monotonic() + min(BACK_OFF[1], BACK_OFF[0] * 2**self._failed)
                self._failed = min(self._failed + 1, 16)
            warned, self._warned = self._warned, True
        if not warned:
            warnings.warn(
                f"the remote store {self.path!r} cannot be reached: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=4,
            )

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._parallel, thread_name_prefix="llamastate-remote")
            return self._pool

    def _count(self, **by: int) -> None:
        with self._lock:
            for name, n in by.items():
                setattr(self._stats, name, getattr(self._stats, name) + n)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the store is closed", what="store")

    def _after_fork(self) -> None:
        # Neither threads nor the loop of an asynchronous file system live on in a child.
        self._reset()
        self._inherited = bool(self._fs.async_impl)


def _read(data: bytes, key: bytes) -> Entry:
    entry = read(data)
    if entry.key != key:
        raise LoadError("it is another entry", reason="key")
    return entry


def _forked() -> None:
    for tier in list(_alive):
        tier._after_fork()


os.register_at_fork(after_in_child=_forked)
