"""From a log to a live session: for every kind of memory, with every way in which a state can be gone."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamastate import Context, Session
from llamastate import log as logs
from llamastate.errors import (
    CorruptStateError,
    FingerprintMismatchError,
    HeadMovedError,
    InvalidArgumentError,
    InvalidSequenceError,
    LlamaStateError,
    LogTamperedError,
    NoKVSlotError,
    SaveError,
    SessionNotFoundError,
    StateFileNotFoundError,
    StoreFullError,
    TemplateError,
    TokensMismatchError,
)
from llamastate.log import (
    Locked,
    MemoryLogStore,
    SessionLog,
    SQLiteLogStore,
    assistant,
    branch,
    lock_session,
    reasoning,
    render,
    resume,
    resume_log,
    sync_text,
    tool_call,
    tool_result,
    user,
)
from llamastate.prefix import PrefixStore
from tests import helpers

STEPS = 6


def context(kind: str, **params: Any) -> Context:
    seed = params.pop("seed", 0)
    return helpers.context(helpers.model(kind, vocab="bpe", seed=seed), **{"n_ctx": 1024, **params})


def turn(log: SessionLog, session: Session, n: int) -> None:
    """A turn of all sorts of items; the session follows."""
    log.save_delta([user(f"turn {n}: when is the one for that?"), reasoning("I look."), tool_call("c", "look", {})])
    log.save_delta([tool_result("c", f"{n}:30 it was"), assistant(f"as you had it, at {n}:30.")])
    log.save_turn_end(n)
    sync_text(session, render(session.ctx.model, log.restore()))


@pytest.fixture
def store(tmp_path: Path) -> SQLiteLogStore:
    return SQLiteLogStore(tmp_path / "log.db")


def talk(store: logs.LogStore, kind: str, *, lock: Callable[[SessionLog, Session, int], object] | None) -> SessionLog:
    """Two turns, locked after each, and a question after them."""
    log = SessionLog.create(store, session_id="talk", system_prompt="You help with all that was had. " * 3)
    with context(kind) as ctx:
        session = Session(ctx)
        for n in (1, 2):
            turn(log, session, n)
            if lock is not None:
                lock(log, session, n)
    log.save_delta([user("and now?")])
    return log


def to_files(folder: Path) -> Callable[[SessionLog, Session, int], object]:
    return lambda log, session, n: lock_session(log, session, folder / f"{n}.llsnap")


def assert_live(found: logs.Resumed) -> None:
    """It holds the rendered history alone, and goes on as what was decoded from scratch in the same parts."""
    session = found.session
    ctx, model = session.ctx, session.ctx.model
    text = render(model, found.state)
    assert session.text == text
    expected = model.tokenize(text, add_special=False, parse_special=True)
    assert session.tokens.tolist() == expected.tolist()
    assert found.sync.reused + found.sync.decoded == session.n_past
    ids = session.tokens
    with Context(model, n_ctx=1024, n_threads=1) as fresh:
        for part in (ids[: found.sync.reused], ids[found.sync.reused :]):
            if len(part):
                fresh.decode(part)
        helpers.assert_same_logits(session.logits, fresh.logits())
        first = int(session.logits.argmax())
        chosen, rows = helpers.follow(ctx, first, STEPS, seq_id=session.seq_id)
        expected_chosen, expected_rows = helpers.follow(fresh, first, STEPS)
    assert chosen == expected_chosen
    helpers.assert_same_logits(rows, expected_rows)


@pytest.mark.parametrize("kind", helpers.KINDS)
def test_only_the_tail_is_decoded(kind: str, store: SQLiteLogStore, tmp_path: Path) -> None:
    log = talk(store, kind, lock=to_files(tmp_path))
    newest = log.restore().states[-1]
    with context(kind) as ctx:
        found = resume_log(log, ctx)
        assert found.source == newest
        assert found.skipped == ()
        assert found.sync.reused == newest.state["snapshot"]["n_tokens"]
        assert 0 < found.sync.decoded < found.sync.reused / 4
        assert_live(found)
    with context(kind) as ctx:
        nothing = resume_log(log, ctx, state=False)
        assert (nothing.source, nothing.skipped, nothing.sync.reused) == (None, (), 0)
        assert nothing.sync.decoded == found.session.n_past
        assert_live(nothing)


@pytest.mark.parametrize("kind", helpers.KINDS)
def test_from_a_prefix_store(kind: str, store: SQLiteLogStore, tmp_path: Path) -> None:
    with PrefixStore(tmp_path / "blocks", block_tokens=16) as prefix:
        log = talk(store, kind, lock=lambda log, session, n: lock_session(log, session, prefix=prefix))
    recorded = log.restore().states[-1].state["prefix"]
    with PrefixStore(tmp_path / "blocks", block_tokens=16) as prefix:  # as after a restart
        with context(kind) as ctx:
            found = resume_log(log, ctx, prefix=prefix)
            assert found.source is not None
            assert found.source.state["prefix"] == recorded
            assert found.sync.reused >= recorded["n_tokens"] // 16 * 16
            assert_live(found)
        with context(kind) as ctx:
            none = resume_log(log, ctx)
            assert none.sync.reused == 0
            assert [type(problem) for _, problem in none.skipped] == [StateFileNotFoundError] * 2
        prefix.evict()
        with context(kind) as ctx:
            gone = resume_log(log, ctx, prefix=prefix)
            assert (gone.source, gone.sync.reused, len(gone.skipped)) == (None, 0, 2)
            assert_live(gone)


def test_a_prefix_store_of_other_blocks_or_another_model(store: SQLiteLogStore, tmp_path: Path) -> None:
    with PrefixStore(None, block_tokens=16) as prefix, PrefixStore(None, block_tokens=32) as other:
        log = talk(store, "dense", lock=lambda log, session, n: lock_session(log, session, prefix=prefix))
        with context("dense") as ctx:
            assert len(resume_log(log, ctx, prefix=other).skipped) == 2
        with context("dense") as ctx:
            # the history is written otherwise: of what was kept serves what is shared
            found = resume_log(log, ctx, prefix=prefix, render=lambda state: render(ctx.model, state) + "more")
            assert found.source is not None
            found = resume_log(log, ctx, prefix=prefix, render=lambda state: "x" + render(ctx.model, state))
            assert [type(problem) for _, problem in found.skipped] == [TokensMismatchError] * 2
            assert (found.source, found.sync.reused) == (None, 0)
        with context("dense", seed=1) as ctx, pytest.raises(FingerprintMismatchError) as caught:
            resume_log(log, ctx, prefix=prefix)
        assert caught.value.field == "weights"


def test_a_prefix_store_without_room(store: SQLiteLogStore) -> None:
    log = SessionLog.create(store)
    with context("dense") as ctx, PrefixStore(None, block_tokens=16, ram_bytes=1000) as prefix:
        session = Session(ctx)
        turn(log, session, 1)
        n = log.n_entries
        with pytest.warns(RuntimeWarning, match="takes no more"), pytest.raises(StoreFullError):
            lock_session(log, session, prefix=prefix)
        assert log.verify() == log.n_entries == n


def test_both_at_once(store: SQLiteLogStore, tmp_path: Path) -> None:
    with PrefixStore(None, block_tokens=16) as prefix:
        log = talk(store, "jamba", lock=lambda g, s, n: lock_session(g, s, tmp_path / f"{n}.llsnap", prefix=prefix))
        assert sorted(log.restore().states[-1].state) == ["prefix", "snapshot"]
        for given in (prefix, None):
            with context("jamba") as ctx:
                found = resume_log(log, ctx, prefix=given)
                assert found.source == log.restore().states[-1]
                assert_live(found)


@pytest.mark.parametrize("kind", ["dense", "mamba"])
def test_what_was_generated_stays_in_its_own_tokens(kind: str, store: SQLiteLogStore, tmp_path: Path) -> None:
    """A model can spell an answer in other tokens than the tokenizer would: they are kept, not decoded anew."""
    log = SessionLog.create(store)
    with context(kind) as ctx:
        session = Session(ctx)
        log.save_delta([user("it is that")])
        sync_text(session, render(ctx.model, log.restore()))
        letters = [int(ctx.model.tokenize(letter, add_special=False)[-1]) for letter in "that was"]
        session.feed(letters)
        whole = ctx.model.tokenize("that was", add_special=False)
        assert len(whole) < len(letters)
        answer = ctx.model.detokenize(session.tokens[-len(letters) :])
        log.save_delta([assistant(answer)])
        lock_session(log, session, tmp_path / "1.llsnap")
        held = session.tokens.tolist()
    log.save_delta([user("for that")])
    with context(kind) as ctx:
        found = resume_log(log, ctx)
        assert found.sync.reused == len(held)
        assert found.session.tokens[: len(held)].tolist() == held
        assert found.session.text == render(ctx.model, found.state)


# --- states that do not serve -----------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def replace(path: Path) -> None:
    """By a sound snapshot of this model, of something else."""
    with context("dense") as ctx:
        session = Session(ctx)
        session.feed("something else")
        session.save(path)


def turn_into_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (Path.unlink, StateFileNotFoundError),
        (cut, CorruptStateError),
        (flip, CorruptStateError),
        (replace, CorruptStateError),
        (lambda path: path.write_bytes(b""), LlamaStateError),
        pytest.param(
            turn_into_a_pipe, StateFileNotFoundError, marks=pytest.mark.skipif(os.name == "nt", reason="no pipes")
        ),
    ],
)
def test_the_next_older_state(
    damage: Callable[[Path], object], error: type[LlamaStateError], store: SQLiteLogStore, tmp_path: Path
) -> None:
    log = talk(store, "dense", lock=to_files(tmp_path))
    older, newer = log.restore().states
    damage(tmp_path / "2.llsnap")
    with context("dense") as ctx:
        found = resume_log(log, ctx)
        assert found.source == older
        assert [reference for reference, _ in found.skipped] == [newer]
        assert isinstance(found.skipped[0][1], error)
        assert_live(found)
    damage(tmp_path / "1.llsnap")
    with context("dense") as ctx:
        found = resume_log(log, ctx)
        assert (found.source, found.sync.reused) == (None, 0)
        assert [reference for reference, _ in found.skipped] == [newer, older]
        assert_live(found)


@pytest.mark.parametrize("gone", [False, True])
def test_another_model(gone: bool, store: SQLiteLogStore, tmp_path: Path) -> None:
    log = talk(store, "dense", lock=to_files(tmp_path))
    if gone:
        for n in (1, 2):
            (tmp_path / f"{n}.llsnap").unlink()
    with context("dense", seed=1) as ctx:
        other = Session(ctx)
        other.feed("what was here before")
        before = ctx.state_seq_get_data(0)
        with pytest.raises(FingerprintMismatchError) as caught:
            resume(store, "talk", ctx)
        assert caught.value.field == "weights"
        assert (ctx.state_seq_get_data(0) == before).all()
        found = resume_log(log, ctx, on_mismatch="decode")
        assert (found.source, found.sync.reused, len(found.skipped)) == (None, 0, 2)
        assert_live(found)
        with pytest.raises(InvalidArgumentError):
            resume(store, "talk", ctx, on_mismatch="ignore")
        resume(store, "talk", ctx, state=False)


def test_a_state_of_another_model_is_passed_over_for_one_of_this(store: SQLiteLogStore, tmp_path: Path) -> None:
    log = talk(store, "dense", lock=to_files(tmp_path))
    with context("dense", seed=1) as ctx:
        lock_session(log, resume(store, "talk", ctx, on_mismatch="decode"), tmp_path / "other.llsnap")
    with context("dense") as ctx:
        found = resume_log(log, ctx)
        assert found.source == log.restore().states[1]
        assert isinstance(found.skipped[0][1], FingerprintMismatchError)


HOSTILE: tuple[Any, ...] = (
    {}, {"path": None}, {"path": 5}, {"path": "a\0b"}, {"path": "/dev/zero"}, {"path": "/dev/stdin"}, {"path": "."},
    {"path": ""}, {"path": "x" * 10_000}, {"path": "../" * 50 + "etc/passwd"}, {"path": "log.db", "blake2b": 5},
    {"path": "log.db", "fingerprint": {"version": 10**30}}, {"fingerprint": {}}, {"fingerprint": {"version": 1}},
    {"fingerprint": {"version": 1.5}}, {"fingerprint": {"version": 99}},
)  # fmt: skip
HOSTILE_PREFIX: tuple[Any, ...] = (
    {}, {"n_tokens": -1}, {"n_tokens": 10**30, "block_tokens": 16}, {"n_tokens": "x", "block_tokens": 16},
    {"n_tokens": 0, "block_tokens": 16, "block": 5}, {"n_tokens": 16, "block_tokens": 16, "block": "zz"},
    {"block_tokens": None}, {"n_tokens": -16, "block_tokens": 16}, {"n_tokens": True, "block_tokens": 16},
)  # fmt: skip


@pytest.mark.parametrize("named", ["snapshot", "prefix"])
def test_hostile_references(named: str, store: SQLiteLogStore) -> None:
    """A log can come from anybody."""
    hostile = HOSTILE if named == "snapshot" else HOSTILE_PREFIX
    log = SessionLog.create(store)
    log.save_delta([user("hello")])
    for recorded in hostile:
        log.save_cache_locked(1, state={named: recorded})
    for state in ({}, {named: 5}, {named: [1]}, {"elsewhere": {"path": "x"}}):
        log.save_cache_locked(10**15, state=state)
    log.append(Locked(5))
    with context("dense") as ctx, PrefixStore(None, block_tokens=16) as prefix:
        found = resume_log(log, ctx, on_mismatch="decode", prefix=prefix)
        assert found.source is None
        assert len(found.skipped) == len(hostile)
        assert_live(found)


# --- failures, and what they leave ------------------------------------------------------------------------------------


def test_a_failure_leaves_the_sequence_as_it_was(store: SQLiteLogStore, tmp_path: Path) -> None:
    log = talk(store, "jamba", lock=to_files(tmp_path))
    with context("jamba", n_ctx=512, n_seq_max=2) as ctx:
        for seq in (0, 1):
            Session(ctx, seq).feed("what was here before")
        before = [ctx.state_seq_get_data(seq) for seq in (0, 1)]

        def fail(state: logs.RestoredState) -> str:
            raise TemplateError("no")

        many = [5] * 1000
        for error, options in (
            (TemplateError, {"render": fail}),
            (NoKVSlotError, {"render": lambda state: many}),
            (NoKVSlotError, {"render": lambda state: many, "state": False}),
            (LlamaStateError, {"render": lambda state: [10**6]}),
            (LlamaStateError, {"render": lambda state: None}),
            (InvalidArgumentError, {"checkpoint_every": -1}),
            (InvalidSequenceError, {"seq_id": 2}),
        ):
            with pytest.raises(error):
                resume_log(log, ctx, **options)
            for seq in (0, 1):
                assert (ctx.state_seq_get_data(seq) == before[seq]).all(), (error, options)
        with pytest.raises(SessionNotFoundError):
            resume(store, "nobody", ctx)


def test_no_session_is_made_of_a_log_that_does_not_hold() -> None:
    store = MemoryLogStore()
    log = talk(store, "dense", lock=None)
    entries = store._logs["talk"]
    entries[1] = entries[2]
    with context("dense") as ctx:
        with pytest.raises(LogTamperedError):
            resume_log(log, ctx)
        assert ctx.seq_pos_max(0) < 0


def test_locking_a_log_that_went_on(store: SQLiteLogStore, tmp_path: Path) -> None:
    """Nothing is recorded, and no file is left that nothing names."""
    log = SessionLog.create(store, session_id="talk")
    with context("dense") as ctx:
        session = Session(ctx)
        turn(log, session, 1)
        with pytest.raises(InvalidArgumentError):
            lock_session(log, session)
        with pytest.raises(SaveError):
            lock_session(log, session, tmp_path / "no" / "such" / "folder")
        SessionLog.open(store, "talk").save_turn_end(2)
        with pytest.raises(HeadMovedError):
            lock_session(log, session, tmp_path / "1.llsnap")
        # the other one comes while the file is being written
        log.refresh()
        snapshot = Session.snapshot

        def slow(self: Session, *args: Any, **fields: Any) -> Any:
            SessionLog.open(store, "talk").save_turn_end(3)
            return snapshot(self, *args, **fields)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Session, "snapshot", slow)
            with pytest.raises(HeadMovedError):
                lock_session(log, session, tmp_path / "1.llsnap")
        assert not (tmp_path / "1.llsnap").exists()
        assert SessionLog.open(store, "talk").restore().states == []
        log.refresh()
        lock_session(log, session, tmp_path / "1.llsnap", locked_prefix_len=2)
        assert log.restore().locked_prefix_len == 2


# --- branches, and what else happens to logs --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "iswa", "mamba", "jamba"])
def test_a_branch_is_a_fork(kind: str, store: SQLiteLogStore, tmp_path: Path) -> None:
    log = SessionLog.create(store, session_id="trunk")
    with context(kind, n_ctx=2048, n_seq_max=2) as ctx:
        session = Session(ctx)
        turn(log, session, 1)
        lock_session(log, session, tmp_path / "1.llsnap")
        twig_log, twig = branch(log, session, 1, session_id="twig")
        assert (twig.seq_id, twig.tokens.tolist()) == (1, session.tokens.tolist())
        assert twig_log.info().origin.at_hash == log.head_hash
        turn(log, session, 2)
        turn(twig_log, twig, 7)
        lock_session(twig_log, twig, tmp_path / "7.llsnap")
        expected = {"trunk": session.tokens.tolist(), "twig": twig.tokens.tolist()}
        assert expected["trunk"] != expected["twig"]
        with pytest.raises(InvalidSequenceError):
            branch(log, session, 1)
        ctx.seq_rm(1)
        with pytest.raises(LlamaStateError):
            branch(log, session, 1, session_id="twig")
        assert ctx.seq_pos_max(1) < 0, "a session without a log"
        assert len(store.sessions()) == 2, "a log without a session"
    for name, reused in (("trunk", "1.llsnap"), ("twig", "7.llsnap")):
        with context(kind) as ctx:
            found = resume_log(SessionLog.open(store, name), ctx)
            assert found.source.state["snapshot"]["path"] == reused
            assert found.session.tokens.tolist() == expected[name]
            assert_live(found)


def test_forks_and_compactions_resume(store: SQLiteLogStore, tmp_path: Path) -> None:
    log = talk(store, "dense", lock=to_files(tmp_path))
    at = next(stored.hash for stored in log.entries() if stored.entry.kind == "locked")
    with context("dense") as ctx:
        found = resume_log(log.fork_at(at), ctx)
        assert found.sync.decoded == 0
        assert_live(found)
        found = resume_log(log.compact([user("in short")]), ctx)
        assert found.source is None
        assert_live(found)


def test_store_and_states_move_together(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "states").mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere.llsnap"
    with SQLiteLogStore(old / "log.db") as store:
        log = talk(store, "dense", lock=to_files(old / "states"))
        with context("dense") as ctx:
            lock_session(log, resume(store, "talk", ctx), elsewhere)
        recorded = [state.state["snapshot"]["path"] for state in log.restore().states]
    assert recorded == ["states/1.llsnap", "states/2.llsnap", str(elsewhere.resolve())]
    shutil.move(old, new)
    elsewhere.unlink()
    with SQLiteLogStore(new / "log.db") as store, context("dense") as ctx:
        found = resume_log(SessionLog.open(store, "talk"), ctx)
        assert found.source is not None
        assert found.source.state["snapshot"]["path"] == "states/2.llsnap"


def test_into_a_sequence_among_others(store: SQLiteLogStore, tmp_path: Path) -> None:
    talk(store, "iswa", lock=to_files(tmp_path))
    with context("iswa", n_ctx=2048, n_seq_max=3) as ctx:
        bystander = Session(ctx, 2)
        bystander.feed("somebody else")
        before = bystander.logits
        Session(ctx, 1).feed("it is that")
        session = resume(store, "talk", ctx, seq_id=1, checkpoint_every=64)
        assert session.seq_id == 1
        assert session.generate(3).tokens
        helpers.assert_same_logits(bystander.logits, before)


def test_an_empty_log(store: SQLiteLogStore) -> None:
    log = SessionLog.create(store)
    with context("dense") as ctx:
        found = resume_log(log, ctx)
        assert (found.session.n_past, found.sync.decoded) == (0, 0)


def test_for_asyncio(store: SQLiteLogStore, tmp_path: Path) -> None:
    log = talk(store, "dense", lock=to_files(tmp_path))
    with context("dense") as ctx:
        session = asyncio.run(logs.aresume(store, "talk", ctx))
        assert session.text == render(ctx.model, log.restore())
