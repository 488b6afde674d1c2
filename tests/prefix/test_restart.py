"""The store on disk: what one process has read, another need not."""

from __future__ import annotations

import pytest

from llamastate.prefix import PrefixStore
from tests import children
from tests.helpers import KINDS, assert_same_logits, context
from tests.prefix.test_store import BLOCK, ENDS, IDS, WAYS, fill, from_scratch


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_restart(kind, tmp_path):
    with context(kind, **WAYS["unified"]) as ctx, PrefixStore(tmp_path / "store", block_tokens=BLOCK) as kept:
        fill(kept, ctx)
    with context(kind, **WAYS["unified"]) as ctx, PrefixStore(tmp_path / "store", block_tokens=BLOCK) as kept:
        assert kept.lookup(IDS) == (144 if ctx.schema.kind == "attention" and ENDS[-1] >= 144 else kept.lookup(IDS))
        n = kept.load(ctx, 0, IDS, max_tokens=len(IDS) - 1)
        assert n == (128 if ctx.schema.kind == "attention" else 130)
        assert kept.stats().disk_reads > 0
        ctx.decode(IDS[n:])
        assert_same_logits(ctx.logits(), from_scratch(kind, "unified", IDS, [*ENDS, n]))
        assert kept.put(ctx, 0, IDS) > 0
        kept.flush()
        assert kept.verify() == []


def test_in_another_process(tmp_path):
    with context("iswa", **WAYS["unified"]) as ctx, PrefixStore(tmp_path, block_tokens=BLOCK) as kept:
        fill(kept, ctx)
    done = children.run(
        f"""
from tests.prefix.test_store import *
with context("iswa", **WAYS["streams"]) as ctx, PrefixStore({str(tmp_path)!r}, block_tokens=BLOCK) as kept:
    print(kept.load(ctx, 2, IDS), kept.lookup(IDS))
"""
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["130", "130"], "")


@pytest.mark.parametrize("write_behind", [True, False])
def test_a_damaged_file_shortens_the_prefix(tmp_path, write_behind):
    with (
        context("dense", **WAYS["unified"]) as ctx,
        PrefixStore(tmp_path, block_tokens=BLOCK, write_behind=write_behind) as kept,
    ):
        ctx.decode(IDS)
        kept.put(ctx, 0, IDS)
        key = list(kept._ram._entries)[4]
    (file,) = tmp_path.glob(f"blocks/*/{key.hex()}.llblk")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with context("dense", **WAYS["unified"]) as ctx, PrefixStore(tmp_path, block_tokens=BLOCK) as kept:
        assert kept.load(ctx, 0, IDS) == 4 * BLOCK
        ctx.decode(IDS[4 * BLOCK :])
        assert_same_logits(ctx.logits(), from_scratch("dense", "unified", IDS, [4 * BLOCK]))
        assert kept.put(ctx, 0, IDS) == BLOCK
        ctx.seq_rm(0)
        assert kept.load(ctx, 0, IDS) == 144


def test_memory_is_only_a_cache(tmp_path):
    """With no room in memory everything goes to the disk, and comes from there."""
    with context("dense", **WAYS["unified"]) as ctx, PrefixStore(tmp_path, block_tokens=BLOCK, ram_bytes=0) as kept:
        ctx.decode(IDS)
        assert kept.put(ctx, 0, IDS) == 144
        assert kept.stats().ram_bytes == 0
        assert kept.load(ctx, 1, IDS) == 144


def test_a_full_disk_refuses_and_inference_goes_on(tmp_path):
    with (
        context("dense", **WAYS["unified"]) as ctx,
        PrefixStore(tmp_path, block_tokens=BLOCK, ram_bytes=0, disk_bytes=1000) as kept,
    ):
        ctx.decode(IDS)
        with pytest.warns(RuntimeWarning, match="takes no more"):
            assert kept.put(ctx, 0, IDS) == 0
        assert kept.put(ctx, 0, IDS) == 0
        assert kept.load(ctx, 1, IDS) == 0


def test_from_the_disk_into_memory_the_second_time(tmp_path):
    with context("dense", **WAYS["unified"]) as ctx, PrefixStore(tmp_path, block_tokens=BLOCK) as kept:
        ctx.decode(IDS)
        kept.put(ctx, 0, IDS)
    with context("dense", **WAYS["unified"]) as ctx, PrefixStore(tmp_path, block_tokens=BLOCK) as kept:
        for reads, entries in ((9, 0), (18, 9), (18, 9)):
            ctx.seq_rm(1)
            assert kept.load(ctx, 1, IDS) == 144
            assert (kept.stats().disk_reads, kept.stats().ram_entries) == (reads, entries)
            ctx.decode(IDS[144:], seq_id=1)
            assert_same_logits(ctx.logits(), from_scratch("dense", "unified", IDS, [144]))


@pytest.mark.parametrize("at", [0, 1, 4, 8])
@pytest.mark.parametrize("how", ["flipped", "gone", "another"])
@pytest.mark.parametrize("ram_bytes", [0, 1 << 20])
def test_one_bad_block_of_many(tmp_path, at, how, ram_bytes):
    """While it is read ahead, or not: what comes before it is had."""
    with context("iswa", **WAYS["unified"]) as ctx, PrefixStore(tmp_path, block_tokens=BLOCK) as kept:
        fill(kept, ctx, ends=(16, 64, 130, 144))
        kept.flush()
        keys = [row.key for row in kept._disk.entries() if row.kind == 1]
        assert len(keys) == 9
    files = {key: next(tmp_path.glob(f"blocks/*/{key.hex()}.llblk")) for key in keys}
    bad = files[keys[at]]
    if how == "flipped":
        data = bytearray(bad.read_bytes())
        data[len(data) // 2] ^= 8
        bad.write_bytes(data)
    elif how == "gone":
        bad.unlink()
    else:
        bad.write_bytes(files[keys[at - 1]].read_bytes())
    with (
        context("iswa", **WAYS["unified"]) as ctx,
        PrefixStore(tmp_path, block_tokens=BLOCK, ram_bytes=ram_bytes) as kept,
    ):
        n = kept.load(ctx, 0, IDS)
        assert n == {0: 0, 1: 16, 4: 64, 8: 130}[at]
        ctx.decode(IDS[n:])
        assert_same_logits(ctx.logits(), from_scratch("iswa", "unified", IDS, [16, 64, 130, 144, n]))
        assert kept.put(ctx, 0, IDS) >= BLOCK
        kept.flush()
        assert kept.verify() == []
        ctx.seq_rm(1)
        assert kept.load(ctx, 1, IDS) == 150
