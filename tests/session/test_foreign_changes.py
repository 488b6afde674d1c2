"""Somebody else changes the sequence of a session, and leaves it as long as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamastate import Batch, Context, LlamaStateError, SequenceChangedError, Session, Snapshot, TokenizeError
from llamastate._native import memory, state
from llamastate._native.changes import Changes, Witness
from llamastate.errors import InvalidSequenceError
from llamastate.restore import count_room, put_back
from tests.helpers import assert_same_logits, context, tokens

IDS, OTHERS = tokens(40, 1), tokens(40, 2)


def decode_again(ctx: Context) -> None:
    ctx.seq_rm(0, 39, -1)
    ctx.decode([5])


def decode_a_batch(ctx: Context) -> None:
    ctx.seq_rm(0, 39, -1)
    batch = Batch()
    batch.add(5, pos=39)
    ctx.decode_batch(batch)


def load_all(ctx: Context) -> None:
    with context(ctx.model, n_seq_max=3) as another:
        another.prefill(OTHERS)
        ctx.state_set_data(another.state_get_data())


def through_another_session(ctx: Context) -> None:
    other = Session(ctx, tokens=IDS)
    other.rollback(20)
    other.feed(OTHERS[20:])


def start_anew(ctx: Context) -> None:
    ctx.clear()
    ctx.prefill(OTHERS)


CHANGES: dict[str, Callable[[Context], Any]] = {
    "set": lambda ctx: ctx.state_seq_set_data(ctx.state_seq_get_data(1), 0),
    "set, partial": lambda ctx: ctx.state_seq_set_data(ctx.state_seq_get_data(1, 1), 0, 1),
    "snapshot": lambda ctx: Snapshot.take(ctx, 1, OTHERS).restore(ctx, 0),
    "copy": lambda ctx: ctx.seq_cp(1, 0),
    "move and back": lambda ctx: (ctx.seq_add(0, 0, -1, 1), ctx.seq_add(0, 0, -1, -1)),
    "hole": lambda ctx: ctx.seq_rm(0, 5, 10),
    "load all": load_all,
    "clear": start_anew,
    "decode": decode_again,
    "batch": decode_a_batch,
    "another session": through_another_session,
}
ONLY = {"set, partial": "iswa", "move and back": "dense", "hole": "dense", "decode": "dense", "batch": "dense"}


@pytest.mark.parametrize("kind", ["dense", "iswa", "mamba", "jamba"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_leaves_the_length(kind: str, change: str) -> None:
    if ONLY.get(change, kind) != kind:
        return
    with context(kind, n_seq_max=3) as ctx:
        session, neighbour = Session(ctx), Session(ctx, 2)
        session.feed(IDS)
        session.checkpoint()
        ctx.prefill(OTHERS, seq_id=1)
        neighbour.feed(IDS[:3])
        CHANGES[change](ctx)
        assert ctx.seq_pos_max(0) == 39
        for use in (
            lambda: session.feed([1]),
            lambda: session.generate(1),
            lambda: session.logits,
            session.undo,
            session.snapshot,
            session.checkpoint,
            lambda: session.branch(2),
        ):
            with pytest.raises(SequenceChangedError) as caught:
                use()
            assert (caught.value.seq_id, caught.value.expected, caught.value.found) == (0, 40, 40)
        before = ctx.state_seq_get_data(0) if change != "move and back" else None
        session.close()
        if before is not None:
            np.testing.assert_array_equal(ctx.state_seq_get_data(0), before)  # it is somebody else's now
        if change not in ("load all", "clear"):
            neighbour.feed([4])


def test_a_change_in_the_middle_of_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    with context("dense", n_seq_max=2, n_batch=16) as ctx:
        ctx.prefill(OTHERS, seq_id=1)
        session = Session(ctx)
        session.feed(IDS[:16])
        step = Session._decode

        def between(*arguments: Any, **options: Any) -> None:
            step(*arguments, **options)
            held = ctx.seq_pos_max(0) + 1
            thread = threading.Thread(target=lambda: (ctx.seq_rm(0), ctx.seq_cp(1, 0, 0, held)))
            thread.start()
            thread.join()

        monkeypatch.setattr(Session, "_decode", between)
        session.feed(IDS[16:32])
        assert ctx.seq_pos_max(0) + 1 == session.n_past == 32
        with pytest.raises(SequenceChangedError):
            session.feed([1])


@pytest.mark.parametrize("kind", ["dense", "iswa", "mamba", "jamba"])
def test_its_own_doings_are_none(kind: str, tmp_path: Path) -> None:
    with context(kind, n_seq_max=4) as ctx, context(kind) as fresh:
        session = Session(ctx)
        ctx.prefill(OTHERS)
        ctx.seq_rm(0)  # the session is empty, and so is the sequence
        session.feed(IDS)
        session.checkpoint()
        ctx.prefill(OTHERS, seq_id=3)
        ctx.state_seq_set_data(ctx.state_seq_get_data(3), 2)
        ctx.seq_cp(0, 1)
        ctx.seq_rm(1)
        other = session.branch(1)
        other.generate(3)
        with pytest.raises(TokenizeError):
            session.feed([1, 256])
        session.sync([*IDS[:30], *OTHERS])
        session.undo() if len(session.checkpoints) and session.n_past > 40 else session.rollback(20)
        ctx.seq_rm(2)
        ctx.seq_rm(3)
        session.save(tmp_path / "s")
        loaded = Session.load(ctx, tmp_path / "s", seq_id=2)
        session.export_file(tmp_path / "t")
        imported = Session.import_file(ctx, tmp_path / "t", seq_id=3)
        with session.snapshot() as snapshot:
            other.restore(snapshot)
        for each in (session, other, loaded, imported):
            fresh.clear()
            fresh.prefill(each.tokens)
            each.feed([9])
            fresh.decode([9])
            assert_same_logits(each.logits, fresh.logits())


def test_who_is_put_back_with_the_whole_context_has_not_changed() -> None:
    with context("dense", n_seq_max=2) as ctx:
        session, other = Session(ctx), Session(ctx, 1)
        session.feed(IDS)
        other.feed(OTHERS)
        room = count_room(ctx, 1)
        memory.seq_rm(ctx._handle, 1, -1, -1)
        put_back(ctx, 1, room)
        session.feed([1])
        with pytest.raises(SequenceChangedError):
            other.feed([1])


def test_what_changes_nothing_is_no_change() -> None:
    with context("dense", n_seq_max=2) as ctx:
        session = Session(ctx)
        session.feed(IDS)
        blob = ctx.state_seq_get_data(0)
        assert ctx.seq_rm(0, 40, -1)
        for wrong in (lambda: ctx.state_seq_set_data(blob[:-1], 0), lambda: ctx.decode([1] * 2000)):
            with pytest.raises(LlamaStateError):
                wrong()
        Snapshot.take(ctx, 0, IDS)
        session.feed([1])


def test_a_witness_nests_and_knows_its_thread() -> None:
    with context("dense", n_seq_max=2) as ctx:
        changes = ctx._handle.changes
        first, second = Witness(changes, 0), Witness(changes, 0)
        first.enter()
        first.enter()
        first.leave()
        ctx.prefill(IDS)
        assert first.intact
        assert not second.intact
        second.accept()
        second.enter()  # inside the first one's turn
        ctx.decode([1])
        second.leave()
        assert second.intact
        assert not first.intact
        first.accept()
        ctx.decode([1])
        assert first.intact
        thread = threading.Thread(target=ctx.decode, args=([1],))
        thread.start()
        thread.join()
        assert not first.intact
        first.accept()
        first.leave()
        changes.note_all([1])
        assert first.intact
        changes.note_all([0, 1])
        assert not first.intact
        count = changes.count(0)
        first.accept()
        first.enter()
        ctx.decode([1])
        changes.set_back(0, count)
        assert first.intact
        first.leave()
        ctx.decode([1])
        assert not first.intact
        changes.set_back(0, count)
        assert first.intact
        for seq in (-1, 2, 1 << 40):
            with pytest.raises(InvalidSequenceError):
                Witness(changes, seq)
            with pytest.raises(InvalidSequenceError):
                changes.note_all([seq])
    with pytest.raises(TypeError):
        Changes()


def test_a_state_that_llama_cpp_refuses_may_have_changed_everything() -> None:
    with context("dense", n_seq_max=2) as ctx:
        witness = Witness(ctx._handle.changes, 1)
        assert state.set_data(ctx._handle, b"nonsense" * 20, 0) == 0
        assert not witness.intact
