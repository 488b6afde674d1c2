"""The order in which a file is replaced, which no test of what is left afterwards can see."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from llamastate.atomic import write_atomically


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Calls that reach the disk, with the names of the files that they are about."""
    seen: list[tuple[str, str]] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        seen.append(("fsync", Path(os.readlink(f"/proc/self/fd/{fd}")).name))
        real_fsync(fd)

    def replace(source: str, target: str) -> None:
        seen.append(("replace", Path(target).name))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return seen


def test_contents_are_safe_before_the_name_is(calls: list[tuple[str, str]], tmp_path: Path):
    assert write_atomically(tmp_path / "file", [b"abc", memoryview(b"de"), b""]) == 5
    (first, temporary), *rest = calls
    assert first == "fsync"
    assert temporary.startswith(".file.")
    assert rest == [("replace", "file"), ("fsync", tmp_path.name)]
    assert (tmp_path / "file").read_bytes() == b"abcde"


def test_not_durable_waits_for_nothing(calls: list[tuple[str, str]], tmp_path: Path):
    write_atomically(tmp_path / "file", [b"abc"], durable=False)
    assert calls == [("replace", "file")]


@pytest.mark.parametrize("function", ["fsync", "replace", "write"])
def test_failure_at_every_step(monkeypatch: pytest.MonkeyPatch, function: str, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"old")

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "worn out")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="worn out"):
        write_atomically(tmp_path / "file", [b"new"])
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_chunks_that_fail(tmp_path: Path):
    """The data may come from anything that can raise, also what is no error."""

    def chunks():
        yield b"half"
        raise KeyboardInterrupt

    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", chunks())
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_short_writes_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The system may write less than it was given: on Linux never more than 2 GiB at once."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    assert write_atomically(tmp_path / "file", [b"0123456789", memoryview(b"abcd")]) == 14
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == b"0123456789abcd"


def test_the_head_comes_last(tmp_path: Path):
    """It may need all of the rest; and if it fails there is no file."""
    order: list[str] = []

    def chunks():
        order.append("chunks")
        yield b"body"

    def head() -> bytes:
        order.append("head")
        return b"front"

    assert write_atomically(tmp_path / "file", chunks(), head=(5, head)) == 9
    assert order == ["chunks", "head"]
    assert (tmp_path / "file").read_bytes() == b"frontbody"

    def fail() -> bytes:
        raise ValueError("no head")

    with pytest.raises(ValueError, match="no head"):
        write_atomically(tmp_path / "file", [b"new"], head=(5, fail))
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"frontbody"


def test_a_large_file_is_given_back(tmp_path: Path):
    """Behind the call, but before the next one needs the room."""
    large = bytes(5 << 20)
    for size in (5 << 20, 5 << 20, 1, 5 << 20):
        write_atomically(tmp_path / "file", [large[:size]])
        assert (tmp_path / "file").stat().st_size == size
    write_atomically(tmp_path / "other", [b""])
    held = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd_exists(fd)]
    assert not [name for name in held if name.startswith(str(tmp_path))]
    assert sorted(os.listdir(tmp_path)) == ["file", "other"]


def fd_exists(fd: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{fd}")
