"""The output of a batch: a file that only grows, and of which what is written once is never lost.

A line is in the kernel's hands as soon as it is written, so it survives the end of the process, however that comes; a
thread brings lines to the disk once a second, after which they survive a loss of power too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from llamastate import namelocks
from llamastate.atomic import fsync_folder, write_atomically
from llamastate.batch.journal import Index, Journal, Record, is_beginning, is_headed, read_record
from llamastate.errors import (
    CorruptStateError,
    FileAccessError,
    LlamaStateError,
    OutputMovedError,
    SaveError,
    StoreFullError,
    StoreLockedError,
)

__all__ = ["OutputFile", "StreamOutput", "open_output"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StreamOutput:
    """Where lines only pass through: a pipe, a terminal. Nothing can be resumed there."""

    n_found = n_failed_found = n_full_found = 0

    def __init__(self, file: BinaryIO, path: str = "-", *, close: bool = False) -> None:
        self._file = file
        self._close = close
        self.path = path
        self.n_written = 0

    def write(self, line: bytes) -> None:
        """Pass a line on."""
        with _typed(self.path):
            self._file.write(line)
            self._file.flush()
        self.n_written += 1

    def close(self, **facts: Any) -> None:
        """Let go of what was opened here."""
        if self._close:
            with contextlib.suppress(OSError):  # it was told when it was written
                self._file.close()


class OutputFile:
    """An output, locked, and ready to be added to.

    Parameters
    ----------
    path : path-like
    facts : mapping
        Of the run, as JSON types: everything that decides results.
    interval : float
        Seconds until what was written is on the disk, at most.

    Raises
    ------
    StoreLockedError
        Somebody writes to it.
    FileAccessError, SaveError
        It cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], facts: Mapping[str, Any], *, interval: float = 1.0) -> None:
        #: Absolute, links followed.
        self.path = os.path.realpath(os.fspath(path))
        #: Results in it.
        self.n_found = self.n_failed_found = self.n_full_found = self.n_written = 0
        self._end = 0  # of the last whole line
        self._interval = interval
        self._fd = -1
        self._error: LlamaStateError | None = None
        self._syncer: threading.Thread | None = None
        self._closing = threading.Event()
        self._dirty = False
        with _typed(f"{self.path}.lock"):
            self._lock: namelocks.Held | None = _lock(self.path)
        try:
            with _typed(f"{self.path}.journal"):
                self.journal = Journal(f"{self.path}.journal", facts)
        except BaseException:
            namelocks.drop(self._lock)
            raise

    # --- before anything is written -----------------------------------------------------------------------------------

    def records(self) -> Iterator[tuple[Record, bytes]]:
        """The results that are there, each with its line.

        What somebody was killed in the middle of writing is passed over; :meth:`open` removes it.

        Raises
        ------
        CorruptStateError
            It has a line that no run has written: ``section`` says which.
        OutputMovedError
            There were results, and there is no file.
        """
        with _typed(self.path):
            try:
                file = open(self.path, "rb")  # noqa: SIM115
            except FileNotFoundError:
                if self.journal.had_results:
                    raise OutputMovedError(
                        f"{self.path!r} is gone, and had results: put it back, or begin anew (resume=False)",
                        path=self.path, reason="not there",
                    ) from None  # fmt: skip
                return
            self._end = offset = 0
            bad: int | None = None
            with file:
                for number, line in enumerate(file, 1):
                    offset += len(line)
                    if not line.strip():
                        continue
                    record = read_record(line) if line.endswith(b"\n") else None
                    if record is None:
                        bad = bad or number
                    if bad is not None and (record is not None or not self._is_torn(line)):
                        raise self._foreign(bad)
                    if record is not None:
                        self._end = offset
                        yield record, line

    def _is_torn(self, line: bytes) -> bool:
        # Without a result the journal tells whose file it is; if a loss of power has left it empty, what is torn has
        # to say more itself: all of what our lines begin with, or nothing.
        if self._end or self.journal.known:
            return is_beginning(line)
        return self.journal.exists and (is_headed(line) or not line.strip(b"\0\n"))

    def _foreign(self, number: int) -> CorruptStateError:
        return CorruptStateError(
            f"line {number} of {self.path!r} was not written by this command; name another output, or move it away",
            path=self.path, reason="no line of ours", section=f"line {number}",
        )  # fmt: skip

    def require_ours(self) -> None:
        """Refuse to empty a file that somebody else wrote: its first line tells.

        Raises
        ------
        CorruptStateError
        """
        with _typed(self.path), contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            self._end = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    if read_record(line) is None and not self._is_torn(line):
                        raise self._foreign(number)
                    return

    def scan(self, index: Index, *, on_change: str, drop_failed: bool) -> int:
        """Find what is there; how many results are to be thrown away.

        Raises
        ------
        BatchChangedError
            Results of another run, and ``on_change`` is "error".
        CorruptStateError, OutputMovedError
            As :meth:`records`.
        """
        dropped = self.n_found = self.n_failed_found = self.n_full_found = 0
        for record, _ in self.records():
            if on_change == "error":
                self.journal.require_run(record.key.run, self.path)
            again = record.key.run != self.journal.run or (drop_failed and (record.failed or record.full))
            if again or not index.add(record.name, record.key):
                dropped += 1
            else:
                self.n_found += 1
                self.n_failed_found += record.failed
                self.n_full_found += record.full
        return dropped

    def open(self, keep: Callable[[Record], bool] | None, *, anew: bool = False, **facts: Any) -> None:
        """Make the file ready to be added to.

        Parameters
        ----------
        keep : callable, optional
            The file is first replaced, atomically, by one with only these results.
        anew : bool
            Throw everything away, if it is ours.
        **facts
            For the journal.

        Raises
        ------
        CorruptStateError
            ``anew``, and the file is somebody else's.
        """
        with _typed(self.path):
            if anew:
                self.require_ours()
                self.journal.forget()
                self.n_found = self._end = 0
            elif keep is not None:
                kept = 0

                def lines() -> Iterator[bytes]:
                    nonlocal kept
                    for record, line in self.records():
                        if keep(record):
                            kept += 1
                            yield line

                write_atomically(self.path, lines())
                self.n_found, self._end = kept, os.path.getsize(self.path)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (os.O_TRUNC if anew else 0)
            self._fd = os.open(self.path, flags, 0o666)
            if os.fstat(self._fd).st_size > self._end:
                os.ftruncate(self._fd, self._end)  # what is torn is at the end
            self.journal.begin(found=self.n_found, **facts)
            if self.n_found and not self.journal.had_results:
                self.journal.note(event="results")
            os.fsync(self._fd)
            fsync_folder(os.path.dirname(self.path))

    # --- writing ------------------------------------------------------------------------------------------------------

    def write(self, line: bytes) -> None:
        """Add a line. After that it survives the end of the process, within a second also a loss of power.

        Raises
        ------
        StoreFullError
            The disk is full. What was written before is there; resuming goes on.
        OutputMovedError
            The file is not where it was; this line is in it as well.
        SaveError
            Anything else that the system says.
        """
        self._fail()
        with _typed(self.path):
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[os.write(self._fd, rest) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, self._end)
                raise
            self._end += len(line)
            self.n_written += 1
            if not self.journal.had_results:
                self.journal.note(event="results")
        self._dirty = True
        if self._syncer is None:
            self._syncer = threading.Thread(target=self._sync_forever, name="llamastate-batch-sync", daemon=True)
            self._syncer.start()

    def _sync_forever(self) -> None:
        try:
            while not self._closing.wait(self._interval):
                self._sync()
        except LlamaStateError as error:
            self._error = error

    def _sync(self) -> None:
        if not self._dirty:
            return
        self._dirty = False
        with _typed(self.path):
            os.fsync(self._fd)
            try:
                there = os.path.samestat(os.stat(self.path), os.fstat(self._fd))
            except FileNotFoundError:
                there = False
            if not there:
                raise OutputMovedError(
                    f"{self.path!r} was moved away or replaced while results were written to it; all "
                    f"{self.n_found + self.n_written} are in the file that was moved: put it back to go on",
                    path=self.path, n_results=self.n_found + self.n_written, reason="moved",
                )  # fmt: skip

    def _fail(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self, **facts: Any) -> None:
        """Bring everything to the disk and let go. Idempotent.

        Parameters
        ----------
        **facts
            How the run ended, for the journal.
        """
        if self._lock is None:
            return
        self._closing.set()
        if self._syncer is not None:
            self._syncer.join()
        try:
            if self._fd >= 0:
                self._sync()
                self._fail()
                if facts:
                    with _typed(self.path):
                        self.journal.note(event="stop", written=self.n_written, **facts)
        finally:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            namelocks.drop(self._lock)
            self._lock = None


