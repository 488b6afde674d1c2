"""The store in memory: exact for every kind of memory and every way a context can be made, or a miss."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest

from llamastate import Session
from llamastate.errors import (
    ClosedError,
    InvalidArgumentError,
    InvalidSequenceError,
    NotEnoughCellsError,
    TokenizeError,
    TokensMismatchError,
)
from llamastate.prefix import PrefixStore
from tests import helpers
from tests.helpers import KINDS, assert_same_logits, context, tokens

BLOCK = 16
IDS = tokens(150)
#: Where prompts ended: what cannot be cut is kept there.
ENDS = (48, 100, 130)

WAYS = {
    "unified": {"n_seq_max": 4, "kv_unified": True, "n_ctx": 512},
    "alone": {"n_seq_max": 1},
    "streams": {"n_seq_max": 3, "kv_unified": False},
    "transposed": {"n_seq_max": 2, "kv_unified": True, "n_ctx": 512, "flash_attn": "off"},
}


def store(**options):
    return PrefixStore(None, block_tokens=BLOCK, **options)


def fill(target, ctx, *, seq_id=0, ids=IDS, ends=ENDS):
    """Decode and put, prompt by prompt."""
    at = 0
    for end in ends:
        ctx.decode(ids[at:end], seq_id=seq_id)
        target.put(ctx, seq_id, ids[:end])
        at = end


def from_scratch(kind, way, ids, cuts):
    """Logits after ``ids``, decoded in the chunks that ``cuts`` makes."""
    with context(kind, **WAYS[way]) as ctx:
        edges = sorted({0, len(ids), *(c for c in cuts if c < len(ids))})
        for a, b in itertools.pairwise(edges):
            ctx.decode(ids[a:b])
        return ctx.logits()


#: Every combination that exists: what has no attention has no values to transpose.
PAIRS = [(kind, way) for kind in KINDS for way in WAYS if not (kind in ("mamba", "mamba2") and way == "transposed")]


@pytest.mark.parametrize(("kind", "way"), PAIRS)
def test_exact(kind, way):
    with context(kind, **WAYS[way]) as source, context(kind, **WAYS[way]) as target, store() as kept:
        fill(kept, source)
        n = kept.load(target, 0, IDS, max_tokens=len(IDS) - 1)
        assert n == (128 if target.schema.kind == "attention" else 130)
        assert target.seq_pos_max(0) == n - 1
        target.decode(IDS[n:])
        assert_same_logits(target.logits(), from_scratch(kind, way, IDS, [*ENDS, n]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_shorter_prefix_is_exact_too(kind):
    other = IDS.copy()
    other[110:] = (other[110:] + 1) % 256
    with context(kind, **WAYS["unified"]) as ctx, store() as kept:
        fill(kept, ctx)
        n = kept.load(ctx, 1, other)
        assert n == (96 if ctx.schema.kind == "attention" else 100)
        ctx.decode(other[n:], seq_id=1)
        assert_same_logits(ctx.logits(), from_scratch(kind, "unified", other, [*ENDS, n]))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_does_not_depend_on_the_way(kind):
    """A unified context and one of streams share what they store, byte for byte."""
    images = []
    for way in ("unified", "streams", "alone"):
        with context(kind, **WAYS[way]) as ctx, store() as kept:
            fill(kept, ctx)
            images.append({key: entry.image.tobytes() for key, entry in kept._ram._entries.items()})
    assert images[0] == images[1] == images[2]


@pytest.mark.parametrize("kind", KINDS)
def test_putting_and_loading_disturb_nothing_else(kind):
    with context(kind, **WAYS["unified"]) as ctx, context(kind, **WAYS["unified"]) as quiet, store() as kept:
        for each in (ctx, quiet):
            each.decode(IDS[:60], seq_id=0)
            each.decode(tokens(40, seed=3), seq_id=1)
        kept.put(ctx, 0, IDS[:60])
        assert kept.load(ctx, 2, IDS[:60]) in (48, 60)
        ctx.seq_rm(2)
        for seq in (0, 1):
            ctx.decode([7], seq_id=seq)
            quiet.decode([7], seq_id=seq)
            assert_same_logits(ctx.logits(), quiet.logits())


@pytest.mark.parametrize("kind", ["dense", "iswa", "jamba", "mamba"])
def test_over_what_a_sequence_holds(kind):
    with context(kind, **WAYS["unified"]) as ctx, store() as kept:
        fill(kept, ctx)
        ctx.decode(tokens(30, seed=5), seq_id=1)
        n = kept.load(ctx, 1, IDS)
        ctx.decode(IDS[n:], seq_id=1)
        assert_same_logits(ctx.logits(), from_scratch(kind, "unified", IDS, [*ENDS, n]))


def test_a_miss_leaves_the_sequence_empty():
    with context("dense", n_seq_max=2) as ctx, store() as kept:
        ctx.decode(IDS[:20])
        assert kept.load(ctx, 0, IDS) == 0
        assert ctx.seq_pos_max(0) == -1


def test_only_what_is_new_is_stored():
    with context("dense", **WAYS["unified"]) as ctx, store() as kept:
        ctx.decode(IDS)
        assert kept.put(ctx, 0, IDS[:100]) == 96
        assert kept.put(ctx, 0, IDS[:100]) == 0
        assert kept.put(ctx, 0, IDS) == 48
        assert kept.lookup(IDS) == 144
        assert kept.stats().stored_tokens == 144


def test_shared_blocks_are_stored_once():
    with context("dense", **WAYS["unified"]) as ctx, store() as kept:
        for seq in range(4):
            ids = np.concatenate([IDS[:64], tokens(32, seed=10 + seq)])
            ctx.decode(ids, seq_id=seq)
            kept.put(ctx, seq, ids)
        assert kept.stats().ram_entries == 4 + 4 * 2


def test_other_weights_never_match():
    with context(helpers.model("dense", seed=1)) as other, context("dense") as ctx, store() as kept:
        ctx.decode(IDS)
        kept.put(ctx, 0, IDS)
        assert kept.load(other, 0, IDS) == 0
        assert kept.lookup(IDS, ctx=other) == 0
        assert kept.lookup(IDS, ctx=ctx) == 144


def test_other_cache_types_never_match():
    with context("dense") as ctx, context("dense", type_k="q8_0", type_v="q8_0") as other, store() as kept:
        ctx.decode(IDS)
        kept.put(ctx, 0, IDS)
        assert kept.load(other, 0, IDS) == 0


def test_a_session_brings_its_checkpoints_and_logits():
    with context("iswa", **WAYS["unified"]) as ctx, store() as kept:
        session = Session(ctx, 0, checkpoint_every=32)
        session.feed(IDS)
        kept.put(session)
        assert kept.lookup(IDS[:140]) == 128
        n, logits = kept.load_with_logits(ctx, 1, IDS)
        assert n == len(IDS)
        assert logits is not None
        assert np.array_equal(logits, session.logits)


def test_damaged_in_memory_is_dropped():
    """Bytes that pass the store's own checks and are no state of this context never reach llama.cpp."""
    with context("dense", **WAYS["unified"]) as ctx, store() as kept:
        ctx.decode(IDS)
        kept.put(ctx, 0, IDS)
        entry = list(kept._ram._entries.values())[3]
        entry.rows[20:24] = 255  # a cell's position or owner
        n = kept.load(ctx, 1, IDS)
        assert n == 3 * BLOCK
        assert kept.stats().damaged == 1
        ctx.decode(IDS[n:], seq_id=1)
        assert_same_logits(ctx.logits(), from_scratch("dense", "unified", IDS, [n]))


