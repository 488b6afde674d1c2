"""State files on disk: mapped for reading, replaced atomically for writing, every failure typed."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from llamastate.atomic import write_atomically
from llamastate.errors import FileAccessError, LoadError, SaveError, StateFileNotFoundError

__all__ = ["MappedFile", "naming", "reading", "save"]


@contextlib.contextmanager
def naming(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Name the file, if there is one, in load errors that come from below, where there are only bytes."""
    try:
        yield
    except LoadError as error:
        if error.path is None and path is not None:
            error.path = os.fsdecode(path)
        raise


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a regular file; whatever fails inside the block is a :class:`FileAccessError`."""
    try:
        name = os.fsdecode(path)
    except TypeError as error:
        raise FileAccessError(f"cannot read: {error}", reason="not a path") from None
    try:
        if not stat.S_ISREG(os.stat(name).st_mode):
            # opening a pipe would wait for its writer, and nothing but a file can be mapped
            raise OSError(errno.EINVAL, "Not a regular file", name)
        with open(name, "rb", buffering=0) as file:
            yield file
    except (OSError, ValueError) as error:
        code = getattr(error, "errno", None)
        reason = getattr(error, "strerror", None) or str(error)
        cls = StateFileNotFoundError if isinstance(error, FileNotFoundError) else FileAccessError
        raise cls(f"cannot read {name!r}: {reason}", path=name, reason=reason, code=code) from None


class MappedFile:
    """A file's bytes, mapped privately: writing to the view changes our copy of the page, never the file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._map: mmap.mmap | None = None
        with reading(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size:
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        self.view = memoryview(self._map if self._map is not None else b"")

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(self, *exc: object) -> None:
        # Not closed but let go: arrays made from the view (and the frames of a traceback) keep the map as long as they
        # need it, and closing it under them would be an error of ours.
        self.view = memoryview(b"")
        self._map = None


def save(
    path: str | os.PathLike[str],
    data: npt.NDArray[np.uint8],
    *,
    head: tuple[int, Callable[[], bytes]] | None = None,
) -> int:
    """Replace a file by ``data``, atomically and durably; the number of bytes, or :class:`SaveError`.

    ``head`` is how many bytes come before ``data``, and what gives them once all else is on its way to the disk.
    """
    try:
        name = os.fsdecode(path)
    except TypeError as error:
        raise SaveError(f"cannot write: {error}", reason="not a path") from None
    try:
        return write_atomically(name, [data.data], head=head)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SaveError(f"cannot write {name!r}: {reason}", path=name, reason=reason) from error
