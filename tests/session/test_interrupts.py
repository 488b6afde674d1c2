"""Ctrl-C in the middle of whatever a session does: it is in step afterwards, and as it was."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llamastate import CheckpointRecord, Session, Snapshot
from llamastate._native import decode, memory, state
from llamastate.errors import ContextBusyError, CorruptStateError, InvalidArgumentError, NoKVSlotError
from tests.helpers import assert_same_logits, context, tokens

OPERATIONS: dict[str, Callable[[Session, Snapshot], Any]] = {
    "feed": lambda session, _: session.feed(tokens(100, 7)),
    "sync": lambda session, _: session.sync([*session.tokens[:30], *tokens(40, 8)]),
    "sync, as many": lambda session, _: session.sync([*session.tokens[:-1], 5]),
    "rollback": lambda session, _: session.rollback(25),
    "undo": lambda session, _: session.undo(),
    "snapshot": lambda session, _: session.snapshot(),
    "restore": lambda session, snapshot: session.restore(snapshot),
}
PLACES = {"decode": (decode, "decode"), "trim": (memory, "seq_rm"), "set": (state, "seq_set_data")}


def interrupt(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, at: int) -> Callable[[], bool]:
    """Let SIGINT arrive during the ``at``-th call from now on; Python sees it when the call returns."""
    call, calls = getattr(module, name), []

    def interrupted(*arguments: Any) -> Any:
        calls.append(name)
        result = call(*arguments)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(module, name, interrupted)
    return lambda: len(calls) >= at


@pytest.fixture
def ctrl_c() -> Any:
    """Ctrl-C as Python has it, whatever whoever runs the tests has made of it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("kind", ["dense", "iswa", "mamba", "jamba"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_interrupted_session_is_as_it_was(kind: str, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(60, 1)
    reached = 0
    with context(kind, n_batch=64) as ctx, context(kind) as fresh:
        # as many tokens as the session has, but others: what is only counted would not be told apart
        fresh.prefill(tokens(60, 2))
        other = Snapshot.take(fresh, 0, tokens(60, 2))
        for place, at in [(place, at) for place in PLACES for at in (1, 2, 3)]:
            ctx.clear()
            session = Session(ctx, checkpoint_every=0)
            session.feed(ids[:20])
            session.checkpoint()
            session.feed(ids[20:])
            session._has_logits = False  # as after a trim: a snapshot decodes the last token again
            with monkeypatch.context() as patch:
                done = interrupt(patch, *PLACES[place], at)
                try:
                    OPERATIONS[operation](session, other)
                    continue  # it made fewer calls of that kind
                except KeyboardInterrupt:
                    assert done()
            reached += 1
            assert session.tokens.tolist() == ids.tolist(), (place, at)
            assert ctx.seq_pos_max(0) == 59
            session.feed([9])
            fresh.clear()
            fresh.prefill([*ids, 9])
            assert_same_logits(session.logits, fresh.logits())
    assert reached


def test_the_last_token_cannot_lose_its_cell() -> None:
    """To have its logits it is decoded again; in a full pool somebody else waits for just that cell."""
    with context("dense", n_ctx=256, n_seq_max=2) as ctx:
        session, greedy = Session(ctx), Session(ctx, 1)
        greedy.feed(tokens(100, 2))
        session.feed(tokens(156, 1))
        ended = threading.Event()

        def grab() -> None:
            while not ended.is_set():
                try:
                    greedy.feed([1])
                except NoKVSlotError:
                    continue
                return

        thread = threading.Thread(target=grab)
        thread.start()
        try:
            for _ in range(50):
                session._has_logits = False
                assert session.logits.shape == (256,)
        finally:
            ended.set()
            thread.join()
        assert session.n_past == 156
        assert greedy.n_past == 100


@pytest.mark.parametrize("kind", ["dense", "iswa", "jamba"])
def test_a_busy_context_refuses_at_once_or_not_at_all(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who wants the context between two decodes of a session finds it busy, and not the session him."""
    with context(kind, n_seq_max=2, n_batch=32, on_busy="raise") as ctx:
        session = Session(ctx, checkpoint_every=0)
        session.feed(tokens(40, 1))
        step, refused = Session._decode, []

        def intrude() -> None:
            try:
                with ctx._handle:
                    refused.append(False)
            except ContextBusyError:
                refused.append(True)

        def between(*arguments: Any, **options: Any) -> None:
            step(*arguments, **options)
            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()

        monkeypatch.setattr(Session, "_decode", between)
        session.feed(tokens(100, 2))
        session.sync([*session.tokens[:70], *tokens(50, 3)])
        session.rollback(60)
        assert session.n_past == 60
        assert len(refused) > 3
        assert all(refused)


@pytest.mark.parametrize("kind", ["dense", "iswa", "jamba", "mamba"])
def test_checkpoints_that_are_not_what_they_say(kind: str) -> None:
    ids = tokens(60, 1)
    with context(kind, n_seq_max=2) as ctx:
        ctx.decode(ids[:20])
        early = ctx.state_seq_get_data(0)
        ctx.decode(ids[20:])
        session = Session(ctx, 1)
        session.feed([1, 2, 3])
        for record in (
            CheckpointRecord(30, state=early),
            CheckpointRecord(61),
            CheckpointRecord(20, state=early, logits=np.zeros(7, np.float32)),
            CheckpointRecord(20, state=early, logits=np.zeros(1, np.float32)),
        ):
            snapshot = Snapshot.take(ctx, 0, ids, checkpoints=[record])
            with pytest.raises(CorruptStateError) as caught:
                session.restore(snapshot)
            assert str(caught.value.section).startswith("checkpoint 0")
            assert session.tokens.tolist() == [1, 2, 3]
            assert session.feed([4]) == 1
            session.rollback(3)


@pytest.mark.parametrize("label", [b"x", 1, ["a"], "\ud800"])
def test_labels_that_could_not_be_saved(label: Any) -> None:
    with context("dense") as ctx:
        session = Session(ctx)
        session.feed([1, 2])
        with pytest.raises(InvalidArgumentError):
            session.checkpoint(label)
        assert not session.checkpoints
        session.snapshot()


@pytest.mark.parametrize("stop", [None, 1, b"x", [b"x"], [1], ["a", None]])
def test_stop_strings_that_are_none(stop: Any) -> None:
    with context("dense") as ctx:
        session = Session(ctx)
        session.feed([1, 2])
        for stream in (False, True):
            with pytest.raises(InvalidArgumentError):
                session.generate(4, stop=stop, stream=stream)
        assert session.n_past == 2


def test_close_is_finished_whenever_ctrl_c_comes() -> None:
    """At every line of it."""
    with context("mamba", n_seq_max=2) as ctx:
        at, reached = 0, True
        while reached:
            at, reached, left = at + 1, False, at + 1
            session, ended = Session(ctx), []
            session._at_close += [lambda ended=ended: ended.append("first"), lambda ended=ended: ended.append("second")]
            session.feed(tokens(9))
            session.checkpoint()

            def trace(frame: Any, event: str, _: Any) -> Any:
                nonlocal left, reached
                left -= event == "line" and frame.f_code is Session._close.__code__
                if not left:
                    reached = True
                    raise KeyboardInterrupt  # after which nothing is traced any more
                return trace

            before = sys.gettrace()
            sys.settrace(trace)
            try:
                session.close()
                assert not reached
            except KeyboardInterrupt:
                assert reached
            finally:
                sys.settrace(before)
            assert session.closed
            assert session.n_past == 0
            assert ctx.seq_pos_max(0) == -1
            assert list(dict.fromkeys(ended)) == ["second", "first"]
        assert at > 10


def test_close_goes_on_where_two_ctrl_c_have_left_it() -> None:
    with context("dense") as ctx:
        session, calls = Session(ctx), []
        session.feed(tokens(9))

        def end() -> None:
            calls.append(1)
            if len(calls) < 3:
                raise KeyboardInterrupt

        session._at_close.append(end)
        with pytest.raises(KeyboardInterrupt):
            session.close()
        ctx.prefill(tokens(9, 2))  # as long as the session was, but somebody else's
        session.close()
        session.close()
        assert len(calls) == 3
        assert ctx.seq_pos_max(0) == 8
