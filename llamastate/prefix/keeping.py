"""What a store does besides putting in and taking out: what stays, what goes, and what there is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llamastate.arrays import TokensLike
from llamastate.errors import ClosedError
from llamastate.prefix.chain import pin_name
from llamastate.prefix.checks import at_least
from llamastate.prefix.match import Chain, find
from llamastate.prefix.stats import Counters, PrefixStats

if TYPE_CHECKING:
    from typing_extensions import Self

    from llamastate.context import Context
    from llamastate.prefix.disk import Damaged, DiskTier, Reclaimed
    from llamastate.prefix.levels import Levels
    from llamastate.prefix.ram import RamTier

__all__ = ["Keeping"]


class Keeping:
    """The part of :class:`~llamastate.prefix.PrefixStore` that looks at no model."""

    block_tokens: int
    _ram: RamTier
    _disk: DiskTier | None
    _levels: Levels
    _counters: Counters

    def _chain_for(self, tokens: TokensLike, ctx: Context | None) -> Chain | None:
        raise NotImplementedError

    def pin(self, tokens: TokensLike, *, ctx: Context | None = None) -> int:
        """Keep the stored prefix of these tokens, whatever else has to go; until :meth:`unpin` of the same tokens.

        Returns
        -------
        int
            How many tokens are pinned: as many as :meth:`lookup` tells, unless the disk refuses some.

        Raises
        ------
        SaveError
            The folder cannot be written.

        Notes
        -----
        It holds the blocks that are there now, on disk if there is one, else in memory; not those that follow later.
        What only a remote place has is fetched. Pins are counted, and those on disk hold for every process.
        """
        chain = self._chain_for(tokens, ctx)
        bad: set[bytes] = set()
        while chain is not None:
            match = find(self._levels, chain, self.block_tokens, bad=bad)
            if not match.n_tokens:
                break
            keys = chain.keys[1 : match.n_blocks + 1] if chain.kind != "recurrent" else []
            keys = [*keys, *([match.anchor] if match.anchor else [])]
            missing = self._levels.pin(pin_name(chain.root, chain.ids), match.n_tokens, keys)
            if not missing:
                return match.n_tokens
            bad |= missing
        return 0

    def unpin(self, tokens: TokensLike, *, ctx: Context | None = None) -> int:
        """Take a :meth:`pin` of the same tokens back, the shortest of several, and nothing but what it held.

        Returns
        -------
        int
            What that pin returned; 0 if there is none.

        Raises
        ------
        SaveError
            The folder cannot be written.
        """
        chain = self._chain_for(tokens, ctx)
        return 0 if chain is None else self._levels.unpin(pin_name(chain.root, chain.ids))

    def evict(self, n_bytes: int | None = None) -> int:
        """Let go what was used least recently: so many bytes or a little more, or everything that is not pinned.

        Returns
        -------
        int
            Bytes freed, on disk if there is one, else in memory.

        Raises
        ------
        SaveError
            The folder cannot be written.
        """
        if n_bytes is not None:
            n_bytes = at_least("n_bytes", n_bytes, 0)
        self.flush()
        if self._disk is None:
            return self._ram.evict(n_bytes)
        if n_bytes is None:
            self._ram.evict()
            n_bytes = self._disk.stats().bytes
        return self._disk.evict(n_bytes)

    def flush(self) -> None:
        """Wait until everything that was put is written."""
        self._check_open()
        self._levels.flush()

    def stats(self) -> PrefixStats:
        """What the store holds and what it has done in this process. Raises ``FileAccessError`` if nobody can tell."""
        self._check_open()
        disk = None if self._disk is None else self._disk.stats()
        # any tier may be beyond the disk; ours counts
        count = getattr(self._levels.remote, "stats", None)
        return self._counters.stats(self._ram, disk, None if count is None else count())

    def verify(self, *, drop: bool = True) -> list[Damaged]:
        """Read every file and check every byte; the damaged ones, which are dropped unless told otherwise.

        Raises ``FileAccessError`` if the index cannot be read.
        """
        self.flush()
        return [] if self._disk is None else self._disk.verify(drop=drop)

    def gc(self) -> Reclaimed | None:
        """Mend what crashes have left: rows without a file, files without a row, temporary ones.

        Raises ``SaveError`` if the folder cannot be written.
        """
        self.flush()
        return None if self._disk is None else self._disk.gc()

    def close(self) -> None:
        """Write what is waiting, and let go. Idempotent.

        A store that is not closed is written out when the interpreter ends, or when it is collected.
        """
        self._levels.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._levels.closed:
            raise ClosedError("the store is closed", what="store")