def test_tokens_are_compared():
    with context("dense", **WAYS["unified"]) as ctx, store() as kept:
        ctx.decode(IDS)
        kept.put(ctx, 0, IDS)
        entry = list(kept._ram._entries.values())[2]
        entry.tokens[0] += 1
        assert kept.load(ctx, 1, IDS) == 2 * BLOCK


def test_memory_is_bounded():
    with context("dense", **WAYS["unified"]) as ctx, store() as probe:
        ctx.decode(IDS)
        probe.put(ctx, 0, IDS)
        size = probe.stats().ram_bytes // probe.stats().ram_entries
        with store(ram_bytes=5 * size) as kept:
            kept.put(ctx, 0, IDS[:48])
            with pytest.warns(RuntimeWarning, match="takes no more"):
                assert kept.put(ctx, 0, IDS) == 2 * BLOCK
            assert kept.stats().ram_bytes <= 5 * size
            assert kept.stats().ram_entries == 5
            # not the end, which nobody would find without the beginning
            assert kept.lookup(IDS) == kept.load(ctx, 1, IDS) == 5 * BLOCK
            # and what others put drives it out
            others = tokens(48, seed=9)
            ctx.decode(others, seq_id=2)
            assert kept.put(ctx, 2, others) == 48
            assert kept.lookup(IDS) == 2 * BLOCK
        with store(ram_bytes=0) as none, pytest.warns(RuntimeWarning, match="takes no more"):
            assert none.put(ctx, 0, IDS) == 0


