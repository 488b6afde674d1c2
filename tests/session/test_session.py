"""Golden cases of sessions: the edges that a random life may miss."""

from __future__ import annotations

import asyncio
import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamastate import CheckpointRecord, Context, Model, Sampler
from llamastate.errors import (
    ClosedError,
    FingerprintMismatchError,
    HistoryError,
    InvalidArgumentError,
    InvalidSequenceError,
    LogitsUnavailableError,
    NoKVSlotError,
    NotCopyableError,
    SequenceChangedError,
    TokenizeError,
)
from llamastate.history import Checkpoint, History
from llamastate.session import Completion, Session
from llamastate.textstream import TextStream
from tests import tiny
from tests.helpers import KINDS, assert_same_logits, context, tokens

#: Not the recurrent ones: their memory is never full.
GROWING = [kind for kind in KINDS if not kind.startswith("mamba")]

WINDOW = 32


def fresh(kind: str, ids: Any) -> np.ndarray:
    """Logits of a context that only decoded these tokens."""
    with context(kind, n_ctx=1024) as ctx:
        ctx.prefill(ids, chunk=64)
        return ctx.logits()


@pytest.mark.parametrize("kind", KINDS)
def test_undo_past_the_window_and_redo(kind: str) -> None:
    """Far more tokens than the window lie between the checkpoint and the present."""
    with context(kind, n_ctx=1024) as ctx:
        session = Session(ctx, checkpoint_every=64)
        session.feed(tokens(90, 1))
        session.checkpoint()
        session.feed(tokens(8 * WINDOW, 2))
        whole = session.tokens
        session.undo()
        assert_same_logits(session.logits, fresh(kind, whole[:90]))
        session.redo()
        assert session.tokens.tolist() == whole.tolist()
        assert_same_logits(session.logits, fresh(kind, whole))
        with pytest.raises(HistoryError):
            session.redo()


@pytest.mark.parametrize("kind", KINDS)
def test_undo_past_the_earliest_checkpoint(kind: str) -> None:
    with context(kind) as ctx:
        session = Session(ctx)
        session.feed(tokens(40))
        session.checkpoint()
        session.feed(tokens(5, 1))
        session.undo()
        before = session.tokens.tolist()
        with pytest.raises(HistoryError) as caught:
            session.undo()
        assert (caught.value.asked, caught.value.available) == (1, 0)
        assert session.tokens.tolist() == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [WINDOW - 1, WINDOW, WINDOW + 1])
def test_checkpoint_at_the_edge_of_the_window(kind: str, n: int) -> None:
    with context(kind) as ctx:
        session = Session(ctx, checkpoint_every=0)
        session.feed(tokens(n))
        point = session.checkpoint("edge")
        session.feed(tokens(3 * WINDOW, 1))
        assert session.rollback(point) == 0, "there was a checkpoint: nothing is decoded again"
        assert_same_logits(session.logits, fresh(kind, tokens(n)))


@pytest.mark.parametrize("kind", KINDS)
def test_rollback_to_nothing(kind: str) -> None:
    with context(kind) as ctx:
        session = Session(ctx)
        session.feed(tokens(50))
        assert session.rollback(0) == 0
        assert session.n_past == 0
        with pytest.raises(LogitsUnavailableError):
            _ = session.logits
        session.feed(tokens(20, 1))
        assert_same_logits(session.logits, fresh(kind, tokens(20, 1)))


@pytest.mark.parametrize("kind", GROWING)
def test_a_full_cache_leaves_everything(kind: str) -> None:
    """What does not fit is refused, and the session, its checkpoints and its redo are as they were."""
    with context(kind, n_ctx=256, n_batch=64) as ctx:
        session = Session(ctx, checkpoint_every=64)
        session.feed(tokens(100))
        session.checkpoint("kept")
        session.feed(tokens(30, 1))
        session.undo()
        points = [(p.n_tokens, p.kind) for p in session.history]
        for attempt in (lambda: session.feed(tokens(300, 2)), lambda: session.sync(tokens(300, 2))):
            with pytest.raises(NoKVSlotError):
                attempt()
            assert session.n_past == 100
            assert [(p.n_tokens, p.kind) for p in session.history] == points
            assert_same_logits(session.logits, fresh(kind, tokens(100)))
        session.redo()
        assert session.n_past == 130


