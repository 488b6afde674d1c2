"""A folder that is not as it should be: what cannot be read is not there; what cannot be done is said."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from llamastate.errors import FileAccessError, SaveError
from llamastate.prefix import PrefixStore
from llamastate.prefix.disk import DiskTier
from llamastate.prefix.entry import read, seal
from tests import children
from tests.helpers import context, tokens
from tests.prefix.disks import file_of, sound
from tests.prefix.entries import block, chain

BLOCK = 16
IDS = tokens(64)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def filled(tmp_path: Path):
    """A context that holds 64 tokens, and a store of the first 32."""
    with context("dense", n_seq_max=2) as ctx, PrefixStore(tmp_path / "s", block_tokens=BLOCK, ram_bytes=0) as store:
        ctx.decode(IDS)
        store.put(ctx, 0, IDS[:32])
        store.flush()
        yield ctx, store


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that others may enter: pytest's own are closed to them."""
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    with tempfile.TemporaryDirectory(prefix="llamastate-") as name:
        path = Path(name)
        path.chmod(0o755)
        if not all(parent.stat().st_mode & 0o001 for parent in path.parents):
            pytest.skip("nobody else may enter the folder of temporary files")
        yield path


# --- one block --------------------------------------------------------------------------------------------------------


def folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


def unreadable(path: Path) -> None:
    path.chmod(0o000)


#: Root reads everything; for others see the child below.
WAYS = [folder_in_its_place] if os.geteuid() == 0 else [folder_in_its_place, unreadable]


@pytest.mark.parametrize("how", WAYS)
def test_a_block_that_cannot_be_read(tmp_path: Path, how):
    with contextlib.closing(DiskTier(tmp_path)) as tier:
        a, b = chain(2)
        tier.put(a)
        tier.put(b)
        how(file_of(tier, a))
        assert tier.get(a.key) is None
        assert tier.known([a.key, b.key]) == {b.key}
        assert tier.put(a)  # in its place
        np.testing.assert_array_equal(tier.get(a.key).image, a.image)
        assert not tier.put(a)
        sound(tier)


SOMEBODY_ELSE = """
import os, sys, warnings
from pathlib import Path
from llamastate.prefix.disk import DiskTier
from tests.prefix.entries import chain
warnings.simplefilter("ignore")
os.umask(0)
a, b = chain(2)
tier = DiskTier(sys.argv[1])
tier.put(a)
tier.put(b)
tier.close()
for path in Path(sys.argv[1]).glob("blocks/*/*"):
    path.chmod(0o600)
for path in Path(sys.argv[1]).glob("index.sqlite*"):
    path.chmod(0o666)
os.seteuid(65534)
tier = DiskTier(sys.argv[1])
assert not tier.readonly
assert tier.get(a.key) is None and tier.known([a.key]) == set()
assert tier.put(a) and tier.get(a.key) is not None
assert tier._folder.identity(a.key) and os.stat(tier._folder.file(a.key)).st_mode & 0o777 == 0o666
tier.close()
print("done")
"""


def test_a_block_of_somebody_else(public: Path):
    done = children.run(SOMEBODY_ELSE, public / "s")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize("cut", [0, 4, 20])
