"""What was of use, and when: the order in which a disk lets go."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping

from llamastate.prefix.database import now

__all__ = ["Recency"]

#: Seconds, and keys, for which what was used is kept in memory before it is written.
TOUCH_SECONDS = 5.0
TOUCH_KEYS = 1 << 16


class Recency:
    """Uses that are remembered, and written now and then.

    Parameters
    ----------
    latest : int
        When something was used last, as far as is known: time never goes back, whatever the clock does.

    Notes
    -----
    Safe to use from several threads.
    """

    def __init__(self, latest: int) -> None:
        self._latest = latest
        self.reset()

    def reset(self) -> None:
        """Forget what is not written; in the child of a fork, whose parent writes it."""
        self._lock = threading.Lock()
        #: What was used, and when, that the index does not know yet.
        self._used: dict[bytes, int] = {}
        self._written = time.monotonic()

    def now(self) -> int:
        """Later than whatever was before: a clock that is set back must not make what is used look old."""
        with self._lock:
            self._latest = max(now(), self._latest + 1)
            return self._latest

    def seen(self, latest: int) -> None:
        """Somebody else's clock has come so far."""
        with self._lock:
            self._latest = max(self._latest, latest)

    def use(self, keys: Iterable[bytes]) -> None:
        """These, and all that they stand on, were of use just now."""
        stamp = self.now()
        with self._lock:
            self._used.update(dict.fromkeys(keys, stamp))

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        with self._lock:
            return time.monotonic() > self._written + TOUCH_SECONDS or len(self._used) > TOUCH_KEYS

    def write(self, write: Callable[[Mapping[bytes, int]], object]) -> None:
        """Hand over what is not written. What cannot be written is kept for the next time, and the error raised."""
        with self._lock:
            used, self._used = self._used, {}
            self._written = time.monotonic()
        try:
            write(used)
        except BaseException:
            with self._lock:
                self._used = {**used, **self._used}
            raise