def open_output(
    output: Any, facts: Mapping[str, Any], *, interval: float = 1.0
) -> OutputFile | StreamOutput:  # fmt: skip
    """What ``output`` names: a file, or for "-", pipes, devices and file objects a stream."""
    if hasattr(output, "write"):
        return StreamOutput(output)
    if output == "-":
        if sys.stdout is None:
            raise FileAccessError(
                "cannot write to '-': standard output is closed", path="-", reason="closed", code=errno.EBADF
            )
        return StreamOutput(sys.stdout.buffer)
    try:
        path = os.fsdecode(output)
        found = os.stat(path)
    except FileNotFoundError:
        return OutputFile(path, facts, interval=interval)
    except (OSError, TypeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FileAccessError(f"cannot write to {output!r:.120}: {reason}", path=str(output), reason=reason) from None
    if stat.S_ISREG(found.st_mode):
        return OutputFile(path, facts, interval=interval)
    with _typed(path):
        return StreamOutput(open(path, "wb"), path, close=True)


def _lock(path: str) -> namelocks.Held:
    try:
        held = namelocks.acquire(f"{path}.lock", name=path)
    except StoreLockedError as error:
        raise StoreLockedError(f"another run writes to {path!r}", path=path) from error
    if held.count > 1:  # this very process: what its threads do to one output nobody could tell apart
        namelocks.drop(held)
        raise StoreLockedError(f"another run in this process writes to {path!r}", path=path)
    return held


@contextlib.contextmanager
def _typed(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, (LlamaStateError, BrokenPipeError)):
            raise
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            available = None
            with contextlib.suppress(OSError):
                available = shutil.disk_usage(os.path.dirname(path) or ".").free
            raise StoreFullError(
                f"there is no room for {path!r} to grow: {reason}; what was written is there, and resuming goes on",
                path=path, available=available,
            ) from error  # fmt: skip
        raise SaveError(f"cannot write {path!r}: {reason}", path=path, reason=reason) from error
    except ValueError as error:
        if isinstance(error, LlamaStateError):
            raise
        raise SaveError(f"cannot write {path!r}: {error}", path=path, reason=str(error)) from error
