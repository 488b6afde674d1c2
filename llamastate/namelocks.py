"""Names that a process has for itself: a lock file each, held by ``flock``.

The kernel lets a lock go when its process ends, however that ends. Within a process a lock is shared and counted: what
its threads do to one name they settle among themselves (:attr:`Held.mutex`). A lock file is removed when nobody holds
it any more; whoever gets a lock looks whether the file is still there, for it may have been removed while he waited.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from llamastate.errors import StoreLockedError

__all__ = ["Held", "acquire", "drop"]

_table = threading.Lock()
_held: dict[str, Held] = {}
#: Given back, but not taken out of the table yet: a finalizer may run in a thread that is in the middle of it.
_dropped: deque[Held] = deque()

#: Seconds between two tries; nothing wakes a waiter, since it may have to give up.
_PAUSE = 0.01
#: Seconds that even who does not want to wait does: to clean up after a crash, locks are held for a moment.
_GRACE = 0.05


@dataclass(eq=False)
class Held:
    """A lock that this process holds.

    Attributes
    ----------
    path : str
        The lock file; of a folder in which nothing can be written there is none, and nothing to protect either.
    count : int
        How often it was acquired and not dropped.
    mutex : threading.RLock
        For one operation at a time among the threads of this process.
    """

    path: str
    fd: int | None
    count: int = 0
    mutex: threading.RLock = field(default_factory=threading.RLock)  # type: ignore[valid-type,unused-ignore]


def acquire(path: str, *, name: str, timeout: float | None = 0.0, read_only: bool = False) -> Held:
    """Lock a name.

    Parameters
    ----------
    path : str
        The lock file, absolute.
    name : str
        For the error.
    timeout : float or None
        Seconds to wait for another process; None for ever.
    read_only : bool
        Go without a lock where no file can be made.

    Raises
    ------
    StoreLockedError
        Another process holds it.
    OSError
        The lock file cannot be made.
    """
    until = None if timeout is None else time.monotonic() + max(timeout, _GRACE)
    while True:
        held = _try(path, read_only=read_only)
        if held is not None:
            return held
        if until is not None and time.monotonic() >= until:
            raise StoreLockedError(f"another process holds the session {name!r}", path=path)
        time.sleep(_PAUSE)


def drop(held: Held) -> None:
    """Give a lock back; the last one to do so removes the lock file. May be called by a finalizer."""
    _dropped.append(held)
    _settle()


def _try(path: str, *, read_only: bool) -> Held | None:
    try:
        with _table:
            held = _held.get(path) or _open(path, read_only=read_only)
            if held is not None:
                _held[path] = held
                held.count += 1
            return held
    finally:
        _settle()


def _settle() -> None:
    """Do what was put off. Whoever is in the table now does so himself when he leaves."""
    while _dropped and _table.acquire(blocking=False):
        try:
            while _dropped:
                _let_go(_dropped.popleft())
        finally:
            _table.release()


def _let_go(held: Held) -> None:
    held.count -= 1
    if held.count or _held.get(held.path) is not held:
        return
    del _held[held.path]
    if held.fd is None:
        return
    with contextlib.suppress(OSError):
        os.unlink(held.path)  # while it is locked: who waits for it sees that it is gone, and makes a new one
    # Not only closed: a child that was forked meanwhile has the same file open, and would keep it locked.
    fcntl.flock(held.fd, fcntl.LOCK_UN)
    os.close(held.fd)


def _open(path: str, *, read_only: bool) -> Held | None:
    """Try once; None if another process holds it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if read_only and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return Held(path, None)
        raise
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), os.stat(path)):
            return Held(path, fd)
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _after_fork() -> None:
    """A child holds nothing: closing leaves the parent's locks alone, and the child cannot keep them by living on."""
    global _table  # noqa: PLW0603
    _table = threading.Lock()
    for held in _held.values():
        if held.fd is not None:
            os.close(held.fd)
    _held.clear()
    _dropped.clear()


os.register_at_fork(after_in_child=_after_fork)
