"""Names of sessions: each a file name on every common disk, and only one."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from llamastate import SessionManager
from llamastate.errors import SessionExistsError, SessionNameError, SessionNotFoundError
from llamastate.names import MAX_BYTES, check_name, fold
from tests.helpers import context

BAD = [
    "",
    ".",
    "..",
    ".hidden",
    "../up",
    "a/b",
    "a\\b",
    "C:",
    "a:stream",
    "what?",
    "a*",
    'a"b',
    "a<b",
    "a>b",
    "a|b",
    "tab\t",
    "line\n",
    "nul\0",
    "bell\x07",
    "del\x7f",
    "c1\x85",
    "dot.",
    "space ",
    " space",
    "\u3000wide",
    "con",
    "CON",
    "nul.txt",
    "Aux.a.b",
    "com1",
    "LPT9.log",
    "com¹",
    "con .x",
    "CONIN$",
    "half\ud800",
    "line\u2028",
    "right\u202eleft",
    "zero\u200bwidth",
    "unassigned\u0378",
    "x" * (MAX_BYTES + 1),
    "ä" * (MAX_BYTES // 2 + 1),
]
GOOD = [
    "a",
    "Chat 1",
    "x" * MAX_BYTES,
    "ä" * (MAX_BYTES // 2),
    "日本語",
    "🙂",
    "a.b",
    "context",
    "com",
    "com10",
    "a~1",
    "-r",
    "$x",
]


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_bad_names(name: str, tmp_path: Path) -> None:
    manager = SessionManager(tmp_path / "folder")
    with context("dense") as ctx:
        for call in (
            lambda: manager.create(name, ctx),
            lambda: manager.load(name, ctx),
            lambda: manager.load_or_create(name, ctx),
            lambda: manager.delete(name),
            lambda: manager.checkpoints(name),
            lambda: manager.open(name),
            lambda: manager.path(name),
            lambda: manager.release(name),
        ):
            with pytest.raises(SessionNameError) as caught:
                call()
            assert caught.value.reason
            assert isinstance(caught.value, ValueError)
    assert name not in manager
    assert list(tmp_path.rglob("*")) == [tmp_path / "folder"]


@pytest.mark.parametrize("name", [None, 1, b"chat", Path("chat")])
def test_names_are_text(name: object) -> None:
    with pytest.raises(SessionNameError):
        check_name(name)


def test_good_names(tmp_path: Path) -> None:
    manager = SessionManager(tmp_path)
    with context("dense") as ctx:
        for name in GOOD:
            session = manager.create(name, ctx)
            session.feed([1, 2])
            manager.save(name, session)
            session.rollback(0)
            assert manager.load(name, ctx).tokens.tolist() == [1, 2]
            ctx.seq_rm(0)
        assert [info.name for info in manager.list()] == sorted(GOOD)


@pytest.mark.parametrize(
    ("name", "other"), [("chat", "Chat"), ("straße", "STRASSE"), ("ǆ", "ǅ"), ("ΣΑΣ", "σας"), ("é", "É"), ("k", "K")]
)
def test_names_that_differ_in_case(name: str, other: str, tmp_path: Path) -> None:
    assert fold(name) == fold(other)
    manager = SessionManager(tmp_path)
    with context("dense") as ctx:
        session = manager.create(name, ctx)
        for call in (
            lambda: manager.create(other, ctx),
            lambda: manager.load_or_create(other, ctx),
            lambda: manager.save(other, session),
        ):
            with pytest.raises(SessionNameError) as caught:
                call()
            assert not isinstance(caught.value, SessionExistsError)
            assert name in str(caught.value)
        for call in (lambda: manager.load(other, ctx), lambda: manager.delete(other), lambda: manager.open(other)):
            with pytest.raises(SessionNotFoundError):
                call()
        assert [info.name for info in manager.list()] == [name]


def test_both_spellings_of_an_accent_are_one(tmp_path: Path) -> None:
    manager = SessionManager(tmp_path)
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    with context("dense") as ctx:
        manager.create(decomposed, ctx)
        assert [info.name for info in manager.list()] == [composed]
        assert composed in manager
        with pytest.raises(SessionExistsError):
            manager.create(composed, ctx)
        # some file systems spell names their own way
        file = Path(manager.path(composed))
        file.rename(file.with_name(unicodedata.normalize("NFD", file.name)))
        manager.load(composed, ctx)
        assert [info.name for info in manager.list()] == [composed]