def test_rows_that_are_none_while_nothing_can_be_written(filled, cut: int, monkeypatch: pytest.MonkeyPatch):
    """Right by their checksums, and no state: the prefix is shorter, whoever holds the index."""
    from llamastate.prefix import database

    monkeypatch.setattr(database, "TRIES", 1)
    monkeypatch.setattr(database, "BUSY", 0.1)
    ctx, store = filled
    key = store._chain(ctx, IDS).keys[2]
    path = store._disk._folder.file(key)
    entry = read(np.fromfile(path, np.uint8))
    entry.rows[cut:64] = 7
    seal(entry)
    entry.image.tofile(path)
    other = PrefixStore(store.path, block_tokens=BLOCK, ram_bytes=0)
    with contextlib.closing(sqlite3.connect(Path(store.path, "index.sqlite"), isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        assert other.load(ctx, 1, IDS) == 16
        assert other.lookup(IDS, ctx=ctx) == 16  # and nobody meets it again
        connection.execute("ROLLBACK")
    ctx.seq_rm(1)
    assert other.put(ctx, 0, IDS[:32]) == 16
    assert other.load(ctx, 1, IDS) == 32
    other.close()


# --- the folder -------------------------------------------------------------------------------------------------------


def removed(path: Path) -> None:
    shutil.rmtree(path)


def a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("x")


def lock_is_a_folder(path: Path) -> None:
    (path / "index.sqlite.lock").unlink()
    (path / "index.sqlite.lock").mkdir()
    (path / "index.sqlite").unlink()


def index_is_a_folder(path: Path) -> None:
    (path / "index.sqlite").unlink()
    (path / "index.sqlite").mkdir()


@pytest.mark.parametrize("how", [removed, a_file, lock_is_a_folder, index_is_a_folder])
def test_a_folder_that_was_taken_away(filled, how):
    """Decoding goes on, and what cannot be done is said with an error of our own that names the folder."""
    ctx, store = filled
    how(Path(store.path))
    for call in (
        lambda: store.lookup(IDS),
        lambda: store.lookup(IDS, ctx=ctx),
        lambda: store.load(ctx, 1, IDS),
        lambda: store.pin(IDS),
    ):
        assert call() == 0
    assert store.put(ctx, 0, IDS) in (0, 64)
    store.flush()
    for call, kind in (
        (lambda: store._disk.pin(b"x", 1, [b"y"]), SaveError),
        (lambda: store.unpin(IDS, ctx=ctx), SaveError),
        (lambda: store.evict(10), SaveError),
        (store.evict, (SaveError, FileAccessError)),
        (store.gc, SaveError),
        (store.stats, FileAccessError),
        (store.verify, FileAccessError),
        (store._disk.roots, FileAccessError),
        (lambda: list(store._disk.entries()), FileAccessError),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert caught.value.path == store.path
        assert caught.value.reason
    if how is index_is_a_folder:
        store._disk.rebuild()  # moves it out of the way
        assert store.stats().disk.blocks == 2
    else:
        with pytest.raises(SaveError):
            store._disk.rebuild()


FULL = """
import resource, sys, warnings
from llamastate.errors import SaveError
from llamastate.prefix.disk import DiskTier
from tests.prefix.entries import chain
warnings.simplefilter("ignore")
tier = DiskTier(sys.argv[1])
entries = chain(3)
for entry in entries:
    tier.put(entry)
keys = [e.key for e in entries]
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for call in (lambda: tier.pin(b"x", 1, keys), lambda: tier.evict(10)):
    try:
        call()
        sys.exit("it should have been refused")
    except SaveError as error:
        assert error.path == tier.path, error
assert tier.known(keys) == set(keys)
assert tier.drop(keys[0]) is False     # a load that met it goes on without it
assert tier.known(keys) == set(keys[1:])
tier.close()
print("done")
"""


def test_a_disk_on_which_nothing_can_be_written(tmp_path: Path):
    done = children.run(FULL, tmp_path)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": {"a": 1}},
        {"created": "yesterday"},
        {"block_tokens": [1]},
        {"kind": None},
        {"root": 5},
        {"root": "zz"},
        {"more": 1},
    ],
    ids=str,
)
def test_a_root_that_cannot_be_understood(tmp_path: Path, change):
    """It is left out; the index is made anew all the same."""
    with contextlib.closing(DiskTier(tmp_path)) as tier:
        tier.put(block())
        tier.add_root(block().root, "{}", 8, "attention")
        tier.add_root(b"other" * 6 + b"xx", "{}", 8, "iswa")
    path = tmp_path / "roots" / f"{block().root.hex()}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    for name in tmp_path.glob("index.sqlite*"):
        name.unlink()
    with contextlib.closing(DiskTier(tmp_path)) as tier:
        assert tier.known([block().key])
        kinds = {root.root: root.kind for root in tier.roots()}
        assert kinds == {block().root: "", b"other" * 6 + b"xx": "iswa"}


# --- a folder that can only be read -----------------------------------------------------------------------------------

READONLY = """
import os, sys, warnings
import numpy as np
from llamastate import cli
from llamastate.errors import SaveError
from llamastate.prefix import PrefixStore
from llamastate.prefix.disk import DiskTier
from tests.helpers import assert_same_logits, context, tokens

path, how = sys.argv[1:]
ids = tokens(64)
os.umask(0o022)
with context("dense", n_seq_max=3) as ctx:
    ctx.decode(ids)
    expected = ctx.logits()
    keeper = None
    with PrefixStore(path, block_tokens=16) as store:
        store.put(ctx, 0, ids)
    if how == "in use":
        keeper = DiskTier(path)          # somebody else has it open: SQLite's logs are there
        keeper.touch(keeper.known([]))
        keeper.stats()
    elif how == "a log left":
        keeper = DiskTier(path)
        keeper.add_root(b"r" * 32, "{}", 8)
        pid = os.fork()
        if not pid:
            os._exit(0)
        os.waitpid(pid, 0)
        os.unlink(path + "/index.sqlite-shm")
    elif how == "damaged index":
        open(path + "/index.sqlite", "wb").write(os.urandom(5000))
    elif how == "no index":
        os.unlink(path + "/index.sqlite")
    before = {n: os.stat(os.path.join(d, n)).st_mtime_ns for d, _, ns in os.walk(path) for n in ns if "-shm" not in n}
    os.seteuid(65534)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with PrefixStore(path, block_tokens=16) as store:
            assert store._disk.readonly
            assert store.lookup(ids) == 64, store.lookup(ids)
            assert store.load(ctx, 1, ids, max_tokens=63) == 63
            ctx.decode(ids[63:], seq_id=1)
            assert_same_logits(ctx.logits(), expected)
            others = tokens(64, seed=3)
            ctx.decode(others, seq_id=2)
            store.put(ctx, 2, others)
            store.flush()
            assert store.lookup(others) == 64        # in memory
            assert store.verify() == []
            assert store.stats().disk.blocks == 4
            assert store.stats().dropped == 4
            for call in (lambda: store.pin(ids), lambda: store.unpin(ids), store.evict, store.gc):
                try:
                    call()
                    raise AssertionError("it should have been refused")
                except SaveError as error:
                    assert error.path == os.path.realpath(path)
    assert [("takes no more" in str(w.message), "only be read" in str(w.message)) for w in caught] == [(True, True)], [
        str(w.message) for w in caught
    ]
    for command in ("ls", "stats", "verify"):
        assert cli.main(["store", command, path]) == 0, command
    os.seteuid(0)
    after = {n: os.stat(os.path.join(d, n)).st_mtime_ns for d, _, ns in os.walk(path) for n in ns if "-shm" not in n}
    assert before == after
print("done")
"""


@pytest.mark.parametrize("how", ["at rest", "in use", "a log left", "damaged index", "no index"])
def test_a_folder_that_can_only_be_read(public: Path, how: str):
    done = children.run(READONLY, public / "s", how)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["done"]), done.stderr


def test_an_empty_folder_that_can_only_be_read_is_no_store(public: Path):
    os.seteuid(65534)
    try:
        with pytest.raises(SaveError):
            DiskTier(public / "s")
    finally:
        os.seteuid(0)
