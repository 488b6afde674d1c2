"""Writing to a tier while the caller goes on."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable

__all__ = ["WriteBehind"]


class WriteBehind:
    """A thread that does one thing after the other.

    Parameters
    ----------
    name : str
        Of the thread.

    Notes
    -----
    What waits keeps alive what it needs; a thread with nothing to do keeps nothing alive. It begins with the first
    piece of work, and again in a child after ``fork()``, where nothing waits: the parent does what it had.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._queue: deque[Callable[[], object]] = deque()
        self._busy = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], object], *, limit: int | None = None) -> bool:
        """Do this too; what it raises is lost.

        Parameters
        ----------
        work : callable
        limit : int, optional
            Unless so many wait already.

        Returns
        -------
        bool
            False if it will not be done: too many wait, or this was closed. Where no thread can be had it is done at
            once, by the caller.
        """
        if self._pid != os.getpid():
            self._reset()
        with self._changed:
            if self._closed or (limit is not None and len(self._queue) >= limit):
                return False
            if self._begun():
                self._queue.append(work)
                self._changed.notify_all()
                return True
        _do(work)
        return True

    def _begun(self) -> bool:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                thread.start()
            except (RuntimeError, MemoryError):  # no more threads, or the interpreter ends
                return False
            self._thread = thread
        return True

    @property
    def waiting(self) -> int:
        """How many pieces of work are not done yet."""
        return len(self._queue) + self._busy if self._pid == os.getpid() else 0

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything is done; False if that took too long."""
        if self._pid != os.getpid():
            return True
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._busy, timeout)

    def end(self) -> None:
        """Do what there is, then end. Waits for nothing."""
        if self._pid == os.getpid():
            with self._changed:
                self._closed = True
                self._changed.notify_all()

    def close(self) -> None:
        """Do what there is, and end. Idempotent; returns when the thread has ended, unless it is the one that calls."""
        self.end()
        thread = self._thread if self._pid == os.getpid() else None
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                work = self._queue.popleft()
                self._busy = True
            _do(work)
            del work  # not until the next one comes
            with self._changed:
                self._busy = False
                self._changed.notify_all()


def _do(work: Callable[[], object]) -> None:
    # Whatever it is: others wait for the end of this thread's work.
    with contextlib.suppress(BaseException):
        work()