@pytest.mark.parametrize(("kind", "way"), PAIRS)
def test_memory_with_room_for_one_prefix_gives_it_again_and_again(kind, way):
    """Also where a load puts the whole state together: what is loaded never goes for the load's own sake."""
    with context(kind, **WAYS[way]) as ctx, store() as probe:
        fill(probe, ctx)
        with store(ram_bytes=probe.stats().ram_bytes) as kept:
            kept.put(ctx, 0, IDS[:130])
            ctx.clear()
            for _ in range(2):
                n = kept.load(ctx, 0, IDS)
                assert n == kept.lookup(IDS) == (128 if ctx.schema.kind == "attention" else 130)
            assert kept.stats().ram_evicted == 0
            ctx.decode(IDS[n:])
            assert_same_logits(ctx.logits(), from_scratch(kind, way, IDS, [*ENDS, n]))


def test_pinned_entries_stay():
    with context("dense", **WAYS["unified"]) as ctx, store() as probe:
        ctx.decode(IDS[:64])
        ctx.decode(tokens(64, seed=9), seq_id=1)
        probe.put(ctx, 0, IDS[:64])
        with store(ram_bytes=probe.stats().ram_bytes + 1) as kept:
            kept.put(ctx, 0, IDS[:64])
            assert kept.pin(IDS[:64]) == 64
            with pytest.warns(RuntimeWarning):
                kept.put(ctx, 1, tokens(64, seed=9))
            assert kept.lookup(IDS[:64]) == 64
            assert kept.unpin(IDS[:64]) == 64
            assert kept.put(ctx, 1, tokens(64, seed=9)) == 64
            assert kept.lookup(IDS[:64]) == 0


def test_no_room_in_the_cache():
    with context("dense", **WAYS["unified"]) as ctx, store() as kept:
        ctx.decode(IDS)
        kept.put(ctx, 0, IDS)
        ctx.decode(tokens(300, seed=4), seq_id=1)
        with pytest.raises(NotEnoughCellsError):
            kept.load(ctx, 2, IDS)
        assert [ctx.seq_pos_max(s) for s in range(4)] == [149, 299, -1, -1]
        ctx.decode([1], seq_id=1)


def test_bad_arguments():
    with context("dense", **WAYS["unified"]) as ctx, store() as kept:
        ctx.decode(IDS[:20])
        with pytest.raises(TokensMismatchError) as caught:
            kept.put(ctx, 0, IDS)
        assert (caught.value.n_tokens, caught.value.pos_max) == (150, 19)
        for bad in (-1, 4, 300):
            with pytest.raises(InvalidSequenceError):
                kept.put(ctx, bad, IDS[:20])
            with pytest.raises(InvalidSequenceError):
                kept.load(ctx, bad, IDS)
        with pytest.raises(TokenizeError):
            kept.load(ctx, 0, [999_999])
        with pytest.raises(InvalidArgumentError):
            kept.put(ctx)
        with pytest.raises(InvalidArgumentError):
            kept.load(ctx, 0, IDS, max_tokens=-1)
        with pytest.raises(InvalidArgumentError):
            PrefixStore(None, block_tokens=0)
        assert ctx.seq_pos_max(0) == 19


@pytest.mark.parametrize(
    "options",
    [
        {"block_tokens": 1 << 31},
        {"block_tokens": 1.5},
        {"anchor_share": 7},
        {"anchor_share": 0},
        {"anchor_share": float("nan")},
        {"anchor_share": "half"},
        {"ram_bytes": -1},
        {"ram_bytes": "1GB"},
        {"remote": "s3://bucket"},
    ],
    ids=str,
)
def test_options_that_cannot_be(options, tmp_path):
    for path in (None, tmp_path / "s"):
        with pytest.raises(InvalidArgumentError) as caught:
            PrefixStore(path, **options)
        assert caught.value.name in options
    assert not (tmp_path / "s").exists()


