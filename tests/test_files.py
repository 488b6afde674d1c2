"""State files: the bytes that llama.cpp writes, replaced as a file should be replaced."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from llamastate import (
    BadMagicError,
    Context,
    InsufficientMaxTokensError,
    LoadError,
    PendingUpdateError,
    SaveError,
    StateFileNotFoundError,
    TokenizeError,
)
from tests import raw
from tests.helpers import KINDS, assert_same_logits, context, follow, tokens

IDS = tokens(60, seed=1)


class Kind(NamedTuple):
    """The functions for one kind of file."""

    save: Callable[[Context, Any, Any], int]
    load: Callable[..., Any]
    raw_save: Callable[[Context, Path, Any], Any]
    raw_load: Callable[[Context, Path], list[int]]


FILES = {
    "sequence": Kind(
        lambda ctx, path, ids: ctx.state_seq_save_file(path, 1, ids),
        lambda ctx, path, **options: ctx.state_seq_load_file(path, 1, **options)[0],
        lambda ctx, path, ids: raw.seq_save_file(ctx, path, 1, ids),
        lambda ctx, path: raw.seq_load_file(ctx, path, 1)[0],
    ),
    "context": Kind(
        lambda ctx, path, ids: ctx.state_save_file(path, ids),
        lambda ctx, path, **options: ctx.state_load_file(path, **options),
        raw.save_file,
        raw.load_file,
    ),
}
every_file = pytest.mark.parametrize("file", FILES.values(), ids=FILES)


def two_sequences(name: str = "dense", **params: Any) -> Context:
    ctx = context(name, n_seq_max=2, **params)
    ctx.decode(tokens(20), seq_id=0)
    ctx.decode(IDS, seq_id=1)
    return ctx


@pytest.fixture
def ctx() -> Iterator[Context]:
    with two_sequences() as ctx:
        yield ctx


# --- the same bytes as llama.cpp --------------------------------------------------------------------------------------


@every_file
@pytest.mark.parametrize("flash_attn", ["on", "off"])
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("name", KINDS)
def test_bytes_are_those_of_llama_cpp(name: str, unified: bool, flash_attn: str, file: Kind, tmp_path: Path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    with two_sequences(name, kv_unified=unified, flash_attn=flash_attn) as ctx:
        assert file.save(ctx, ours, IDS) == ours.stat().st_size
        assert file.raw_save(ctx, theirs, IDS)
    assert ours.read_bytes() == theirs.read_bytes()


@every_file
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("name", KINDS)
def test_files_load_there_and_here(name: str, unified: bool, file: Kind, tmp_path: Path):
    source = two_sequences(name, kv_unified=unified)
    first = int(source.logits().argmax())
    file.save(source, tmp_path / "ours", IDS)
    file.raw_save(source, tmp_path / "theirs", IDS)
    expected = follow(source, first, 4, seq_id=1)

    with context(name, n_seq_max=2, kv_unified=unified) as there:
        assert file.raw_load(there, tmp_path / "ours") == IDS.tolist()
        assert_same_logits(follow(there, first, 4, seq_id=1)[1], expected[1])
    with context(name, n_seq_max=2, kv_unified=unified) as here:
        loaded = file.load(here, tmp_path / "theirs")
        assert loaded.dtype == np.int32
        np.testing.assert_array_equal(loaded, IDS)
        assert_same_logits(follow(here, first, 4, seq_id=1)[1], expected[1])


@every_file
def test_tokens_are_whatever_the_caller_says(ctx: Context, file: Kind, tmp_path: Path):
    """None at all, a list, and more than the sequence has: they are stored and given back, nothing else."""
    for ids in ([], [1, 2, 255], range(200), np.arange(100, dtype=np.uint8)[::3]):
        file.save(ctx, tmp_path / "file", ids)
        loaded = file.load(ctx, tmp_path / "file")
        assert loaded.tolist() == list(ids)
        loaded += 1  # the caller's own, and not the file
        assert file.load(ctx, tmp_path / "file").tolist() == list(ids)
        assert ctx.seq_pos_max(1) == len(IDS) - 1


@every_file
def test_max_tokens(ctx: Context, file: Kind, tmp_path: Path):
    file.save(ctx, tmp_path / "file", IDS)
    ctx.decode([1], seq_id=1)
    before = ctx.state_get_data()
    for allowed in (0, 59):
        with pytest.raises(InsufficientMaxTokensError) as caught:
            file.load(ctx, tmp_path / "file", max_tokens=allowed)
        assert (caught.value.n_out, caught.value.max_tokens) == (60, allowed)
        assert caught.value.path == str(tmp_path / "file")
    np.testing.assert_array_equal(ctx.state_get_data(), before)
    for allowed in (60, 61, None):
        np.testing.assert_array_equal(file.load(ctx, tmp_path / "file", max_tokens=allowed), IDS)
        assert ctx.seq_pos_max(1) == 59


def test_one_kind_is_not_the_other(ctx: Context, tmp_path: Path):
    ctx.state_save_file(tmp_path / "context", IDS)
    ctx.state_seq_save_file(tmp_path / "sequence", 1, IDS)
    before = ctx.state_get_data()
    with pytest.raises(BadMagicError):
        ctx.state_load_file(tmp_path / "sequence")
    with pytest.raises(BadMagicError):
        ctx.state_seq_load_file(tmp_path / "context", 1)
    np.testing.assert_array_equal(ctx.state_get_data(), before)


@every_file
def test_loading_leaves_the_file_and_lets_go_of_it(ctx: Context, file: Kind, tmp_path: Path):
    """A sequence's header is changed in memory to be what llama.cpp reads; never on the disk."""
    path = tmp_path / "file"
    file.save(ctx, path, IDS)
    path.chmod(0o444)
    data, before = path.read_bytes(), path.stat()
    kept = file.load(ctx, path)
    assert path.read_bytes() == data
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    path.chmod(0o644)
    with path.open("wb"):  # cut to nothing: whoever still read from the map would die of it
        pass
    np.testing.assert_array_equal(kept, IDS)


