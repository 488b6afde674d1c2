"""Writing to a tier while the caller goes on."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

from llamastate.prefix.entry import Entry

__all__ = ["WriteBehind"]


class WriteBehind:
    """A thread that hands entries to ``write``, one after the other.

    Parameters
    ----------
    write : callable
        Must not raise.

    Notes
    -----
    The queue is as long as the caller lets it become: entries in it take the caller's memory. The thread begins with
    the first entry, and again in a child after ``fork()``, where the queue is empty: the parent writes what it had.
    """

    def __init__(self, write: Callable[[Entry], None]) -> None:
        self._write = write
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._queue: deque[Entry] = deque()
        self._busy = False
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, entry: Entry) -> None:
        """Write this one too."""
        if self._pid != os.getpid():
            self._reset()
        with self._changed:
            if self._closed:
                return
            self._queue.append(entry)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="llamastate-store", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything is written; False if that took too long."""
        if self._pid != os.getpid():
            return True
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._busy, timeout)

    def close(self) -> None:
        """Write what there is, and end."""
        if self._pid != os.getpid():
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                entry = self._queue.popleft()
                self._busy = True
            try:
                self._write(entry)
            finally:
                del entry  # not until the next one comes
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
