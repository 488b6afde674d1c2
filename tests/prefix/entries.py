"""Entries of random bytes: the same ones whenever they are asked for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llamastate.prefix.chain import anchor_key, block_keys
from llamastate.prefix.entry import Entry, Kind, build, seal

ROOT = b"root" * 8
#: Tokens of a block.
SIZE = 8


def tokens(n: int, seed: object) -> npt.NDArray[np.int32]:
    return np.random.default_rng(_number(seed)).integers(0, 32000, n, dtype=np.int32)


def _number(seed: object) -> list[int]:
    return list(str(seed).encode())


def rows(n_bytes: int, seed: object) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(_number(seed)).integers(0, 256, n_bytes, dtype=np.uint8)


def block(parent: bytes = ROOT, depth: int = 0, *, seed: object = 0, n_bytes: int = 500, root: bytes = ROOT) -> Entry:
    """A sealed block after ``depth`` others."""
    ids = tokens(SIZE, (seed, depth))
    key = block_keys(parent, ids, SIZE)[1]
    entry = build(
        Kind.BLOCK,
        key=key,
        parent=parent,
        root=root,
        start=depth * SIZE,
        tokens=ids,
        rows=rows(n_bytes, (seed, depth)),
    )
    seal(entry)
    return entry


def chain(n: int, *, seed: object = 0, n_bytes: int = 500, root: bytes = ROOT) -> list[Entry]:
    """Blocks, each after the one before."""
    entries: list[Entry] = []
    for i in range(n):
        parent = entries[-1].key if entries else root
        entries.append(block(parent, i, seed=seed, n_bytes=n_bytes, root=root))
    return entries


def anchor(parent: bytes, depth: int, tail: int, *, seed: object = 0, n_bytes: int = 500) -> Entry:
    """A sealed anchor ``tail`` tokens after ``depth`` blocks."""
    ids = tokens(tail, (seed, depth, tail))
    entry = build(
        Kind.ANCHOR,
        key=anchor_key(parent, ids),
        parent=parent,
        root=ROOT,
        start=depth * SIZE,
        tokens=ids,
        partial=rows(n_bytes, (seed, depth, tail)),
        logits=np.arange(7, dtype=np.float32),
    )
    seal(entry)
    return entry