def test_what_is_no_context():
    with store() as kept:
        for call in (
            lambda: kept.put(5, 0, IDS),
            lambda: kept.put(None, 0, IDS),
            lambda: kept.load(None, 0, IDS),
            lambda: kept.load_with_logits("x", 0, IDS),
            lambda: kept.lookup(IDS, ctx="x"),
            lambda: kept.pin(IDS, ctx=3),
            lambda: kept.unpin(IDS, ctx=3),
        ):
            with pytest.raises(InvalidArgumentError, match="not a Context"):
                call()


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_evict_so_many_bytes(tmp_path, where):
    """No more than are asked for, but for the rest of a block; the end of a chain first."""
    with (
        context("dense", **WAYS["unified"]) as ctx,
        PrefixStore(None if where == "memory" else tmp_path, block_tokens=BLOCK) as kept,
    ):
        ctx.decode(IDS)
        kept.put(ctx, 0, IDS)
        kept.load(ctx, 1, IDS)
        size = kept.stats().ram_bytes // 9
        assert kept.evict(0) == 0
        assert kept.evict(1) == size
        assert kept.evict(size + 1) == 2 * size
        if where == "memory":
            assert kept.lookup(IDS) == 6 * BLOCK
            assert kept.stats().ram_evicted == 3
        for bad in (-5, 1.5, "x"):
            with pytest.raises(InvalidArgumentError):
                kept.evict(bad)
        assert kept.evict() == 6 * size
        assert kept.lookup(IDS) == 0


def test_stores_share_a_remote_place():
    """Whoever made it closes it."""
    from llamastate.prefix import RemoteTier

    far = RemoteTier("memory://shared-by-stores")
    with context("dense", **WAYS["unified"]) as ctx, store(remote=far) as kept:
        ctx.decode(IDS)
        with store(remote=far) as other:
            other.put(ctx, 0, IDS)
        assert kept.load(ctx, 1, IDS) == 144
    far.close()


def test_moved_positions_are_not_stored():
    """They are an approximation: nobody who decodes the same tokens would get them."""
    with context("dense", **WAYS["unified"]) as ctx, store() as kept:
        ctx.decode(IDS[:40])
        ctx.seq_rm(0, 10, 20)
        ctx.seq_add(0, 20, -1, -10)
        ctx.decode([3])
        with pytest.raises(TokensMismatchError):
            kept.put(ctx, 0, np.r_[IDS[:10], IDS[20:40], 3])


def test_closed():
    kept = store()
    kept.close()
    kept.close()
    with context("dense") as ctx:
        for call in (lambda: kept.lookup(IDS), lambda: kept.load(ctx, 0, IDS), lambda: kept.put(ctx, 0, [])):
            with pytest.raises(ClosedError):
                call()


def test_threads():
    """Several threads, each in a context of its own, put and load in one store."""
    with store() as kept:
        wrong = []

        def work(seed):
            with context("dense", **WAYS["unified"]) as ctx:
                for turn in range(10):
                    ids = np.r_[IDS[:64], tokens(40, seed=(seed + turn) % 5)]
                    n = kept.load(ctx, 0, ids, max_tokens=len(ids) - 1)
                    ctx.decode(ids[n:])
                    if ctx.seq_pos_max(0) != len(ids) - 1:
                        wrong.append((seed, turn))
                    kept.put(ctx, 0, ids)
                    ctx.seq_rm(0)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert kept.stats().ram_entries == 4 + 5 * 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["dense", "iswa", "iswa11", "qwen2vl"])
def test_all_but_the_last_token(kind, way):
    """One is left to decode, though blocks and anchors end elsewhere."""
    ids = IDS[:144]
    with context(kind, **WAYS[way]) as source, context(kind, **WAYS[way]) as target, store() as kept:
        fill(kept, source, ids=ids, ends=(*ENDS, 144))
        n = kept.load(target, 0, ids, max_tokens=143)
        assert n == 143
        assert target.seq_pos_max(0) == 142
        target.decode(ids[n:])
        assert_same_logits(target.logits(), from_scratch(kind, way, ids, [*ENDS, n]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [0, 1, 47, 60, 99, 100, 129, 130, 500])
def test_at_most_so_many(kind, limit):
    with context(kind, **WAYS["unified"]) as ctx, store() as kept:
        fill(kept, ctx)
        n = kept.load(ctx, 1, IDS, max_tokens=limit)
        assert n == ctx.seq_pos_max(1) + 1 <= limit
        if ctx.schema.kind == "attention":
            assert n == min(limit, 128)
        elif ctx.schema.kind == "iswa":
            assert n == {0: 0, 1: 0, 47: 47, 60: 48, 99: 99, 100: 100, 129: 129, 130: 130, 500: 130}[limit]
        else:
            assert n == max(end for end in (0, *ENDS) if end <= limit)
        ctx.decode(IDS[n:], seq_id=1)
        assert_same_logits(ctx.logits(), from_scratch(kind, "unified", IDS, [*ENDS, n]))
