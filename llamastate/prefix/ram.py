"""Entries in memory, least recently used first to go."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from llamastate.errors import StoreFullError
from llamastate.prefix.entry import Entry, Kind

__all__ = ["RamTier"]


class RamTier:
    """A bounded number of bytes of entries.

    Parameters
    ----------
    ram_bytes : int

    Notes
    -----
    What has not been written to the tier below yet (`held`) or is pinned stays; everything else goes in the order of
    its last use, and an entry before those that it stands on. Safe to use from several threads.
    """

    def __init__(self, ram_bytes: int) -> None:
        self.capacity = ram_bytes
        self.evicted = 0
        self.evicted_bytes = 0
        self.forget()

    def forget(self) -> None:
        """Begin anew, pins and all: in a child after ``fork()``, where nobody knows what another thread was about."""
        self.nbytes = 0
        self.anchor_bytes = 0
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._held: Counter[bytes] = Counter()
        self._pins: dict[bytes, list[tuple[int, list[bytes]]]] = {}
        self._tails: dict[bytes, Counter[int]] = {}
        self._lent = 0

    def __len__(self) -> int:
        return len(self._entries)

    def known(self, keys: Sequence[bytes]) -> set[bytes]:
        """Which of these are there."""
        with self._lock:
            return {key for key in keys if key in self._entries}

    def get(self, key: bytes) -> Entry | None:
        """The entry, if it is there."""
        return self._entries.get(key)

    def put(self, entry: Entry, *, hold: bool = False) -> bool:
        """Keep an entry; False if it was there already.

        Parameters
        ----------
        hold : bool
            Keep it until :meth:`release`.

        Raises
        ------
        StoreFullError
            It has no room beside what is held.
        """
        with self._lock:
            if entry.key in self._entries:
                self._hold(entry.key, hold)
                return False
            self._make_room(entry.nbytes)
            self._entries[entry.key] = entry
            self._hold(entry.key, hold)
            self.nbytes += entry.nbytes
            if entry.kind == Kind.ANCHOR:
                self.anchor_bytes += entry.nbytes
                self._tails.setdefault(entry.parent, Counter())[entry.tail] += 1
            return True

    def pin(self, name: bytes, n_tokens: int, keys: Sequence[bytes]) -> set[bytes]:
        """Keep these until :meth:`unpin` of that name.

        Parameters
        ----------
        name : bytes
            Any number of pins may have it.
        n_tokens : int
            What :meth:`unpin` is to tell.
        keys : sequence of bytes

        Returns
        -------
        set of bytes
            Those that are not there. Nothing is pinned if there are any.
        """
        with self._lock:
            missing = {key for key in keys if key not in self._entries}
            if not missing:
                self._held.update(keys)
                self._pins.setdefault(name, []).append((n_tokens, list(keys)))
            return missing

    def unpin(self, name: bytes) -> int:
        """Take the shortest :meth:`pin` of a name back; its ``n_tokens``, or 0 if there is none."""
        with self._lock:
            if name not in self._pins:
                return 0
            n_tokens, keys = min(self._pins[name], key=lambda pin: pin[0])  # whoever pinned more still needs it
            self._pins[name].remove((n_tokens, keys))
            if not self._pins[name]:
                del self._pins[name]
        self.release(keys)
        return n_tokens

    def release(self, keys: Iterable[bytes]) -> None:
        """Take one :meth:`hold` back."""
        with self._lock:
            for key in keys:
                self._held[key] -= 1
                if self._held[key] <= 0:
                    del self._held[key]

    def touch(self, keys: Iterable[bytes]) -> None:
        """These were of use just now; the later in the chain, the sooner to go."""
        with self._lock:
            for key in reversed(list(keys)):
                if key in self._entries:
                    self._entries.move_to_end(key)

    def tails(self, parent: bytes) -> list[int]:
        """How many tokens after ``parent`` there are anchors, descending."""
        with self._lock:
            return sorted(self._tails.get(parent, ()), reverse=True)

    def drop(self, key: bytes) -> None:
        """Forget an entry."""
        with self._lock:
            if key in self._entries:
                self._remove(key)

    def evict(self, n_bytes: int | None = None) -> int:
        """Let so many bytes go, or a little more, or everything that is not held; how many those were."""
        with self._lock:
            before = self.nbytes
            self._let_go(before if n_bytes is None else n_bytes)
            return before - self.nbytes

    @contextlib.contextmanager
    def using(self, keys: Sequence[bytes], *, hold: bool) -> Iterator[set[bytes]]:
        """Which of these are not there; all of them stay for a while, if they are to be held, also those that come."""
        held = list(keys) if hold else []
        with self._lock:
            missing = {key for key in keys if key not in self._entries}
            self._held.update(held)
        try:
            yield missing
        finally:
            self.release(held)

    @contextlib.contextmanager
    def lend(self, nbytes: int) -> Iterator[bool]:
        """Give room to something else for a while: entries go for it. False if what is held leaves too little."""
        with self._lock:
            self._lent += nbytes
            self._shrink()
            there = self.nbytes + self._lent <= self.capacity
        try:
            yield there
        finally:
            with self._lock:
                self._lent -= nbytes

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._tails.clear()
            self._held.clear()
            self._pins.clear()
            self.nbytes = self.anchor_bytes = 0

    def _hold(self, key: bytes, hold: bool) -> None:
        if hold:
            self._held[key] += 1

    def _make_room(self, nbytes: int) -> None:
        fits = nbytes <= self.capacity - self._lent
        if fits:
            self._shrink(nbytes)
        if not fits or self.nbytes + self._lent + nbytes > self.capacity:
            available = max(0, self.capacity - self.nbytes - self._lent)
            raise StoreFullError(
                f"no room in memory for {nbytes} bytes: {available} of {self.capacity} can be had",
                needed=nbytes,
                available=available,
            )

    def _shrink(self, extra: int = 0) -> None:
        self._let_go(self.nbytes - max(0, self.capacity - self._lent - extra))

    def _let_go(self, nbytes: int) -> None:
        victims = []
        for key, entry in self._entries.items():
            if nbytes <= 0:
                break
            if not self._held.get(key):
                victims.append(key)
                nbytes -= entry.nbytes
                self.evicted_bytes += entry.nbytes
        for key in victims:
            self._remove(key)
        self.evicted += len(victims)

    def _remove(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self.nbytes -= entry.nbytes
        if entry.kind == Kind.ANCHOR:
            self.anchor_bytes -= entry.nbytes
            counts = self._tails[entry.parent]
            counts[entry.tail] -= 1
            if counts[entry.tail] <= 0:
                del counts[entry.tail]
                if not counts:
                    del self._tails[entry.parent]
