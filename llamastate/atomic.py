"""Replacing a file so that a crash at any instruction leaves the old one or the new one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

__all__ = ["fsync_folder", "litter_of", "write_atomically"]

#: Bytes in one write().
STEP = 2 << 20

SYNC_FILE_RANGE_WRITE = 2

#: Temporary files that this process is writing now.
_unfinished: set[str] = set()
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)-[0-9a-f]{8}\.tmp", re.DOTALL)


def litter_of(path: str) -> str | None:
    """The name of the file that was being replaced through this one, if nobody is at it any more.

    Parameters
    ----------
    path : str
        As :func:`write_atomically` would write it: absolute, if the folder was.

    Returns
    -------
    str or None
        None if it is no temporary file, this process is writing it, or a process lives that has the id of its writer.
    """
    match = _TEMPORARY.fullmatch(os.path.basename(path))
    if match is None or path in _unfinished:
        return None
    pid = int(match["pid"])
    return match["name"] if pid == os.getpid() or not _is_alive(pid) else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # somebody else's, or no process id at all: not ours to judge
    return True


def _find_sync_file_range() -> Any:
    """Linux's ``sync_file_range``, which the standard library does not have; ``None`` elsewhere."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


_start_writeback = _find_sync_file_range()


#: A replaced file of this many bytes takes milliseconds to be given back to the disk.
_LARGE = 4 << 20


def write_atomically(
    path: str | os.PathLike[str],
    chunks: Iterable[Any],
    *,
    durable: bool = True,
    head: tuple[int, Callable[[], Any]] | None = None,
) -> int:
    """Write ``chunks`` to ``path``: a temporary file beside it, fsync, rename, fsync of the folder.

    Parameters
    ----------
    path : path-like
        Where the file is to be. A symbolic link is followed: the file that it names is replaced, not the link.
    chunks : iterable of bytes-like
        Written in order, not copied.
    durable : bool
        Without it nothing waits for the disk; the replacement is atomic all the same, but a power cut may undo it.
    head : (int, callable), optional
        How many bytes the file has before ``chunks``, and what gives them when all else has been written: checksums can
        be computed meanwhile.

    Returns
    -------
    int
        Bytes written.

    Raises
    ------
    OSError
        Whatever the file system says; ``ValueError`` for a path with a NUL. The old file is untouched then, and the
        temporary one is gone.
    """
    target = os.path.realpath(os.fspath(path))
    folder, name = os.path.split(target)
    if os.path.islink(target):
        # what realpath() could not follow to an end
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), target)
    if os.path.isdir(target):
        # rename() would say so too, but only after everything has been written
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), target)
    if os.path.exists(target) and not os.path.isfile(target):
        # rename() would put an ordinary file in the place of a device: the end of /dev/null, for one
        raise OSError(errno.EINVAL, "Not a regular file", target)
    temporary = os.path.join(folder, f".{name[:200]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    _wait_for_room()
    _unfinished.add(temporary)
    try:
        # Opened first: once the file is in its place nothing may be left that can be refused.
        parent = _open_folder(folder) if durable else None
        try:
            return _write_through(temporary, target, chunks, parent, head)
        finally:
            if parent is not None:
                os.close(parent)
    finally:
        _unfinished.discard(temporary)


def _write_through(
    temporary: str,
    target: str,
    chunks: Iterable[Any],
    folder: int | None,
    head: tuple[int, Callable[[], Any]] | None,
) -> int:
    # O_EXCL: never write through something that somebody planted. A new file is as the umask says, one that is replaced
    # keeps its permissions: what was private stays so.
    try:
        mode = os.stat(target).st_mode & 0o777
    except OSError:
        mode = None
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        try:
            if mode is not None and hasattr(os, "fchmod"):
                os.fchmod(fd, mode)
            written = 0
            if head is not None:
                written = os.lseek(fd, head[0], os.SEEK_SET)
            written += sum(_write_all(fd, chunk) for chunk in chunks)
            if head is not None:
                os.lseek(fd, 0, os.SEEK_SET)
                _write_all(fd, head[1]())
            if folder is not None:
                os.fsync(fd)
        finally:
            os.close(fd)
        with _kept_for_later(target):
            os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if folder is not None:
        # a rename is only as safe as the folder that holds it
        os.fsync(folder)
    return written


#: Threads that give replaced files back to the disk.
_givers: list[threading.Thread] = []


@contextlib.contextmanager
def _kept_for_later(target: str) -> Iterator[None]:
    """Have a file that is replaced in the block given back to the disk by a thread.

    Whoever drops the last name of a file waits until all its blocks are free: of a large file a quarter of the time
    that writing the new one takes. While a descriptor is open that is left to its close.
    """
    fd = None
    with contextlib.suppress(OSError):
        if hasattr(os, "O_PATH") and os.stat(target).st_size >= _LARGE:
            fd = os.open(target, os.O_PATH | os.O_CLOEXEC)
    if fd is None:
        yield
        return
    try:
        yield
    finally:
        giver = threading.Thread(target=os.close, args=(fd,), name="llamastate-free", daemon=True)
        try:
            giver.start()
        except RuntimeError:  # no more threads, or the interpreter ends
            os.close(fd)
        else:
            _givers.append(giver)


def _wait_for_room() -> None:
    """The next file may need the room of the one before last."""
    while _givers:
        with contextlib.suppress(IndexError):
            _givers.pop().join()


def fsync_folder(folder: str) -> None:
    """Make the names in ``folder`` durable: of files that were made, renamed or removed there."""
    fd = _open_folder(folder)
    if fd is not None:
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _open_folder(folder: str) -> int | None:
    if os.name == "nt":  # Windows has no handle on a folder that could be flushed
        return None
    return os.open(folder or ".", os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))


def _write_all(fd: int, chunk: Any) -> int:
    view = memoryview(chunk)
    view = view.cast("B") if view.nbytes else memoryview(b"")
    total = view.nbytes
    while view:
        written = os.write(fd, view[:STEP])
        view = view[written:]
        if _start_writeback is not None and written == STEP:
            # The disk begins with this piece while the next is copied; fsync then waits for the last ones only. An
            # offset of 0 and a length of 0 mean the whole file: what is under way already is not begun again.
            _start_writeback(fd, 0, 0, SYNC_FILE_RANGE_WRITE)
    return total
