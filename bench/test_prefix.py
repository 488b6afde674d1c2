"""The prefix store: what it takes, what a put and a load cost, what a restart costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from bench.raw import CACHE
from bench.timing import no_gc, pairs, stopwatch
from llamastate import Context
from llamastate.prefix import PrefixStore
from tests import models

BLOCK = 64
SESSIONS, SHARED, OWN = 100, 1024, 64


def random_tokens(n: int, seed: int) -> npt.NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, 49152, n, dtype=np.int32)


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def filled(ctx: Context, tokens: npt.NDArray[np.int32], folder: Path) -> Iterator[Path]:
    """A store on disk that holds the 2,048 tokens."""
    with PrefixStore(folder / "store", block_tokens=BLOCK) as store:
        assert store.put(ctx, 0, tokens) == len(tokens)
    yield folder / "store"
    for seq in (1, 2, 3):
        ctx.seq_rm(seq)


def test_bytes_of_many_sessions(claim, new_context, tokens, folder):
    snapshots = 0
    with new_context() as ctx, PrefixStore(folder / "store", block_tokens=BLOCK) as store:
        ctx.prefill(tokens[:SHARED])
        row = ctx.state_seq_get_size(0) / SHARED
        for i in range(SESSIONS):
            ctx.seq_cp(0, 1)
            own = random_tokens(OWN, i)
            ctx.decode(own, seq_id=1)
            store.put(ctx, 1, np.r_[tokens[:SHARED], own])
            snapshots += ctx.state_seq_get_size(1)
            ctx.seq_rm(1)
        store.flush()
        taken = size_of(folder / "store")
    least = row * (SHARED + SESSIONS * OWN)
    claim(
        70,
        f"bytes on disk for {SESSIONS} sessions of {SHARED:,} shared and {OWN} own tokens, against the KV bytes of "
        f"{SHARED + SESSIONS * OWN:,} tokens",
        f"{taken / least:.3f} ×: {taken / 1e6:.1f} against {least / 1e6:.1f} MB (whole snapshots: "
        f"{snapshots / least:.1f} ×, {snapshots / 1e6:,.0f} MB)",
        taken / least,
        1.1,
    )


@pytest.mark.parametrize("write_behind", [True, False])
def test_cost_follows_what_is_new(claim, ctx, tokens, folder, write_behind):
    long, alone = [], []
    with PrefixStore(folder / "store", block_tokens=BLOCK, write_behind=write_behind) as store, no_gc():
        store.put(ctx, 0, tokens)
        for i in range(22):
            own = random_tokens(BLOCK, i)
            ctx.seq_rm(2)
            ctx.seq_cp(0, 2)
            ctx.decode(own, seq_id=2)
            whole = np.r_[tokens, own]
            ctx.seq_rm(1)
            other = random_tokens(BLOCK, 1000 + i)
            ctx.decode(other, seq_id=1)
            store.flush()
            start = time.perf_counter()
            assert store.put(ctx, 2, whole) == BLOCK
            long.append(time.perf_counter() - start)
            store.flush()
            start = time.perf_counter()
            assert store.put(ctx, 1, other) == BLOCK
            alone.append(time.perf_counter() - start)
    ctx.seq_rm(1)
    ctx.seq_rm(2)
    ours, theirs = float(np.median(long[2:])), float(np.median(alone[2:]))
    claim(
        71 if write_behind else 72,
        f"storing {BLOCK} new tokens of a session of {len(tokens):,}, against storing {BLOCK} tokens alone"
        + (" (written behind)" if write_behind else " (written before put returns)"),
        f"{ours / theirs:.2f} ×: {1e3 * ours:.2f} against {1e3 * theirs:.2f} ms",
        ours / theirs,
        3,
    )


@pytest.mark.parametrize(("row", "tier", "bar"), [(73, "RAM", 50), (74, "disk", 35)])
def test_load(benchmark, claim, ctx, tokens, filled, blob, row, tier, bar):
    target = np.empty_like(blob)
    copy = stopwatch(lambda: np.copyto(target, blob))
    # for the disk: room for the buffers that blocks pass through, and little more
    n_blocks = len(tokens) // BLOCK
    with PrefixStore(
        filled, block_tokens=BLOCK, ram_bytes=(1 << 30) if tier == "RAM" else 4 * blob.nbytes // n_blocks
    ) as store:
        while tier == "RAM" and store.stats().ram_entries < n_blocks:
            ctx.seq_rm(1)
            store.load(ctx, 1, tokens)
        reads, loads = store.stats().disk_reads, store.stats().queries

        def load() -> None:
            assert store.load(ctx, 1, tokens) == len(tokens)

        result = pairs(benchmark, load, copy, rounds=41, begin=lambda: ctx.seq_rm(1))
        read, loads = store.stats().disk_reads - reads, store.stats().queries - loads
        assert read == (0 if tier == "RAM" else n_blocks * loads)
    share = 100 / result.ratio
    claim(
        row,
        f"loading {len(tokens):,} tokens from {tier}"
        + (", page cache warm," if tier == "disk" else "")
        + " as a share of memcpy's bandwidth, checks included",
        f"{share:.0f} % (pairs {100 / result.pair_ratio:.0f} %): {1e3 * result.our_median:.2f} ms, memcpy "
        f"{1e3 * result.other_median:.2f} ms for {blob.nbytes / 1e6:.1f} MB",
        share,
        bar,
        at_least=True,
        unit="%",
    )


def child(task: dict[str, object]) -> dict[str, float]:
    """What ``python -m bench.prefix_child`` finds."""
    command = [sys.executable, "-m", "bench.prefix_child"]
    task = {"model": str(models.smollm2()), **task}
    # compiled modules, as of an installed package, whatever this process was told
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(CACHE / "pycache")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        command, input=json.dumps(task), stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def test_first_token_after_a_restart(claim, tokens, filled):
    found = [child({"what": "restart", "store": str(filled), "tokens": tokens.tolist()}) for _ in range(5)]
    with_store = float(np.median([f["with_store"] for f in found]))
    prefill = float(np.median([f["prefill"] for f in found]))
    opening = float(np.median([f["opening"] for f in found]))
    claim(
        75,
        f"time to first token, prefix of {len(tokens):,} after a restart (page cache warm), against its prefill",
        f"1/{prefill / with_store:.0f}: {1e3 * with_store:.1f} ms (of it {1e3 * opening:.1f} to open the store) "
        f"against {1e3 * prefill:,.0f} ms",
        prefill / with_store,
        100,
        at_least=True,
    )


def test_memory_beyond_the_bound(claim, tokens, folder):
    worst, texts = 0.0, []
    for threads in (1, 2):
        found = child(
            {"what": "memory", "store": str(folder / str(threads)), "tokens": tokens.tolist(), "threads": threads}
        )
        beyond = (found["peak"] - found["limit"]) / found["block"]
        # each thread is an operation, and so is the one that writes behind them
        worst = max(worst, beyond / (threads + 1))
        texts.append(f"{beyond:.2f} blocks with {threads + 1} operations at a time")
    claim(
        76,
        "RAM beyond ram_bytes, in blocks for each operation at a time",
        f"{worst:.2f} blocks: {'; '.join(texts)}",
        worst,
        1,
        unit="blocks",
    )
