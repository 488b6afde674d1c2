"""Four processes that put, get and evict in one folder, of which one is killed again and again.

Run as a program: ``python -m tests.prefix.kills FOLDER KILLS SEED``. Forks instead of starting Pythons: a hundred of
those would take a minute.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
import traceback

import numpy as np

from llamastate.errors import StoreFullError
from llamastate.prefix.disk import DiskTier
from llamastate.prefix.entry import Entry
from tests.prefix.entries import ROOT, anchor, chain

CHAINS, DEPTH, BYTES = 6, 12, 3000


def catalogue() -> list[Entry]:
    entries = []
    for i in range(CHAINS):
        blocks = chain(DEPTH, seed=i, n_bytes=BYTES)
        entries += blocks
        entries += [anchor(b.key, d + 1, 3, seed=i, n_bytes=BYTES) for d, b in enumerate(blocks) if d % 4 == 3]
    return entries


def limit(entries: list[Entry]) -> int:
    """Room for half of them."""
    return sum(e.nbytes for e in entries) // 2


def work(folder: str, entries: list[Entry], seed: int) -> None:
    """Never ends by itself, but with an error if anything is wrong."""
    chance = random.Random(seed)
    tier = DiskTier(folder, disk_bytes=limit(entries))
    keys = [e.key for e in entries]
    while True:
        what = chance.random()
        at = chance.randrange(len(entries))
        if what < 0.5:
            with contextlib.suppress(StoreFullError):
                tier.put(entries[at])
        elif what < 0.9:
            found = tier.get(keys[at])
            if found is not None:
                np.testing.assert_array_equal(found.image, entries[at].image)
        elif what < 0.94:
            tier.touch(tier.known(keys))
            tier.tails(ROOT)
        elif what < 0.98:
            tier.evict(chance.randrange(20000))
        elif what < 0.99:
            tier.flush()
        else:
            tier.gc()


def start(folder: str, entries: list[Entry], seed: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work(folder, entries, seed)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


def main(folder: str, kills: int, seed: int) -> None:
    entries = catalogue()
    chance = random.Random(seed)
    pids = [start(folder, entries, seed * 1000 + i) for i in range(4)]
    try:
        for kill in range(kills):
            time.sleep(chance.uniform(0, 0.03))
            dead, status = os.waitpid(-1, os.WNOHANG)
            if dead:
                pids.remove(dead)
                sys.exit(f"one ended by itself, with {status}")
            victim = pids.pop(chance.randrange(4))
            os.kill(victim, signal.SIGKILL)
            os.waitpid(victim, 0)
            pids.append(start(folder, entries, seed * 1000 + 4 + kill))
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    print("killed", kills)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
