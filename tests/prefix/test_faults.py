"""What happens to a store, at a process' own hands or others', with models in play: decoding goes on, and is right."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from llamastate.errors import VersionMismatchError
from llamastate.prefix import PrefixStore
from llamastate.prefix.disk import DiskTier
from tests import children, helpers
from tests.helpers import context
from tests.prefix.disks import sound
from tests.prefix.test_store import BLOCK, ENDS, IDS, fill

FULL = """
import resource, sys, warnings
from tests.helpers import assert_same_logits, tokens
from tests.prefix.test_store import *

path, ram_bytes, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with context("iswa", **WAYS["unified"]) as ctx, PrefixStore(path, block_tokens=BLOCK, ram_bytes=ram_bytes) as kept:
    fill(kept, ctx, ends=(48,))
    kept.flush()
    # No file may be longer than a block is: blocks go in, and then the index cannot grow.
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(40):
            ids = np.r_[IDS[:48], tokens(60, seed=i)]
            ctx.seq_rm(0)
            n = kept.load(ctx, 0, ids)
            assert n == 48, n
            ctx.decode(ids[n:])
            kept.put(ctx, 0, ids)
            kept.flush()
    assert_same_logits(ctx.logits(), from_scratch("iswa", "unified", ids, [48]))
    print(len(caught), kept.stats().dropped > 0 or ram_bytes == 0, "takes no more" in str(caught[0].message))
"""


@pytest.mark.parametrize("ram_bytes", [0, 1 << 30])
@pytest.mark.parametrize("limit", [4096, 64_000])
def test_a_disk_that_takes_no_more(tmp_path: Path, ram_bytes: int, limit: int):
    """By the kernel's own refusal, of blocks or of the index: one warning; what was stored is had, the rest decoded."""
    done = children.run(FULL, tmp_path, ram_bytes, limit)
    assert (done.returncode, done.stdout.split()) == (0, ["1", "True", "True"]), done.stderr
    with contextlib.closing(DiskTier(tmp_path)) as tier:
        tier.gc()
        assert tier.verify() == []
        sound(tier)


EIGHT = """
import sys
from tests.helpers import assert_same_logits, tokens
from tests.prefix.test_store import *

sys.stdin.readline()
with context("lfm2swa", **WAYS["unified"]) as ctx, PrefixStore(sys.argv[1], block_tokens=BLOCK) as kept:
    hits = 0
    for i in range(12):
        ids = np.r_[IDS[:64], tokens(40, seed=i % 4)]
        ctx.seq_rm(0)
        n = kept.load(ctx, 0, ids, max_tokens=len(ids) - 1)
        assert n in (0, 64), n
        hits += n > 0
        if not n:
            ctx.decode(ids[:64])
            kept.put(ctx, 0, ids[:64])
        ctx.decode(ids[64:])
        assert_same_logits(ctx.logits(), from_scratch("lfm2swa", "unified", ids, [64]))
        kept.put(ctx, 0, ids)
    print(hits)
"""


def test_eight_processes(tmp_path: Path):
    """All begin at once, and put and load the same prompts: right for each, and stored once."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(children.start(EIGHT, tmp_path)) for _ in range(8)]
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            out, err = process.communicate(timeout=120)
            assert (process.returncode, err) == (0, "")
            assert int(out) >= 11
    with contextlib.closing(DiskTier(tmp_path)) as tier:
        sound(tier)
        assert tier.verify() == []
        # blocks: 4 shared, 2 of each of 4 ends; anchors: after what is shared, and at each end
        assert (tier.stats().blocks, tier.stats().anchors) == (4 + 4 * 2, 1 + 4)
        nothing = tier.gc()
        assert (nothing.adopted, nothing.lost, nothing.damaged, nothing.temporary) == (0, 0, 0, 0)


FORK = """
import os, sys
from llamastate.prefix import PrefixStore
from tests.prefix.entries import chain

store = PrefixStore(sys.argv[1])
entries = chain(6)
for entry in entries[:3]:
    store._levels.keep(entry)
with store._ram._lock, store._levels._lock, store._counters._lock:    # as another thread might, when the child is made
    child = os.fork()
    if child == 0:
        for entry in entries[3:]:
            store._levels.keep(entry)
        store.flush()
        ok = store._disk.known([e.key for e in entries[3:]]) == {e.key for e in entries[3:]}
        ok = ok and store.stats().ram_entries == 3
        store.close()
        os._exit(0 if ok else 1)
    _, status = os.waitpid(child, 0)
assert status == 0, status
store.flush()
assert store._disk.known([e.key for e in entries]) == {e.key for e in entries}
store.close()
print("done")
"""


def test_fork(tmp_path: Path):
    done = children.run(FORK, tmp_path)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_other_weights_of_the_same_shape(tmp_path: Path):
    with context("dense") as ctx, PrefixStore(tmp_path, block_tokens=BLOCK) as kept:
        fill(kept, ctx)
    with context(helpers.model("dense", seed=1)) as other, PrefixStore(tmp_path, block_tokens=BLOCK) as kept:
        assert kept.lookup(IDS, ctx=other) == 0
        assert kept.load(other, 0, IDS) == 0
        other.decode(IDS)
        assert kept.put(other, 0, IDS) == 144
        kept.flush()
        assert len(kept._disk.roots()) == 2
        assert kept.verify() == []
    assert ENDS[-1] == 130


def test_the_index_is_lost_while_it_is_used(tmp_path: Path):
    with (
        context("jamba", n_seq_max=4, kv_unified=True, n_ctx=512) as ctx,
        PrefixStore(tmp_path, block_tokens=BLOCK, ram_bytes=0) as kept,
    ):
        fill(kept, ctx)
        for name in ("index.sqlite", "index.sqlite-wal", "index.sqlite-shm"):
            (tmp_path / name).unlink(missing_ok=True)
        ctx.seq_rm(1)
        assert kept.load(ctx, 1, IDS) == 130
        assert kept.stats().disk.rebuilt == 1


def test_a_newer_store_is_refused_untouched(tmp_path: Path):
    PrefixStore(tmp_path).close()
    (tmp_path / "store.json").write_text('{"format": "llamastate prefix store", "version": 2}')
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(VersionMismatchError):
        PrefixStore(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
