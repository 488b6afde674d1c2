"""How much of a chain of tokens is stored."""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

from llamastate.arrays import Int32Array
from llamastate.prefix.chain import anchor_key
from llamastate.prefix.levels import Levels

__all__ = ["Chain", "Match", "find"]


class Chain(NamedTuple):
    """The names of a sequence's prefixes."""

    root: bytes
    keys: list[bytes]
    ids: Int32Array
    kind: str


class Match(NamedTuple):
    """The longest prefix that is stored: so many blocks, and an anchor for kinds of memory that need one.

    Together they may reach a little further than the ``n_tokens`` that are wanted: the rest is to be removed again.
    """

    n_tokens: int
    n_blocks: int
    anchor: bytes | None = None
    anchor_end: int = 0


def find(
    levels: Levels, chain: Chain, block_tokens: int, limit: int | None = None, bad: Set[bytes] = frozenset()
) -> Match:
    """The longest prefix of a chain that is stored, of ``limit`` tokens at most and without the keys in ``bad``.

    Reads no entry.
    """
    size, n = block_tokens, len(chain.ids)
    limit = n if limit is None else min(limit, n)
    run = min(len(chain.keys) - 1, -(-limit // size))
    if chain.kind != "recurrent":
        known = levels.known(chain.keys[1 : run + 1]) - bad
        run = next((i for i, key in enumerate(chain.keys[1 : run + 1]) if key not in known), run)
    if chain.kind == "attention":
        return Match(min(run * size, limit), run)
    # a window reaches back far enough for one token less
    furthest = min(limit + (chain.kind == "iswa" and limit > 0), n)
    for i in range(run, -1, -1):
        for tail in levels.tails(chain.keys[i]):
            end = i * size + tail
            if not 0 < end <= furthest:
                continue
            key = anchor_key(chain.keys[i], chain.ids[i * size : end])
            if key not in bad and levels.known([key]):
                return Match(min(end, limit), i, key, end)
    return Match(0, 0)
