"""What a place for entries has to offer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from llamastate.prefix.entry import Entry

__all__ = ["Tier"]


class Tier(Protocol):
    """A place that keeps entries by their keys. Safe to use from several threads.

    A tier never gives back bytes that were not verified, and never fails because of what it holds: an entry that is
    damaged or gone is one that is not there.
    """

    def known(self, keys: Sequence[bytes]) -> set[bytes]:
        """Which of these are there, without reading them."""

    def get(self, key: bytes) -> Entry | None:
        """The entry, verified; None if it is not there (any more)."""

    def put(self, entry: Entry) -> bool:
        """Keep an entry, sealed before if need be; False if it was there already.

        Raises
        ------
        StoreFullError
            There is no room, and none can be made.
        """

    def touch(self, keys: Iterable[bytes]) -> None:
        """These were of use just now."""

    def tails(self, parent: bytes) -> list[int]:
        """How many tokens after ``parent`` there are anchors, descending, each once."""

    def close(self) -> None:
        """Give up what is held open."""
