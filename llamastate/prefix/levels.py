"""The places of a store, one below the other: memory, disk, and whatever is beyond."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llamastate import lifetimes
from llamastate.errors import StoreFullError
from llamastate.prefix.ahead import into, read_ahead
from llamastate.prefix.behind import WriteBehind
from llamastate.prefix.entry import Entry, seal
from llamastate.prefix.ram import RamTier
from llamastate.prefix.stats import Counters
from llamastate.prefix.tiers import Tier

if TYPE_CHECKING:
    from llamastate.prefix.disk import DiskTier

__all__ = ["Levels"]

#: Keys of which it is known that they were read from the disk; about 150 bytes each.
REMEMBERED = 1 << 16
#: Entries that may wait for a slow remote place; about 300 bytes each while they are on disk.
FAR = 1 << 14

_alive: weakref.WeakSet[Levels] = weakref.WeakSet()


class Levels:
    """Memory over a disk over a remote place; all but the first may be missing.

    Parameters
    ----------
    ram : RamTier
    disk : DiskTier or None
    remote : Tier or None
    write_behind : bool
        Write what is put in a thread. Until it is written it stays in memory, whatever else has to go.
    counters : Counters
    """

    def __init__(
        self, ram: RamTier, disk: DiskTier | None, remote: Tier | None, *, write_behind: bool, counters: Counters
    ) -> None:
        self.ram = ram
        self.disk = disk
        self.remote = remote
        self._counters = counters
        self._lock = threading.Lock()
        self._warned = False
        self._used: OrderedDict[bytes, bool] = OrderedDict()
        self.closed = False
        below = write_behind and (disk is not None or remote is not None)
        self._behind = WriteBehind("llamastate-store") if below else None
        self._far = WriteBehind("llamastate-far") if below and disk is not None and remote is not None else None
        #: In the order in which entries pass through them.
        self._queues = [queue for queue in (self._behind, self._far) if queue is not None]
        weakref.finalize(self, _end, self._queues).atexit = False
        _alive.add(self)
        lifetimes.stores.add(self)

    def _after_fork(self) -> None:
        # A thread that is not here may have been inside, and what waits to be written is the parent's to write.
        self._lock = threading.Lock()
        self._counters.reset_lock()
        self.ram.forget()

    @property
    def lowest(self) -> bool:
        """Whether what has to leave memory is lost."""
        return self.disk is None and self.remote is None

    def _all(self) -> Iterator[Tier | RamTier]:
        yield self.ram
        if self.disk is not None:
            yield self.disk
        if self.remote is not None:
            yield self.remote

    # --- looking ------------------------------------------------------------------------------------------------------

    def known(self, keys: Sequence[bytes]) -> set[bytes]:
        """Which of these are anywhere."""
        found: set[bytes] = set()
        rest: Sequence[bytes] = keys
        for tier in self._all():
            if not rest:
                break
            found |= tier.known(rest)
            rest = [key for key in rest if key not in found]
        return found

    def tails(self, parent: bytes) -> list[int]:
        """How many tokens after ``parent`` there are anchors anywhere, descending."""
        lengths: set[int] = set()
        for tier in self._all():
            lengths.update(tier.tails(parent))
        return sorted(lengths, reverse=True)

    def touch(self, keys: Iterable[bytes]) -> None:
        """These were of use just now."""
        keys = list(keys)
        for tier in self._all():
            tier.touch(keys)

    def fetch(self, key: bytes) -> Entry | None:
        """The entry, if it is anywhere. It goes to the levels above too."""
        entry = self.ram.get(key)
        return self._from_below(key, None) if entry is None else entry

    def fetch_run(self, keys: Sequence[bytes], nbytes: int, *, keep: bool) -> Generator[Entry | None, None, None]:
        """The entries of these keys, in order.

        Parameters
        ----------
        keys : sequence of bytes
        nbytes : int
            Of each.
        keep : bool
            All of them are wanted at once. Otherwise an entry is valid until the next is asked for: what comes from the
            disk for the first time passes through two buffers, one being read while the other is used.
        """
        missing = len(keys) - len(self.ram.known(keys))
        if keep or self.disk is None or missing < 2 or 2 * nbytes > self.ram.capacity:
            yield from map(self.fetch, keys)
            return
        # More than there is room for would only drive out what is of use.
        worth = missing * nbytes <= self.ram.capacity // 2

        def get(key: bytes, buffer: npt.NDArray[np.uint8]) -> Entry | None:
            entry = self.ram.get(key)
            if entry is not None:
                return entry
            return self._from_below(key, None if worth and self._was_used(key) else buffer)

        with self.ram.lend(2 * nbytes) as there:
            if there:
                yield from read_ahead(keys, get, nbytes)
                return
            # Memory is full of what waits to be written: one buffer is all that may go beyond.
            buffer = np.empty(nbytes, np.uint8)
            for key in keys:
                yield self.ram.get(key) or self._from_below(key, buffer)

    def _was_used(self, key: bytes) -> bool:
        """Whether this key was read before, not long ago. What is read once is as well off in the system's cache."""
        with self._lock:
            known = self._used.pop(key, False)
            self._used[key] = True
            if len(self._used) > REMEMBERED:
                self._used.popitem(last=False)
            return known

    def _from_below(self, key: bytes, buffer: npt.NDArray[np.uint8] | None) -> Entry | None:
        """Read an entry; from the disk into ``buffer``, if there is one, else to be kept in memory."""
        entry = None
        if self.disk is not None:
            entry = self.disk.get(key, allocate=None if buffer is None else into(buffer))
        if entry is not None:
            self._counters.add(disk_reads=1)
        elif self.remote is not None:
            buffer = None
            entry = self.remote.get(key)
            if entry is not None:
                self._counters.add(remote_reads=1)
                if self.disk is not None:
                    try:
                        self.disk.put(entry)
                    except StoreFullError as error:
                        self.complain(error)
        if entry is not None and buffer is None:
            with contextlib.suppress(StoreFullError):
                self.ram.put(entry)
        return entry

    # --- putting in ---------------------------------------------------------------------------------------------------

    def keep(self, entry: Entry) -> None:
        """Put a new entry where it belongs. Raises :class:`StoreFullError`."""
        if self._behind is not None and entry.nbytes <= self.ram.capacity:
            try:
                new = self.ram.put(entry, hold=True)
            except StoreFullError:
                # Everything in memory waits for the disk. Waiting as well would hold up decoding.
                self._counters.add(dropped=1)
                raise
            if not new:
                self.ram.release([entry.key])
            elif not self._behind.submit(functools.partial(self._write_behind, entry)):
                self.ram.release([entry.key])
                self._counters.add(dropped=1)
            return
        if self.disk is None and self.remote is None:
            self.ram.put(entry)
            return
        self._write(entry)
        with contextlib.suppress(StoreFullError):
            self.ram.put(entry)

    def _write(self, entry: Entry) -> None:
        seal(entry)
        try:
            if self.disk is not None:
                self.disk.put(entry)
        finally:
            # what the disk refuses may be had from there
            if self.remote is not None:
                self.remote.put(entry)

    def _write_behind(self, entry: Entry) -> None:
        """Write what is held in memory, in the thread."""
        disk = self.disk
        if disk is None:
            self._send(entry.key, entry)
            return
        written = self._attempt(lambda: disk.put(entry))
        sent = False
        if self._far is not None:
            # What is on disk needs no memory until its turn comes, however slow the place is.
            work = functools.partial(self._send, entry.key, None if written else entry)
            sent = self._far.submit(work, limit=FAR)
            if not sent:
                self._attempt(_too_many)
        if written or not sent:
            self.ram.release([entry.key])

    def _send(self, key: bytes, entry: Entry | None) -> None:
        """Write to the remote place what is held in memory, or what is on disk."""

        def work() -> None:
            found = entry or self.ram.get(key) or (None if self.disk is None else self.disk.get(key))
            if found is None:
                raise _gone()
            seal(found)
            assert self.remote is not None
            self.remote.put(found)

        self._attempt(work)
        if entry is not None:
            self.ram.release([key])

    def _attempt(self, work: Callable[[], object]) -> bool:
        """Do what nobody waits for; whether it went well. Whatever is raised, all that is lost is one entry."""
        try:
            work()
        except BaseException as error:
            self._counters.add(dropped=1)
            # the warning may be an error: there is nobody here to meet it
            with contextlib.suppress(BaseException):
                self.complain(error)
            return False
        return True

    def complain(self, error: BaseException) -> None:
        """Say once that the store is full; inference goes on without it."""
        with self._lock:
            if self._warned:
                return
            self._warned = True
        warnings.warn(f"the prefix store takes no more: {error}", RuntimeWarning, stacklevel=4)

    def pin(self, name: bytes, n_tokens: int, keys: Sequence[bytes]) -> set[bytes]:
        """Keep these on disk, or in memory if there is no disk; see :meth:`RamTier.pin`."""
        near = self.ram if self.disk is None else self.disk
        self.flush(far=False)
        there = near.known(keys)
        for key in keys:
            entry = None if key in there else self.fetch(key)
            if entry is not None and self.disk is not None:
                with contextlib.suppress(StoreFullError):
                    self.disk.put(entry)
        return near.pin(name, n_tokens, keys)

    def unpin(self, name: bytes) -> int:
        """Take the shortest :meth:`pin` of a name back; its tokens."""
        return (self.ram if self.disk is None else self.disk).unpin(name)

    def drop(self, key: bytes) -> None:
        """Forget an entry whose bytes are wrong."""
        self._counters.add(damaged=1)
        self.ram.drop(key)
        if self.disk is not None:
            self.disk.drop(key)

    @property
    def waiting(self) -> int:
        """How many entries are on their way."""
        return sum(queue.waiting for queue in self._queues)

    def flush(self, *, far: bool = True) -> None:
        """Wait until everything that was put is written, or at least what goes to the first level below."""
        for queue in self._queues if far else self._queues[:1]:
            queue.flush()
        if self.disk is not None:
            self.disk.flush()

    def close(self) -> None:
        """Write what is waiting, and let go; the remote place is whoever's made it. Idempotent."""
        with self._lock:
            first, self.closed = not self.closed, True
        for queue in self._queues:
            queue.close()  # also waits for a thread that is closing this
        if first:
            if self.disk is not None:
                self.disk.close()
            self.ram.close()

    def abandon(self, name: str) -> None:
        """Nobody has closed this, and nobody can any more: write what is waiting all the same."""
        waiting = self.waiting
        if waiting and not self.closed:
            self._queues[0].submit(self.close)
            warnings.warn(f"{name} was not closed: {waiting} entries wait", ResourceWarning, stacklevel=2)


def _too_many() -> None:
    raise StoreFullError(f"{FAR} entries wait for the remote place", needed=1, available=0)


def _gone() -> StoreFullError:
    return StoreFullError("an entry had to leave the disk before the remote place took it", needed=1, available=0)


def _end(queues: Sequence[WriteBehind]) -> None:
    for queue in queues:
        queue.end()


def _forked() -> None:
    for levels in list(_alive):
        levels._after_fork()


os.register_at_fork(after_in_child=_forked)
