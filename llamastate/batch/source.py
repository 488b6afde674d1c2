"""Where requests come from: lines of a file, a pipe, or anything that gives some."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import selectors
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, TypeAlias, cast

import msgspec

from llamastate.batch.openai import MAX_LINE, Line
from llamastate.errors import FileAccessError, InvalidArgumentError, LlamaStateError, StateFileNotFoundError

__all__ = ["Input", "Output", "Source", "check_input", "require_apart", "stat_of"]

#: Where requests may come from.
Input: TypeAlias = (
    "str | bytes | os.PathLike[str] | os.PathLike[bytes] | BinaryIO | Iterable[bytes | str | Mapping[str, Any]]"
)
#: Where results may go.
Output: TypeAlias = "str | bytes | os.PathLike[str] | os.PathLike[bytes] | BinaryIO"


class Source:
    """Lines, read as they are asked for. What is a file can be read again.

    Raises
    ------
    InvalidArgumentError
        Nothing that lines could come from.
    StateFileNotFoundError, FileAccessError
        There is no such file, or it cannot be read.
    """

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
        elif isinstance(given, Mapping):
            raise InvalidArgumentError(
                "the input is a mapping: one request, where a list of requests is wanted", name="input", value=given
            )
        elif isinstance(given, io.TextIOBase):
            raise InvalidArgumentError("the input is a file of text: open it with 'rb'", name="input", value=given)
        elif not hasattr(given, "readline") and not isinstance(given, Iterable) and given not in ("-", b"-"):
            raise InvalidArgumentError(
                f"the input is {type(given).__name__}, not a path, a binary file or requests", name="input", value=given
            )

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

    def lines(self) -> Iterator[tuple[int, bytes | Line]]:
        """Numbered from 1, without the blank ones. What cannot be put into a line comes as one with an error."""
        for number, raw in enumerate(self._raw(), 1):
            if raw.strip():
                yield number, raw

    def file_stat(self) -> os.stat_result | None:
        """Of the file that is read, if it is one."""
        if self.path is not None:
            return self._stat
        return stat_of(sys.stdin if isinstance(self._given, (str, bytes)) else self._given)

    def _raw(self) -> Iterator[bytes]:
        if self.path is not None:
            with self._open() as file:
                yield from _read(file, self.path)
        elif self._given in ("-", b"-"):
            if sys.stdin is None:
                raise FileAccessError(
                    "cannot read '-': standard input is closed", path="-", reason="closed", code=errno.EBADF
                )
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


def stat_of(file: Any) -> os.stat_result | None:
    """What the system knows of an open file; None if that is nothing."""
    try:
        return os.fstat(file.fileno())
    except (AttributeError, OSError, TypeError, ValueError):
        return None


def check_input(input: Input) -> None:  # noqa: A002
    """Find out whether there is an input at all, before anything is loaded for it.

    Raises
    ------
    StateFileNotFoundError, FileAccessError
    InvalidArgumentError
        It holds one JSON array, not lines.
    """
    source = Source(input)
    if not source.again:
        return
    for _, raw in source.lines():
        if isinstance(raw, bytes) and raw.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
            raise InvalidArgumentError(
                f"{source.path!r} holds a JSON array; what is wanted is JSON Lines, one object on each line",
                name="input", value=source.path,
            )  # fmt: skip
        return


def require_apart(**files: Any) -> None:
    """Refuse one file for two things.

    Parameters
    ----------
    **files
        Sources, paths, "-", file objects, None; by what they are for. The journal of ``output`` counts with it.

    Raises
    ------
    InvalidArgumentError
        ``name`` is what the second is for.
    """
    if isinstance(output := files.get("output"), (str, bytes, os.PathLike)) and output != "-":
        files["journal"] = f"{os.fsdecode(output)}.journal"
    found: list[tuple[str, os.stat_result]] = []
    for name, given in files.items():
        facts = _stat(name, given)
        if facts is None or not stat.S_ISREG(facts.st_mode):
            continue
        for other, seen in found:
            if os.path.samestat(seen, facts):
                raise InvalidArgumentError(
                    f"{other} and {name} are the same file, {given!r}",
                    name=name, value=given,
                )  # fmt: skip
        found.append((name, facts))


def _stat(name: str, given: Any) -> os.stat_result | None:
    if isinstance(given, Source):
        return given.file_stat()
    if given == "-":
        return stat_of(sys.stdin if name == "input" else sys.stdout)
    if isinstance(given, (str, bytes, os.PathLike)):
        with contextlib.suppress(OSError, ValueError):
            return os.stat(given)
        return None
    return stat_of(given)


def _read(file: BinaryIO, path: str) -> Iterator[bytes]:
    file = _patient(file)
    while True:
        try:
            raw = file.readline(MAX_LINE + 1)
            if not isinstance(raw, bytes):
                raise InvalidArgumentError(
                    f"reading the input gave {type(raw).__name__}, where bytes are wanted", name="input", value=file
                )
            more = False
            while len(raw) > MAX_LINE and not raw.endswith(b"\n") and (rest := file.readline(1 << 20)):
                more = more or bool(rest.strip())  # nothing of so long a line is kept
                if rest.endswith(b"\n"):
                    break
        except (OSError, ValueError) as error:
            if isinstance(error, LlamaStateError):
                raise
            raise _unreadable(path, error) from None
        if not raw:
            return
        # what was cut off must not leave a line that can be read
        yield raw.strip().ljust(MAX_LINE + 1, b"\0") if more else raw


def _patient(file: BinaryIO) -> BinaryIO:
    """The same file; but where it does not wait for what is to come, another that does.

    Python's buffers take "nothing yet" for the end, in the middle of a line too.
    """
    try:
        if os.get_blocking(file.fileno()):
            return file
    except (AttributeError, OSError, TypeError, ValueError):
        return file
    raw = getattr(file, "raw", file)
    ahead = b"" if raw is file else file.read(len(cast("io.BufferedReader", file).peek())) or b""
    return io.BufferedReader(_Patient(raw, ahead), 1 << 16)


class _Patient(io.RawIOBase):
    """A file that is waited for. Closing it leaves the file open."""

    def __init__(self, raw: Any, ahead: bytes) -> None:
        self._raw, self._ahead = raw, ahead

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._ahead:
            n = min(len(buffer), len(self._ahead))
            buffer[:n], self._ahead = self._ahead[:n], self._ahead[n:]
            return n
        while (read := self._raw.readinto(buffer)) is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._raw, selectors.EVENT_READ)
                selector.select()
        return int(read)


def _as_line(item: Any) -> bytes:
    if isinstance(item, str):
        return item.encode("utf-8", "surrogatepass")
    if isinstance(item, (bytes, bytearray, memoryview)):
        return bytes(item)
    try:
        return msgspec.json.encode(dict(item) if isinstance(item, Mapping) else item)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidArgumentError(f"an item of the input is no JSON: {error}", name="input", value=item) from None


def _unreadable(path: str, error: Exception) -> FileAccessError:
    reason = getattr(error, "strerror", None) or str(error)
    return FileAccessError(
        f"cannot read {path!r}: {reason}", path=path, reason=reason, code=getattr(error, "errno", None)
    )
