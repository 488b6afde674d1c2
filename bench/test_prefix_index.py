"""Finding the longest stored prefix among few blocks and among very many."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from bench.timing import no_gc, seconds
from llamastate.prefix.chain import block_keys
from llamastate.prefix.disk import DiskTier
from llamastate.prefix.entry import Kind
from llamastate.prefix.index import Index, Row

BLOCK = 64
TOKENS = 4096
ROOT = b"bench" * 6 + b"--"
SIZES = (10_000, 100_000, 1_000_000)
#: Prefixes that are looked up, each once: none finds the pages of its keys where the one before has left them.
PREFIXES = 150
ROUNDS = 120


def prefixes() -> list[npt.NDArray[np.int32]]:
    chance = np.random.default_rng(7)
    return [chance.integers(0, 49152, TOKENS, dtype=np.int32) for _ in range(PREFIXES)]


def rows(n: int) -> Iterator[Row]:
    """Rows of those prefixes, all over a table of ``n``; the rest are of nobody."""
    chance = np.random.default_rng(n)
    chains = [block_keys(ROOT, ids, BLOCK) for ids in prefixes()]
    every = n // (PREFIXES * (TOKENS // BLOCK))
    ours = ((keys[i], keys[i + 1], i) for i in range(TOKENS // BLOCK) for keys in chains)
    parent = ROOT
    for i in range(n):
        if i % every == 0 and (mine := next(ours, None)) is not None:
            yield Row(mine[1], mine[0], ROOT, Kind.BLOCK, mine[2] * BLOCK, BLOCK, 1_500_000, i)
        else:
            key = chance.bytes(32)
            yield Row(key, parent, ROOT, Kind.BLOCK, i % 64 * BLOCK, BLOCK, 1_500_000, i)
            parent = key


@pytest.fixture
def stores(folder: Path) -> Iterator[dict[int, DiskTier]]:
    """Stores of so many blocks, without their files: the index is all that a lookup asks."""
    made = {}
    for n in SIZES:
        path = folder / str(n)
        path.mkdir()
        Index(str(path / "index.sqlite"), lambda n=n: ((), rows(n))).close()  # type: ignore[misc]
        made[n] = DiskTier(path)
    yield made
    for tier in made.values():
        tier.close()


def test_longest_prefix(claim, stores):
    asked = prefixes()

    def lookup(tier: DiskTier, ids: npt.NDArray[np.int32]) -> int:
        keys = block_keys(ROOT, ids, BLOCK)[1:]
        known = tier.known(keys)
        return sum(1 for _ in itertools.takewhile(known.__contains__, keys)) * BLOCK

    medians, slowest, again = {}, {}, {}
    for n, tier in stores.items():
        assert tier.stats().blocks == n
        assert all(lookup(tier, ids) == TOKENS for ids in asked[ROUNDS:])
        todo = iter(asked[:ROUNDS])
        times = seconds(lambda tier=tier, todo=todo: lookup(tier, next(todo)), ROUNDS, warmup=0)
        medians[n], slowest[n] = 1e3 * float(np.median(times)), 1e3 * float(np.percentile(times, 95))
        again[n] = 1e3 * float(np.median(seconds(lambda tier=tier: lookup(tier, asked[0]), 101)))
    with no_gc():
        hashing = 1e3 * float(np.median(seconds(lambda: block_keys(ROOT, asked[0], BLOCK), 101)))
    small, large = SIZES[0], SIZES[-1]
    figures = ", ".join(f"{medians[n]:.2f} ms among {n:,}" for n in SIZES)
    claim(
        68,
        f"longest stored prefix of {TOKENS:,} tokens among {large:,} blocks",
        f"{medians[large]:.2f} ms, 95 % within {slowest[large]:.2f}; hashing is {hashing:.2f} of it",
        medians[large],
        1,
        unit="ms",
    )
    claim(
        69,
        f"the same, {large:,} blocks against {small:,}",
        f"{medians[large] / medians[small]:.2f} ×: {figures}; a prefix that was asked for just before "
        f"{again[large] / again[small]:.2f} ×: {again[large]:.2f} against {again[small]:.2f} ms",
    )
