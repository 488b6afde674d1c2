"""Looking at, and damaging, the files of a store."""

from __future__ import annotations

from pathlib import Path

from llamastate.prefix.disk import DiskTier
from llamastate.prefix.entry import Entry


def files(tier: DiskTier) -> list[Path]:
    return sorted(Path(tier.path, "blocks").glob("*/*"))


def file_of(tier: DiskTier, entry: Entry) -> Path:
    return Path(tier.path, "blocks", entry.key.hex()[:2], entry.key.hex() + ".llblk")


def sound(tier: DiskTier) -> None:
    """Every file has its row and every row its file, and the totals are what they come to."""
    rows = {row.key.hex(): row for row in tier.entries()}
    assert {p.stem: p.stat().st_size for p in files(tier)} == {name: row.nbytes for name, row in rows.items()}
    stats = tier.stats()
    assert (stats.entries, stats.bytes) == (len(rows), sum(row.nbytes for row in rows.values()))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