@pytest.mark.parametrize("convert", [str, Path, os.fsencode], ids=["str", "Path", "bytes"])
@pytest.mark.parametrize("name", ["state", "näme 🙂 with\nnewline", "x" * 250, ".hidden"])
@every_file
def test_any_path(ctx: Context, file: Kind, name: str, convert: Callable[[Path], Any], tmp_path: Path):
    """Also a name that leaves no room for the temporary file's longer one."""
    path = convert(tmp_path / os.fsdecode(os.fsencode(name)[:250]))
    file.save(ctx, path, IDS)
    np.testing.assert_array_equal(file.load(ctx, path), IDS)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_path_relative_to_the_working_folder(ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    ctx.state_seq_save_file("state", 1, IDS)
    assert ctx.state_seq_load_file("state", 1)[0].tolist() == IDS.tolist()
    assert os.listdir(tmp_path) == ["state"]


# --- replacing --------------------------------------------------------------------------------------------------------


@every_file
def test_replaces_what_was_there(ctx: Context, file: Kind, tmp_path: Path):
    path = tmp_path / "file"
    file.save(ctx, path, IDS)
    held = path.open("rb")  # a reader goes on reading the old file
    old = path.read_bytes()
    ctx.decode([3], seq_id=1)
    file.save(ctx, path, IDS)
    with held:
        assert held.read() == old
    assert path.read_bytes() != old
    assert list(tmp_path.iterdir()) == [path]


@every_file
def test_a_link_stays_a_link(ctx: Context, file: Kind, tmp_path: Path):
    """The file that it names is replaced, in its own folder; also one that does not exist yet."""
    there = tmp_path / "there"
    there.mkdir()
    link = tmp_path / "link"
    link.symlink_to(Path("there") / "file")
    for _ in range(2):
        file.save(ctx, link, IDS)
        assert link.is_symlink()
        assert not (there / "file").is_symlink()
        np.testing.assert_array_equal(file.load(ctx, link), IDS)
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "link", "there"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027])
@every_file
def test_permissions_follow_the_umask(ctx: Context, file: Kind, mask: int, tmp_path: Path):
    old = os.umask(mask)
    try:
        file.save(ctx, tmp_path / "file", IDS)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


# --- failing ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """No file of this process may grow further: what a full disk feels like."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("limit", [512, 4096, 20000])
@every_file
def test_old_file_survives_a_failed_write(ctx: Context, file: Kind, limit: int, tmp_path: Path):
    path = tmp_path / "file"
    file.save(ctx, path, IDS)
    old = path.read_bytes()
    assert len(old) > limit
    ctx.decode([3], seq_id=1)
    before = ctx.state_get_data()
    with file_size_limit(limit), pytest.raises(SaveError) as caught:
        file.save(ctx, path, IDS)
    assert caught.value.path == str(path)
    assert caught.value.reason
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == old
    np.testing.assert_array_equal(ctx.state_get_data(), before)


def _missing(folder: Path) -> Path:
    return folder / "none" / "file"


def _folder(folder: Path) -> Path:
    (folder / "file").mkdir()
    return folder / "file"


def _below_a_file(folder: Path) -> Path:
    (folder / "file").write_bytes(b"x")
    return folder / "file" / "file"


def _loop(folder: Path) -> Path:
    (folder / "file").symlink_to("file")
    return folder / "file"


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "file")
    return folder / "file"


def _nul(folder: Path) -> str:
    return f"{folder}/a\0b"


def _kernel(folder: Path) -> Path:
    return Path("/proc/self/file")  # a folder in which nobody may create anything, not even root


@pytest.mark.parametrize("make", [_missing, _folder, _below_a_file, _loop, _pipe, _nul, _kernel])
@every_file
def test_target_that_cannot_be_written(ctx: Context, file: Kind, make: Callable[[Path], Any], tmp_path: Path):
    target = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SaveError) as caught:
        file.save(ctx, target, IDS)
    assert isinstance(caught.value, OSError)
    assert caught.value.path == str(target)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("make", [_missing, _folder, _below_a_file, _loop, _pipe, _nul, _kernel])
@every_file
def test_source_that_cannot_be_read(ctx: Context, file: Kind, make: Callable[[Path], Any], tmp_path: Path):
    source = make(tmp_path)
    before = ctx.state_get_data()
    with pytest.raises(LoadError) as caught:
        file.load(ctx, source)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, StateFileNotFoundError) == (make in (_missing, _kernel))
    assert caught.value.path == str(source)
    np.testing.assert_array_equal(ctx.state_get_data(), before)


@every_file
def test_tokens_that_are_none(ctx: Context, file: Kind, tmp_path: Path):
    for bad in ([256], [-1], [2**40], [1.5], "ab"):
        with pytest.raises(TokenizeError):
            file.save(ctx, tmp_path / "file", bad)
    assert list(tmp_path.iterdir()) == []


@every_file
def test_no_file_of_shifted_positions(ctx: Context, file: Kind, tmp_path: Path):
    file.save(ctx, tmp_path / "file", IDS)
    old = (tmp_path / "file").read_bytes()
    ctx.seq_add(1, 10, -1, 5)
    with pytest.raises(PendingUpdateError):
        file.save(ctx, tmp_path / "file", IDS)
    assert (tmp_path / "file").read_bytes() == old
