"""Pins: they hold what they say, and an unpin takes back what its pin took."""

from __future__ import annotations

import contextlib

import pytest

from llamastate.prefix import PrefixStore
from tests.helpers import context, tokens
from tests.prefix.test_behind import Place

BLOCK = 16
IDS = tokens(128)


def open_store(path, **options):
    return PrefixStore(path, block_tokens=BLOCK, **options)


def put(store, ctx, n, seed=0):
    ids = tokens(n, seed=seed) if seed else IDS[:n]
    ctx.clear()
    ctx.decode(ids)
    store.put(ctx, 0, ids)
    store.flush()
    return ids


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_an_unpin_takes_nothing_of_anothers(tmp_path, where):
    """One pins when little is there, another when more is: the first does not let go what the second holds."""
    path = tmp_path if where == "disk" else None
    with context("dense", n_seq_max=2) as ctx, open_store(path) as store:
        other = open_store(path) if path else store
        put(store, ctx, 32)
        assert store.pin(IDS) == 32
        put(store, ctx, 128)
        assert other.pin(IDS, ctx=ctx) == 128
        assert store.pin(IDS[:64]) == 64
        assert store.unpin(IDS[:64]) == 64
        assert store.unpin(IDS) == 32
        store.evict()
        assert store.lookup(IDS) == 128
        assert other.unpin(IDS, ctx=ctx) == 128
        assert store.unpin(IDS) == 0
        store.evict()
        assert store.lookup(IDS) == 0
        other.close()


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("kind", ["iswa", "mamba", "jamba"])
def test_no_pin_is_left_behind(tmp_path, kind, where):
    """A later anchor is not what was pinned, and is not what is unpinned."""
    with context(kind, n_seq_max=2) as ctx, open_store(tmp_path if where == "disk" else None) as store:
        put(store, ctx, 40)
        assert store.pin(IDS) == 40
        put(store, ctx, 100)
        store.evict()
        assert store.lookup(IDS) == 40
        assert store.unpin(IDS) == 40
        store.evict()
        stats = store.stats()
        assert stats.ram_entries == 0
        assert stats.disk is None or (stats.disk.entries, stats.disk.pinned_bytes) == (0, 0)


def test_a_pinned_block_that_is_damaged(tmp_path):
    """What stood after it is let go like the rest; and if it comes again it is pinned."""
    with context("dense", n_seq_max=2) as ctx, open_store(tmp_path, ram_bytes=0) as store:
        put(store, ctx, 64)
        store.pin(IDS[:64])
        store.pin(IDS[:64])
        key = store._chain(ctx, IDS).keys[2]
        store._levels.drop(key)
        assert store.lookup(IDS) == 16
        put(store, ctx, 64)
        store.evict()
        assert store.lookup(IDS) == 64
        store._levels.drop(key)
        assert [store.unpin(IDS[:64]) for _ in range(3)] == [64, 64, 0]
        store.evict()
        assert store.stats().disk.entries == 0


def test_what_is_safe_on_disk_takes_no_memory(tmp_path):
    with context("dense", n_seq_max=2) as ctx, open_store(None) as probe:
        put(probe, ctx, 128)
        with open_store(tmp_path, ram_bytes=probe.stats().ram_bytes) as store:
            put(store, ctx, 128)
            assert store.pin(IDS) == 128
            others = put(store, ctx, 128, seed=5)
            assert store.lookup(others) == 128
            assert store.stats().dropped == 0


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_what_only_a_remote_place_has(tmp_path, where):
    place = Place()
    with context("dense", n_seq_max=2) as ctx:
        with open_store(None, remote=place) as store:
            put(store, ctx, 64)
        with open_store(tmp_path if where == "disk" else None, remote=place) as store:
            assert store.pin(IDS, ctx=ctx) == 64
            store.evict()
            place.entries.clear()
            assert store.lookup(IDS, ctx=ctx) == store.load(ctx, 0, IDS) == 64
        # where there is no room for all of it, only so much is said to be pinned
        with open_store(None) as probe:
            put(probe, ctx, 64)
            room = probe.stats().ram_bytes // 4 * 2
        with open_store(None, remote=place) as store:
            put(store, ctx, 64)
        sizes = {"disk_bytes": room} if where == "disk" else {"ram_bytes": room}
        with open_store(tmp_path / "2" if where == "disk" else None, remote=place, **sizes) as store:
            with pytest.warns(RuntimeWarning) if where == "disk" else contextlib.nullcontext():
                n = store.pin(IDS, ctx=ctx)
            store.evict()
            place.entries.clear()
            assert store.lookup(IDS, ctx=ctx) == n < 64


def test_nothing_to_pin(tmp_path):
    with context("dense", n_seq_max=2) as ctx, open_store(tmp_path) as store:
        assert store.pin(IDS) == store.unpin(IDS) == store.pin(IDS, ctx=ctx) == store.pin([], ctx=ctx) == 0
        put(store, ctx, 40)
        assert store.pin(tokens(50, seed=3)) == 0
        assert store.stats().disk.pinned_bytes == 0