@pytest.mark.parametrize("kind", GROWING)
def test_full_pool_in_the_middle_of_a_feed(kind: str) -> None:
    """Another sequence has the room: the decode fails after some chunks, and all of them are taken back."""
    with context(kind, n_ctx=512, n_seq_max=2, n_batch=64) as ctx:
        ctx.prefill(tokens(300, 5), seq_id=1)
        session = Session(ctx, checkpoint_every=48)
        session.feed(tokens(50))
        session.checkpoint()
        with pytest.raises(NoKVSlotError):
            session.feed(tokens(200, 1))
        assert session.n_past == 50
        assert ctx.seq_pos_max(0) == 49
        assert_same_logits(session.logits, fresh(kind, tokens(50)))
        session.feed(tokens(20, 2))
        assert_same_logits(session.logits, fresh(kind, np.concatenate([tokens(50), tokens(20, 2)])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unified", [True, False])
def test_branch_then_undo_in_the_parent(kind: str, unified: bool) -> None:
    with context(kind, n_ctx=2048, n_seq_max=2, kv_unified=unified) as ctx:
        parent = Session(ctx)
        parent.feed(tokens(60))
        parent.checkpoint()
        parent.feed(tokens(60, 1))
        child = parent.branch(1)
        both = parent.tokens
        parent.undo()
        parent.feed(tokens(30, 2))
        assert child.tokens.tolist() == both.tolist()
        assert_same_logits(child.logits, fresh(kind, both))
        child.undo()
        assert_same_logits(child.logits, fresh(kind, tokens(60)))
        assert_same_logits(parent.logits, fresh(kind, np.concatenate([tokens(60), tokens(30, 2)])))


def test_branch_needs_an_empty_sequence() -> None:
    with context("dense", n_ctx=1024, n_seq_max=2) as ctx:
        session = Session(ctx)
        session.feed(tokens(5))
        ctx.decode(tokens(3), seq_id=1)
        with pytest.raises(InvalidSequenceError):
            session.branch(1)
        assert ctx.seq_pos_max(1) == 2


def test_somebody_else_changes_the_sequence() -> None:
    with context("dense") as ctx:
        session = Session(ctx)
        session.feed(tokens(5))
        ctx.decode(tokens(1))
        with pytest.raises(SequenceChangedError) as caught:
            session.feed(tokens(1))
        assert (caught.value.expected, caught.value.found) == (5, 6)
        with pytest.raises(SequenceChangedError):
            Session(ctx, tokens=tokens(5))
        assert Session(ctx, tokens=np.concatenate([tokens(5), tokens(1)])).n_past == 6


@pytest.mark.parametrize("kind", KINDS)
def test_saved_sessions_keep_their_checkpoints(kind: str, tmp_path: Path) -> None:
    """After a load the next token can be sampled at once, and the last message edited without reading all again."""
    path = tmp_path / "chat.llsnap"
    with context(kind, n_ctx=1024) as ctx, context(kind, n_ctx=1024, n_seq_max=2) as other:
        session = Session(ctx, checkpoint_every=64)
        session.feed(tokens(200))
        session.checkpoint("turn")
        session.feed(tokens(100, 1))
        assert session.save(path, metadata={"user": "x"}) == path.stat().st_size
        loaded = Session.load(other, path, seq_id=1)
        np.testing.assert_array_equal(loaded.logits, session.logits)
        assert [p.label for p in loaded.checkpoints] == ["turn"]
        result = loaded.sync(np.concatenate([tokens(200), tokens(7, 2)]))
        assert (result.reused, result.replayed, result.decoded) == (200, 0, 7)
        assert_same_logits(loaded.logits, fresh(kind, np.concatenate([tokens(200), tokens(7, 2)])))


def test_loading_needs_the_same_weights(tmp_path: Path) -> None:
    path = tmp_path / "chat.llsnap"
    with context("dense") as ctx, Model(tiny.path("dense", seed=99)) as twin, Context(twin, n_ctx=512) as other:
        session = Session(ctx)
        session.feed(tokens(20))
        session.save(path)
        mine = Session(other)
        mine.feed(tokens(9, 3))
        with pytest.raises(FingerprintMismatchError):
            Session.load(other, path)
        assert other.seq_pos_max(0) == 8
        mine.feed(tokens(1))


@pytest.mark.parametrize("kind", ["dense", "iswa", "mamba", "jamba"])
def test_automatic_checkpoints_are_bounded_and_get_sparser(kind: str) -> None:
    with context(kind, n_ctx=2048) as ctx:
        session = Session(ctx, checkpoint_every=32, max_checkpoints=8)
        for seed in range(20):
            session.feed(tokens(64, seed))
        held = [p.n_tokens for p in session.history]
        if kind == "dense":
            assert held == []
            return
        assert len(held) <= 8
        gaps = np.diff([*held, session.n_past])
        assert gaps[-1] <= 64
        assert gaps[0] >= gaps[-1]
        replayed = session.rollback(session.n_past - 40)
        assert replayed <= 64


def test_byte_budget() -> None:
    history = History("iswa", 32, max_checkpoints=100, max_bytes=1000)
    mine = Checkpoint(10, "mine", kind="partial", state=bytes(600))
    history.add(mine, n_past=10)
    for n in range(20, 200, 10):
        history.add(Checkpoint(n, automatic=True, kind="partial", state=bytes(300)), n_past=n)
        assert history.nbytes <= 1000
    assert mine in list(history), "a checkpoint that was asked for is never forgotten"


class TestGenerate:
    """Text out of a session."""

    @pytest.fixture
    def session(self) -> Any:
        with Model(tiny.path("chat", vocab="spm")) as chat, Context(chat, n_ctx=512, n_threads=1) as ctx:
            session = Session(ctx)
            session.feed("hello")
            yield session

    def test_pieces_make_the_whole(self, session: Session) -> None:
        chat, start = session.ctx.model, session.n_past
        pieces = list(session.generate(20, sampler=Sampler(chat, temperature=1.0, seed=3), stream=True))
        session.rollback(start)
        whole = session.generate(20, sampler=Sampler(chat, temperature=1.0, seed=3))
        assert "".join(pieces) == whole
        assert isinstance(whole, Completion)
        assert whole.finish_reason in ("length", "eog")

    def test_tokens_and_text_are_in_step(self, session: Session) -> None:
        start = session.n_past
        done = session.generate(12)
        assert tuple(session.tokens[start:].tolist()) == done.tokens

    def test_given_up_iterators_leave_a_session_in_step(self, session: Session) -> None:
        pieces = session.generate(20, stream=True)
        next(pieces, None)
        pieces.close()  # type: ignore[attr-defined]
        session.feed(" on")
        assert session.ctx.seq_pos_max(0) == session.n_past - 1

    def test_stop(self, session: Session) -> None:
        start = session.n_past
        text = str(session.generate(24))
        assert len(text) > 6
        stop = text[3:6]
        session.rollback(start)
        cut = session.generate(24, stop=stop)
        assert cut == text[: text.index(stop)]
        assert cut.finish_reason == "stop"

    def test_refuses(self, session: Session) -> None:
        with pytest.raises(InvalidArgumentError):
            session.generate(-1)
        with pytest.raises(InvalidArgumentError):
            session.generate(3, stop=["a", ""])
        with pytest.raises(TokenizeError):
            session.feed([1.5])
        session.rollback(0)
        with pytest.raises(LogitsUnavailableError):
            session.generate(1)

    def test_asyncio(self, session: Session, tmp_path: Path) -> None:
        async def life() -> tuple[Completion, list[str], int]:
            ticks = 0

            async def tick() -> None:
                nonlocal ticks
                while True:
                    ticks += 1
                    await asyncio.sleep(0)

            ticking = asyncio.create_task(tick())
            done = await session.agenerate(8)
            pieces = [piece async for piece in session.astream(4)]
            await session.asave(tmp_path / "s")
            loaded = await Session.aload(session.ctx, tmp_path / "s")
            assert loaded.tokens.tolist() == session.tokens.tolist()
            ticking.cancel()
            return done, pieces, ticks

        done, _, ticks = asyncio.run(life())
        assert len(done.tokens) == 8
        assert ticks > 8

    def test_cancelling(self, session: Session) -> None:
        async def life() -> None:
            task = asyncio.create_task(session.agenerate(400))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(life())
        assert session.ctx.seq_pos_max(0) == session.n_past - 1
        session.feed("x")


class TestTextStream:
    """Characters and stop strings that straddle tokens."""

    def test_characters(self) -> None:
        stream = TextStream()
        data = "aé漢🙂".encode()
        assert [stream.push(data[i : i + 1]) for i in range(len(data))] == [
            *("a", "", "é", "", "", "漢", "", "", "", "🙂"),
        ]
        assert stream.finish() == ""

    def test_broken_characters_end_as_replacements(self) -> None:
        stream = TextStream()
        assert stream.push("漢".encode()[:2]) == ""
        assert stream.finish() == "\ufffd"

    @pytest.mark.parametrize("size", [1, 2, 3, 7])
    def test_stop_strings(self, size: int) -> None:
        text = "one two <|end|> three"
        stream = TextStream(["<|end|>", "never"])
        out = "".join(stream.push(text[i : i + size].encode()) for i in range(0, len(text), size)) + stream.finish()
        assert out == "one two "
        assert stream.stopped == "<|end|>"

    def test_beginnings_of_stop_strings_are_text_after_all(self) -> None:
        stream = TextStream(["</s>"])
        assert stream.push(b"a </") == "a "
        assert stream.push(b"b>") == "</b>"
        assert stream.push(b"</") == ""
        assert stream.finish() == "</"


def test_close_gives_the_sequence_back() -> None:
    with context("jamba", n_seq_max=2) as ctx:
        with Session(ctx) as session:
            session.feed(tokens(20))
            session.checkpoint()
            other = session.branch(1)
        session.close()
        assert session.closed
        assert (ctx.seq_pos_max(0), session.n_past, session.history.nbytes) == (-1, 0, 0)
        for attempt in (
            lambda: session.feed([1]),
            lambda: session.sync([1]),
            lambda: session.generate(1),
            session.checkpoint,
            session.undo,
            session.redo,
            lambda: session.rollback(0),
            lambda: session.branch(0),
            session.snapshot,
            lambda: session.export_file("x"),
            lambda: session.logits,
        ):
            with pytest.raises(ClosedError) as caught:
                attempt()
            assert caught.value.what == "session"
        assert_same_logits(other.logits, fresh("jamba", other.tokens))


def test_close_leaves_what_is_not_its_own() -> None:
    with context("dense") as ctx:
        old = Session(ctx)
        old.feed([1, 2, 3])
        ctx.seq_rm(0)
        new = Session(ctx)
        new.feed([4])
        old.close()
        assert ctx.seq_pos_max(0) == 0
        last = Session(ctx, tokens=[4])
    last.close()
    assert last.closed


@pytest.mark.parametrize("kind", KINDS)
def test_another_answer_decodes_nothing_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Back to the end of the prompt: what an answer begins with is remembered unasked."""
    with context(kind) as ctx:
        session = Session(ctx)
        session.feed(tokens(50))
        first = session.generate(60).tokens
        assert session.rollback(50) == 0
        if ctx.model.is_recurrent or ctx.model.is_hybrid:
            monkeypatch.setattr(Session, "_decode", None)
        assert_same_logits(session.logits, fresh(kind, tokens(50)))
        monkeypatch.undo()
        assert session.generate(60).tokens == first


ATTEMPTS: dict[str, Any] = {
    "logits": lambda session: session.logits,
    "rollback": lambda session: session.rollback(100),
    "sync": lambda session: session.sync([*session.tokens[:100], *tokens(80, 4)]),
}


@pytest.mark.parametrize("kind", ["dense", "iswa", "jamba", "lfm2swa", "mamba"])
@pytest.mark.parametrize("what", ATTEMPTS)
def test_a_branch_in_a_full_pool_stays_as_it_is(kind: str, what: str) -> None:
    """What it gives up to go back it could not have again: the other keeps the cells that both share."""
    with context(kind, n_ctx=256, n_seq_max=3, n_batch=32) as ctx:
        session = Session(ctx, checkpoint_every=0)
        session.feed(tokens(10, 1))
        session.checkpoint()
        session.feed(tokens(150, 2))
        other = session.branch(1)
        other.feed(tokens(96, 3))
        wholes = [session.tokens, other.tokens]
        session._has_logits = False
        try:
            ATTEMPTS[what](session)
        except NoKVSlotError:
            assert session.tokens.tolist() == wholes[0].tolist()
        assert [ctx.seq_pos_max(seq) for seq in range(3)] == [session.n_past - 1, 255, -1]
        assert_same_logits(other.logits, fresh(kind, wholes[1]))
        other.rollback(0)
        assert_same_logits(session.logits, fresh(kind, session.tokens))
        session.undo()
        assert_same_logits(session.logits, fresh(kind, wholes[0][:10]))


def test_what_lives_in_native_memory_cannot_be_copied() -> None:
    with context("dense") as ctx:
        session = Session(ctx)
        session.feed([1])
        hints = {session: "branch", ctx: "Snapshot.take", ctx.model: "its path", Sampler(ctx.model): "from_state"}
        for thing, hint in hints.items():
            for how in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(NotCopyableError, match=hint) as caught:
                    how(thing)
                assert isinstance(caught.value, TypeError)
                assert caught.value.what == type(thing).__name__
        copy.copy(session.snapshot()).close()


def test_checkpoints_are_told_in_a_line() -> None:
    with context("jamba") as ctx:
        session = Session(ctx)
        session.feed([1, 2, 3])
        session.checkpoint("x" * 1_000_000)
        session.checkpoint("turn")
        (long, short), records = session.checkpoints, session.snapshot().checkpoints
        assert "3 tokens" in repr(short)
        assert "'turn', partial" in repr(short)
        assert "label='turn'" in repr(records[1])
        for each in (long, records[0], session.checkpoints, CheckpointRecord(1, label="y" * 1_000_000)):
            assert len(repr(each)) < 400


def test_a_sampler_is_told_what_the_session_holds() -> None:
    """Also where the context fills up under the token that was chosen last."""
    with context("dense", n_ctx=256) as ctx:
        session = Session(ctx)
        session.feed(tokens(250))
        sampler = Sampler(ctx.model, temperature=1.0, seed=1)
        done = session.generate(20, sampler=sampler)
        assert done.finish_reason == "full"
        assert 0 < len(done.tokens) < 20
        assert sampler.state["accepted"] == list(session.tokens[250:]) == list(done.tokens)


def test_tokens_are_not_for_a_session_that_is_brought_back(tmp_path: Path) -> None:
    with context("dense", n_ctx=256) as ctx:
        session = Session(ctx)
        session.feed(tokens(20))
        session.save(tmp_path / "a.llsnap")
        with pytest.raises(InvalidArgumentError, match="tokens"):
            Session.load(ctx, tmp_path / "a.llsnap", tokens=tokens(20))
        assert session.n_past == ctx.seq_pos_max(0) + 1 == 20
