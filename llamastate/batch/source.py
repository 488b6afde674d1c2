"""Where requests come from: lines of a file, a pipe, or anything that gives some."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import msgspec

from llamastate.batch.openai import MAX_LINE
from llamastate.errors import FileAccessError, InvalidArgumentError, StateFileNotFoundError

__all__ = ["Source"]


class Source:
    """Lines, read as they are asked for. What is a file can be read again."""

    def __init__(self, given: Any) -> None:
        self._given = given
        self.path: str | None = None
        if isinstance(given, (str, bytes, os.PathLike)) and given not in ("-", b"-"):
            self.path = os.fsdecode(given)
            try:
                if os.path.isdir(self.path):
                    raise IsADirectoryError(errno.EISDIR, "Is a directory", self.path)
                self._stat = os.stat(self.path)
            except FileNotFoundError:
                raise StateFileNotFoundError(f"there is no {self.path!r}", path=self.path, reason="not there") from None
            except (OSError, ValueError) as error:
                raise _unreadable(self.path, error) from None

    @property
    def again(self) -> bool:
        """Whether it can be read more than once."""
        return self.path is not None and stat.S_ISREG(self._stat.st_mode)

    @property
    def stamp(self) -> list[int] | None:
        """Tells a file from the same one changed."""
        return [self._stat.st_size, self._stat.st_mtime_ns] if self.again else None

    def count(self) -> int | None:
        """Lines, blank ones too."""
        if not self.again:
            return None
        n, last = 0, b"\n"
        with self._open() as file:
            while chunk := file.read(1 << 20):
                n, last = n + chunk.count(b"\n"), chunk
        return n + (not last.endswith(b"\n"))

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Numbered from 1, without the blank ones."""
        for number, raw in enumerate(self._raw(), 1):
            if raw.strip():
                yield number, raw

    def _raw(self) -> Iterator[bytes]:
        if self.path is not None:
            with self._open() as file:
                yield from _read(file, self.path)
        elif self._given in ("-", b"-"):
            with _stdin() as file:
                yield from _read(file, "-")
        elif hasattr(self._given, "readline"):
            yield from _read(self._given, "the input")
        else:
            for item in self._given:
                yield _as_line(item)

    def _open(self) -> BinaryIO:
        try:
            return open(str(self.path), "rb")
        except OSError as error:
            raise _unreadable(str(self.path), error) from None


@contextlib.contextmanager
def _stdin() -> Iterator[BinaryIO]:
    """Standard input, with a buffer of its own: a process cannot end while a thread waits in that of ``sys.stdin``."""
    try:
        number = os.dup(sys.stdin.fileno())
    except (OSError, ValueError, AttributeError):  # something else in its place
        yield sys.stdin.buffer
        return
    with open(number, "rb") as file:
        yield file


def _read(file: BinaryIO, path: str) -> Iterator[bytes]:
    while True:
        try:
            raw = file.readline(MAX_LINE + 1)
            if len(raw) > MAX_LINE:
                while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                    pass  # nothing of so long a line is kept
        except OSError as error:
            raise _unreadable(path, error) from None
        if not raw:
            return
        yield raw


def _as_line(item: Any) -> bytes:
    if isinstance(item, str):
        return item.encode("utf-8", "surrogatepass")
    if isinstance(item, (bytes, bytearray, memoryview)):
        return bytes(item)
    try:
        return msgspec.json.encode(dict(item) if isinstance(item, Mapping) else item)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgumentError(f"an item of the input is no JSON: {error}", name="input", value=item) from None


def _unreadable(path: str, error: Exception) -> FileAccessError:
    reason = getattr(error, "strerror", None) or str(error)
    return FileAccessError(
        f"cannot read {path!r}: {reason}", path=path, reason=reason, code=getattr(error, "errno", None)
    )
