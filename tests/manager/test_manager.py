"""A folder of named sessions."""

from __future__ import annotations

import gc
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest

from llamastate import Context, Sampler, SessionManager
from llamastate.errors import (
    BadMagicError,
    CorruptStateError,
    FileAccessError,
    FingerprintMismatchError,
    InvalidArgumentError,
    NoKVSlotError,
    SaveError,
    SequenceChangedError,
    SessionExistsError,
    SessionNotFoundError,
    StateFileNotFoundError,
)
from llamastate.manager import list_sessions
from tests.helpers import KINDS, assert_same_logits, context, model, tokens
from tests.test_files import file_size_limit


@pytest.fixture
def ctx() -> Iterator[Context]:
    with context("dense", n_seq_max=4) as ctx:
        yield ctx


@pytest.fixture
def manager(tmp_path: Path) -> SessionManager:
    return SessionManager(tmp_path / "sessions")


def files(manager: SessionManager) -> list[str]:
    """What is in the folder when nothing is checked out."""
    gc.collect()
    manager.close()
    return sorted(os.listdir(manager.folder))


@pytest.mark.parametrize("kind", KINDS)
def test_create_save_load(kind: str, tmp_path: Path) -> None:
    manager = SessionManager(tmp_path)
    with context(kind) as ctx, context(kind) as other:
        session = manager.create("chat", ctx, system_prompt=tokens(40))
        assert session.n_past == 40
        assert manager.load("chat", other).n_past == 40, "it is on the disk from the beginning"
        session.checkpoint("turn 1")
        session.feed(tokens(100, 1))
        assert manager.save("chat", session) == os.path.getsize(manager.path("chat"))
        loaded = SessionManager(tmp_path).load("chat", other)
        np.testing.assert_array_equal(loaded.logits, session.logits)
        assert [p.label for p in loaded.checkpoints] == ["turn 1"]
        loaded.undo()
        with context(kind) as fresh:
            fresh.prefill(tokens(40))
            assert_same_logits(loaded.logits, fresh.logits())


def test_load_or_create(manager: SessionManager, ctx: Context) -> None:
    first = manager.load_or_create("chat", ctx, system_prompt=[1, 2, 3])
    first.feed([4])
    manager.save("chat", first)
    second = manager.load_or_create("chat", ctx, seq_id=1, system_prompt=[9])
    assert second.tokens.tolist() == [1, 2, 3, 4]


def test_create_needs_a_new_name_and_an_empty_sequence(manager: SessionManager, ctx: Context) -> None:
    session = manager.create("chat", ctx, system_prompt=[1])
    with pytest.raises(SessionExistsError) as caught:
        manager.create("chat", ctx, seq_id=1)
    assert isinstance(caught.value, FileExistsError)
    assert caught.value.name == "chat"
    with pytest.raises(SequenceChangedError):
        manager.create("other", ctx)
    with pytest.raises(NoKVSlotError):
        manager.create("other", ctx, seq_id=1, system_prompt=tokens(3000))
    assert ctx.seq_pos_max(1) == -1
    assert session.tokens.tolist() == [1]
    del session
    assert files(manager) == ["chat.llsnap"]


@pytest.mark.parametrize("call", ["load", "delete", "checkpoints", "open"])
@pytest.mark.parametrize("what", ["nothing", "another kind", "a folder", "hidden"])
def test_what_is_no_session(call: str, what: str, manager: SessionManager, ctx: Context) -> None:
    folder = Path(manager.folder)
    if what == "another kind":
        (folder / "chat").write_bytes(b"x")
        (folder / "chat.ggsq").write_bytes(b"x")
    elif what == "a folder":
        (folder / "chat.llsnap").mkdir()
    elif what == "hidden":
        (folder / ".chat.llsnap").write_bytes(b"x")
    ctx.decode([1, 2])
    arguments = ("chat", ctx) if call == "load" else ("chat",)
    with pytest.raises(SessionNotFoundError) as caught:
        getattr(manager, call)(*arguments)
    assert isinstance(caught.value, KeyError)
    assert caught.value.name == "chat"
    assert ctx.seq_pos_max(0) == 1
    assert manager.list() == []
    assert "chat" not in manager


