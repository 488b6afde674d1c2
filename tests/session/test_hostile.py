"""Sessions in company: other threads, other adapters, a full pool, and callers who mean harm."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from llamastate import Adapter, Session
from llamastate._native import state
from llamastate.errors import ContextBusyError, InvalidArgumentError, NoKVSlotError, SequenceChangedError
from llamastate.log import MemoryLogStore, SessionLog, resume_log
from tests import children, tiny
from tests.helpers import assert_same_logits, context, model, tokens
from tests.session.test_interrupts import ctrl_c, interrupt  # noqa: F401  (ctrl_c is a fixture)

TARGETS = {"mamba": ("blk.0.ssm_in.weight",), "jamba": ("blk.1.attn_q.weight",)}


def assert_exact(session: Session, name: str, **params: Any) -> None:
    with context(name, **params) as fresh:
        fresh.prefill(session.tokens, chunk=64)
        assert_same_logits(session.logits, fresh.logits())


@pytest.mark.parametrize("kind", ["jamba", "lfm2swa"])
def test_a_pool_without_room_and_without_a_spare_sequence(kind: str) -> None:
    """What cannot be decoded again is not lost: its cells are shared, and a copy of its own would find no room."""
    with context(kind, n_ctx=256, n_seq_max=2, n_batch=64) as ctx:
        first = Session(ctx, checkpoint_every=0)
        first.feed(tokens(200, 1))
        second = first.branch(1)
        second.feed(tokens(20, 2))
        first.feed(tokens(36, 3))
        before, other = first.tokens.tolist(), second.tokens.tolist()
        with pytest.raises(NoKVSlotError):
            first.rollback(150)
        assert first.tokens.tolist() == before
        assert second.tokens.tolist() == other
        assert_exact(first, kind)
        assert_exact(second, kind)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_a_snapshot_takes_the_place_of_shared_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    with context("dense", n_ctx=256, n_seq_max=2) as ctx, context("dense") as fresh:
        few = Session(fresh)
        few.feed(tokens(20, 7))
        snapshot = few.snapshot()
        first = Session(ctx)
        first.feed(tokens(200, 1))
        second = first.branch(1)
        second.feed(tokens(20, 2))
        first.feed(tokens(30, 3))
        before = first.tokens.tolist()
        with monkeypatch.context() as patch:
            interrupt(patch, state, "seq_set_data", 1)
            with pytest.raises(KeyboardInterrupt):
                first.restore(snapshot)
        assert first.tokens.tolist() == before
        assert_exact(first, "dense")
        assert_exact(second, "dense")


def test_resuming_into_a_sequence_that_shares_its_cells() -> None:
    with context("dense", n_ctx=256, n_seq_max=2) as ctx, context("dense") as fresh:
        first = Session(ctx)
        first.feed(tokens(200, 1))
        second = first.branch(1)
        second.feed(tokens(20, 2))
        first.feed(tokens(30, 3))
        log = SessionLog.create(MemoryLogStore())
        with pytest.raises(NoKVSlotError):
            resume_log(log, ctx, render=lambda state: tokens(300, 4))
        first.feed([5])
        fresh.prefill(first.tokens)
        assert_same_logits(first.logits, fresh.logits())


@pytest.mark.parametrize("kind", ["dense", "iswa", "mamba", "jamba"])
def test_states_of_other_adapters_are_not_gone_back_to(kind: str) -> None:
    """They can change while every sequence is empty; what undo took back came from the model of before."""
    path = tiny.lora(kind, targets=TARGETS[kind]) if kind in TARGETS else tiny.lora(kind)
    with context(kind) as ctx, context(kind) as fresh, Adapter(model(kind), path) as adapter:
        session = Session(ctx, checkpoint_every=16)
        session.checkpoint("begin")
        session.feed(tokens(50, 1))
        session.checkpoint(full=True)
        session.feed(tokens(10, 2))
        session.undo(2)
        ctx.set_adapters([(adapter, 1.0)])
        fresh.set_adapters([(adapter, 1.0)])
        for n in (50, 60):
            session.redo()
            assert session.n_past == n
            fresh.clear()
            fresh.prefill(session.tokens)
            assert_same_logits(session.logits, fresh.logits())


def test_who_has_the_context_locked_does_not_wait_for_a_session() -> None:
    """The thread that is in the session waits for the context: both would wait for ever."""
    with context("dense", n_batch=8) as ctx:
        session = Session(ctx)
        inside, locked = threading.Event(), threading.Event()
        step = session._decode

        def slow(*arguments: Any, **options: Any) -> None:
            inside.set()
            assert locked.wait(60)
            step(*arguments, **options)

        session._decode = slow  # type: ignore[method-assign]
        thread = threading.Thread(target=session.feed, args=(tokens(20, 1),))
        thread.start()
        assert inside.wait(60)
        with ctx.lock():
            locked.set()
            for call in (lambda: session.feed([1]), lambda: session.logits, session.undo, session.close):
                with pytest.raises(ContextBusyError):
                    call()
        thread.join()
        assert session.tokens.tolist() == tokens(20, 1).tolist()
        with ctx.lock():
            session.feed([1])
        assert_exact(session, "dense")


@pytest.mark.parametrize("what", [None, "chat.llsnap", b"", 5])
def test_what_is_no_snapshot(what: Any) -> None:
    with context("dense", n_seq_max=2) as ctx:
        session = Session(ctx)
        session.feed([1, 2, 3])
        with pytest.raises(InvalidArgumentError, match="not a Snapshot"):
            session.restore(what)
        with pytest.raises(InvalidArgumentError, match="not a Snapshot"):
            Session.from_snapshot(ctx, what, seq_id=1)
        assert session.tokens.tolist() == [1, 2, 3]


def test_tokens_stay_read_only() -> None:
    with context("dense") as ctx:
        session = Session(ctx)
        session.feed([1, 2, 3])
        with pytest.raises(ValueError, match="WRITEABLE"):
            session.tokens.setflags(write=True)
        session.feed([4])
        session.rollback(2)
        assert session.tokens.tolist() == [1, 2]


def test_logits_of_a_sequence_that_somebody_has_emptied() -> None:
    with context("dense") as ctx:
        session = Session(ctx)
        session.feed([1, 2, 3])
        ctx.seq_rm(0)
        with pytest.raises(SequenceChangedError):
            _ = session.logits


def test_budgets_where_checkpoints_lie_past_the_present() -> None:
    with context("mamba") as ctx:
        session = Session(ctx, max_checkpoints=2)
        session.feed(tokens(9, 1))
        session.checkpoint()
        session.feed([1])
        session.checkpoint()
        session.feed([2])
        session.undo(2)
        session.checkpoint()
        assert sum(p.state is not None for p in session.history) == 2
        session.redo(2)
        assert session.n_past == 11
        assert_exact(session, "mamba")


FORK = """
import os, time
from llamastate import Context, Session
from tests.helpers import model, tokens
session = Session(Context(model("dense"), n_ctx=256, n_threads=2))
session.feed(tokens(50, 1))
pid = os.fork()
session.feed([1])
os.write(1, session.logits.tobytes().hex().encode() + b"\\n")  # in one piece: both write to one pipe
if not pid:
    os._exit(0)
for _ in range(600):
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
        assert not status
        break
    time.sleep(0.1)
else:
    os.kill(pid, 9)
    raise TimeoutError
"""


def test_a_child_goes_on_where_the_parent_computed_with_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    ended = children.run(FORK)
    assert not ended.returncode, ended.stderr
    first, second = ended.stdout.split()
    assert first == second
