"""What a store has done, in numbers."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llamastate.prefix.diskstats import DiskStats
    from llamastate.prefix.ram import RamTier
    from llamastate.prefix.remote import RemoteStats

__all__ = ["Counters", "PrefixStats"]


@dataclass(frozen=True)
class PrefixStats:
    """What a store holds, and what it did in this process.

    Attributes
    ----------
    queries, hits : int
        Loads, and those that found something.
    query_tokens, hit_tokens : int
        Tokens that were asked for, and those that were restored: their quotient is the token hit rate.
    puts, stored_tokens, stored_bytes : int
        Puts, and tokens and bytes that were new then.
    put_seconds, load_seconds : float
        How long callers waited in puts and in loads. What is written behind them is not in it.
    dropped, damaged : int
        Entries that were not written for want of room, and those given up because their bytes were wrong.
    disk_reads, remote_reads : int
        Entries that were not in memory.
    ram_bytes, ram_anchor_bytes, ram_limit, ram_entries : int
        What is in memory, and ``ram_bytes`` as it was asked for.
    ram_evicted, ram_evicted_bytes : int
        Entries that had to leave it.
    disk : DiskStats or None
    remote : RemoteStats or None
        Their own numbers, if there are such tiers and they count.
    """

    queries: int
    hits: int
    query_tokens: int
    hit_tokens: int
    puts: int
    stored_tokens: int
    stored_bytes: int
    put_seconds: float
    load_seconds: float
    dropped: int
    damaged: int
    disk_reads: int
    remote_reads: int
    ram_bytes: int
    ram_anchor_bytes: int
    ram_limit: int
    ram_entries: int
    ram_evicted: int
    ram_evicted_bytes: int
    disk: DiskStats | None = None
    remote: RemoteStats | None = None

    @property
    def hit_rate(self) -> float:
        """Tokens restored for each token asked for, 0 to 1."""
        return self.hit_tokens / self.query_tokens if self.query_tokens else 0.0


@dataclass
class Counters:
    """The running numbers of :class:`PrefixStats`."""

    queries: int = 0
    hits: int = 0
    query_tokens: int = 0
    hit_tokens: int = 0
    puts: int = 0
    stored_tokens: int = 0
    stored_bytes: int = 0
    put_seconds: float = 0.0
    load_seconds: float = 0.0
    dropped: int = 0
    damaged: int = 0
    disk_reads: int = 0
    remote_reads: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def reset_lock(self) -> None:
        """In a child after ``fork()``: who held the lock is not here."""
        self._lock = threading.Lock()

    def add(self, **by: float) -> None:
        """Count so many more; from any thread."""
        with self._lock:
            for name, n in by.items():
                setattr(self, name, getattr(self, name) + n)

    def stats(self, ram: RamTier, disk: DiskStats | None, remote: RemoteStats | None) -> PrefixStats:
        """Freeze them."""
        with self._lock:
            counts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "_lock"}
        return PrefixStats(
            **counts,
            ram_bytes=ram.nbytes,
            ram_anchor_bytes=ram.anchor_bytes,
            ram_limit=ram.capacity,
            ram_entries=len(ram),
            ram_evicted=ram.evicted,
            ram_evicted_bytes=ram.evicted_bytes,
            disk=disk,
            remote=remote,
        )