def test_list(manager: SessionManager, ctx: Context) -> None:
    assert manager.list() == []
    before = datetime.now(timezone.utc)
    session = manager.create("b", ctx, system_prompt=[1, 2, 3], metadata={"user": "x"})
    session.checkpoint("one")
    session.feed([4])
    session.checkpoint()
    manager.save("b", session)
    manager.create("a", ctx, seq_id=1)
    session.save(Path(manager.folder, "c.llsnap"), metadata={"k": 1})
    a, b, c = manager.list()
    assert (a.name, b.name, c.name) == ("a", "b", "c")
    assert (a.n_tokens, b.n_tokens, c.n_tokens) == (0, 4, 4)
    assert (a.n_checkpoints, b.n_checkpoints) == (0, 2)
    assert b.size == os.path.getsize(b.path)
    assert b.model == ctx.model.desc
    assert b.fingerprint == ctx.fingerprint
    assert b.metadata == {"user": "x"}
    assert b.created is not None
    assert before <= b.created <= b.modified or abs((b.created - b.modified).total_seconds()) < 60
    assert 0 <= b.age < 3600
    assert (c.model, c.created, c.metadata) == (None, None, {"k": 1})
    assert not any(info.damaged for info in (a, b, c))
    assert json.loads(json.dumps(b.to_dict()))["n_tokens"] == 4


def test_metadata_and_time_of_creation_stay(manager: SessionManager, ctx: Context) -> None:
    session = manager.create("chat", ctx, metadata={"user": "x"})
    created = manager.list()[0].created
    session.feed([1])
    sampler = Sampler(ctx.model, temperature=1.0, seed=3)
    manager.save("chat", session, sampler=sampler)
    (info,) = manager.list()
    assert (info.metadata, info.created) == ({"user": "x"}, created)
    with manager.open("chat") as snapshot:
        assert snapshot.sampler_state == sampler.state
    manager.save("chat", session, metadata={})
    assert manager.list()[0].metadata == {}
    for bad in ({"llamastate": 1}, [1], {"x": object()}):
        with pytest.raises(InvalidArgumentError):
            manager.save("chat", session, metadata=bad)  # type: ignore[arg-type]
    assert manager.load("chat", ctx, seq_id=1).tokens.tolist() == [1]


def test_checkpoints_without_a_context(manager: SessionManager) -> None:
    with context("iswa") as ctx:
        session = manager.create("chat", ctx, checkpoint_every=16)
        for turn in range(3):
            session.feed(tokens(40, turn))
            session.checkpoint(f"turn {turn}")
        manager.save("chat", session)
    points = manager.checkpoints("chat")
    assert [(p.n_tokens, p.label) for p in points] == [(40, "turn 0"), (80, "turn 1"), (120, "turn 2")]
    assert all(p.state is None for p in points)
    with context("iswa") as ctx:
        loaded = manager.load("chat", ctx)
        assert [(p.n_tokens, p.label) for p in loaded.checkpoints] == [(p.n_tokens, p.label) for p in points]


def test_copy_under_another_name(manager: SessionManager, ctx: Context) -> None:
    session = manager.create("chat", ctx, system_prompt=[1])
    manager.save("copy", session)
    assert [info.name for info in manager.list()] == ["chat", "copy"]


def test_delete(manager: SessionManager, ctx: Context) -> None:
    session = manager.create("chat", ctx, system_prompt=[1])
    manager.delete("chat")
    assert manager.list() == []
    with pytest.raises(SessionNotFoundError):
        manager.delete("chat")
    manager.save("chat", session)
    assert manager.load("chat", ctx, seq_id=1).tokens.tolist() == [1]


def test_another_model(manager: SessionManager, ctx: Context) -> None:
    manager.create("chat", ctx, system_prompt=[1])
    with context(model("dense", seed=1)) as other:
        other.decode([5, 6])
        with pytest.raises(FingerprintMismatchError):
            manager.load("chat", other)
        assert other.seq_pos_max(0) == 1


# --- faults -----------------------------------------------------------------------------------------------------------


