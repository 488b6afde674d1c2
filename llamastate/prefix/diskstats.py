"""What a store's folder holds, and what was done there, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DiskCounters", "DiskStats"]


@dataclass(frozen=True)
class DiskStats:
    """What a store holds on disk, and what this process did there.

    Attributes
    ----------
    blocks, anchors, bytes, anchor_bytes, pinned_bytes : int
        Of all processes.
    limit : int or None
        ``disk_bytes``.
    hits, reads : int
        Entries that were there, of those that were asked for.
    read_bytes, writes, written_bytes, evictions, evicted_bytes, damaged, rebuilt : int
        ``rebuilt`` counts how often the index was made anew.
    """

    blocks: int
    anchors: int
    bytes: int
    anchor_bytes: int
    pinned_bytes: int
    limit: int | None
    hits: int
    reads: int
    read_bytes: int
    writes: int
    written_bytes: int
    evictions: int
    evicted_bytes: int
    damaged: int
    rebuilt: int

    @property
    def entries(self) -> int:
        """Blocks and anchors."""
        return self.blocks + self.anchors


@dataclass
class DiskCounters:
    """The running numbers of :class:`DiskStats`."""

    hits: int = 0
    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    evictions: int = 0
    evicted_bytes: int = 0
    damaged: int = 0
