"""Numbers and tables as a command line takes and a terminal shows them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

__all__ = ["age", "bytes_of", "count", "print_table", "size"]

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]|[KMGT]i)?B?")


def size(n: float) -> str:
    """Bytes in words: ``"1.5 MB"``."""
    if n < 1000:
        return f"{n:.0f} B"
    for unit in ("kB", "MB", "GB"):
        n /= 1000
        if n < 1000:
            return f"{n:.1f} {unit}"
    return f"{n / 1000:.1f} TB"


def age(seconds: float) -> str:
    """A length of time in words: ``"3 h"``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def print_table(rows: Sequence[Sequence[str]], left: Sequence[int]) -> None:
    """Print rows, the first of them the heads; columns are set right, but for those numbered in ``left``."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())


def count(text: str) -> int:
    """For argparse: a number that is not negative."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


def bytes_of(text: str) -> int:
    """For argparse: a size such as ``20GB``."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; such are 500MB, 1.5GB, 20GiB")
    return int(float(match[1]) * _UNITS[match[2] or ""])