def test_damaged_files_are_listed(manager: SessionManager, ctx: Context) -> None:
    session = manager.create("good", ctx, system_prompt=tokens(20))
    whole = Path(manager.path("good")).read_bytes()
    folder = Path(manager.folder)
    (folder / "empty.llsnap").write_bytes(b"")
    (folder / "text.llsnap").write_bytes(b"hello" * 100)
    (folder / "cut.llsnap").write_bytes(whole[:-1])
    (folder / "flipped.llsnap").write_bytes(whole[:70] + bytes([whole[70] ^ 1]) + whole[71:])
    (folder / "con.llsnap").write_bytes(whole)
    (folder / "link.llsnap").symlink_to("nowhere")
    found = {info.name: info for info in manager.list()}
    assert sorted(found) == ["con", "cut", "empty", "flipped", "good", "text"]
    assert [name for name, info in found.items() if not info.damaged] == ["good"]
    assert isinstance(found["text"].error, BadMagicError)
    assert isinstance(found["cut"].error, CorruptStateError)
    assert found["cut"].size == len(whole) - 1
    for name in ("cut", "flipped"):
        with pytest.raises(CorruptStateError):
            manager.load(name, ctx, seq_id=1)
        with pytest.raises(SessionExistsError):
            manager.create(name, ctx, seq_id=1)
    assert ctx.seq_pos_max(1) == -1
    manager.save("cut", session)
    manager.delete("text")
    found = {info.name: info.damaged for info in manager.list()}
    assert (found["cut"], "text" in found) == (False, False)


def test_full_disk(manager: SessionManager, ctx: Context) -> None:
    session = manager.create("chat", ctx, system_prompt=tokens(20))
    old = Path(manager.path("chat")).read_bytes()
    session.feed(tokens(20, 1))
    for limit in (0, 4096):
        with file_size_limit(limit), pytest.raises(SaveError) as caught:
            manager.save("chat", session)
        assert caught.value.path == manager.path("chat")
        with file_size_limit(limit), pytest.raises(SaveError):
            manager.create("new", ctx, seq_id=1, system_prompt=tokens(20))
        assert ctx.seq_pos_max(1) == -1
    assert Path(manager.path("chat")).read_bytes() == old
    assert session.n_past == 40
    assert SessionManager(manager.folder).load("chat", ctx, seq_id=2).n_past == 20
    del session
    assert files(manager) == ["chat.llsnap"]


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder, and no right to write into it: root has that right to all of them, so be somebody else."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_folder_that_cannot_be_written(nobody: Path, ctx: Context) -> None:
    SessionManager(nobody).create("chat", ctx, system_prompt=[1, 2])
    _ = ctx.fingerprint  # reads the model's file
    gc.collect()
    nobody.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)
    manager = SessionManager(nobody)
    assert manager.load("chat", ctx, seq_id=1).tokens.tolist() == [1, 2]
    session = manager.load_or_create("chat", ctx, seq_id=1)  # in the place of the other
    assert session.tokens.tolist() == [1, 2]
    assert [info.n_tokens for info in manager.list()] == [2]
    for call in (
        lambda: manager.save("chat", session),
        lambda: manager.create("new", ctx, seq_id=2, system_prompt=[1]),
        lambda: manager.delete("chat"),
        lambda: SessionManager(nobody / "below"),
    ):
        with pytest.raises(SaveError):
            call()
    assert ctx.seq_pos_max(2) == -1
    assert os.listdir(nobody) == ["chat.llsnap"]


def test_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for bad in (tmp_path / "file", tmp_path / "file" / "x", "a\0b"):
        with pytest.raises(SaveError):
            SessionManager(bad)
    for no_path in (3, None):
        with pytest.raises(InvalidArgumentError):
            SessionManager(no_path)  # type: ignore[arg-type]
    with pytest.raises(StateFileNotFoundError):
        list_sessions(tmp_path / "none")
    with pytest.raises(FileAccessError):
        list_sessions(tmp_path / "file")
    manager = SessionManager(tmp_path / "gone")
    os.rmdir(manager.folder)
    with pytest.raises(FileAccessError):
        manager.list()


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError):
        SessionManager(tmp_path, on_busy="later")


def test_permissions_follow_the_umask(manager: SessionManager, ctx: Context) -> None:
    old = os.umask(0o077)
    try:
        manager.create("chat", ctx)
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat(manager.path("chat")).st_mode) == 0o600
