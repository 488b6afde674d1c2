"""What must hold when llama.cpp fails where it should not: faults that cannot be caused are put in its place."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamastate import Context, atomic
from llamastate._native import decode, state
from llamastate.errors import DecodeError, LoadError, LogitsUnavailableError, NoKVSlotError, NotEnoughCellsError
from tests.helpers import KINDS, assert_same_logits, context, tokens


def blobs(ctx: Context) -> list[bytes]:
    return [ctx.state_seq_get_data(seq).tobytes() for seq in range(ctx.n_seq_max)]


def test_two_removals_do_not_beat_the_window() -> None:
    with context("iswa") as ctx:
        ctx.decode(tokens(100))
        ctx.state_seq_set_data(ctx.state_seq_get_data(0), 0)
        assert not ctx.seq_rm(0, 80, -1)
        assert not ctx.seq_rm(0, 80, 99)
        assert ctx.seq_pos_max(0) == 99


def test_refused_after_all_and_no_copy_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not known how llama.cpp could refuse; the sequence is empty then, and the error says so."""
    with context("dense") as ctx:
        ctx.decode(tokens(20))
        blob = ctx.state_seq_get_data(0)
        monkeypatch.setattr(state, "seq_set_data", lambda *_: 0)
        with pytest.raises(LoadError) as caught:
            ctx.state_seq_set_data(blob, 0)
        assert caught.value.removed == (0,)
        assert ctx.seq_pos_max(0) == -1


@pytest.mark.parametrize("fault", [lambda *_: 0, MemoryError])
def test_refused_after_all_with_a_copy(monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    """Where the pool is nearly full the whole context was copied: everything is put back."""
    with context("dense", n_ctx=256, n_seq_max=2) as ctx:
        ctx.prefill(tokens(120), seq_id=0)
        ctx.prefill(tokens(100, 1), seq_id=1)
        ctx.seq_rm(1, 60, -1)
        blob = ctx.state_seq_get_data(1)
        ctx.prefill(tokens(70, 2), seq_id=1)
        before = blobs(ctx)

        def fail(*arguments: Any) -> int:
            if fault is MemoryError:
                raise MemoryError
            return 0

        monkeypatch.setattr(state, "seq_set_data", fail)
        monkeypatch.setattr("llamastate.restore._obviously_fits", lambda *_: False)
        with pytest.raises((LoadError, MemoryError)):
            ctx.state_seq_set_data(blob, 1)
        assert blobs(ctx) == before


def test_a_pool_too_full_is_known_before_anything_goes() -> None:
    with context("dense", n_ctx=256, n_seq_max=3) as ctx, context("dense", n_ctx=256) as other:
        other.prefill(tokens(150))
        blob = other.state_seq_get_data(0)
        ctx.prefill(tokens(100))
        ctx.seq_cp(0, 1)
        ctx.prefill(tokens(20, 1), seq_id=1)
        ctx.prefill(tokens(60, 2), seq_id=2)
        before = blobs(ctx)
        with pytest.raises(NotEnoughCellsError) as caught:
            ctx.state_seq_set_data(blob, 1)
        assert (caught.value.needed, caught.value.available) == (150, 256 - 160)
        assert blobs(ctx) == before


@pytest.mark.parametrize("kind", KINDS)
def test_aborted_decodes_are_taken_back(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Where trimming is exact the sequence is as before; elsewhere it is empty, and ``removed`` says so."""
    real = decode.decode
    with context(kind, n_seq_max=2) as ctx, context(kind) as fresh:
        ctx.prefill(tokens(30), seq_id=1)
        other = ctx.state_seq_get_data(1).tobytes()
        ctx.prefill(tokens(20))

        def half(handle: Any, *arrays: Any) -> int:
            real(handle, *arrays)  # some of it has been computed when the abort comes
            raise DecodeError("aborted", code=2, n_tokens=len(arrays[0]))

        monkeypatch.setattr(decode, "decode", half)
        with pytest.raises(DecodeError) as caught:
            ctx.decode(tokens(10, 1))
        monkeypatch.undo()
        assert ctx.state_seq_get_data(1).tobytes() == other
        if caught.value.removed:
            assert caught.value.removed == (0,)
            assert ctx.seq_pos_max(0) == -1
        else:
            assert ctx.seq_pos_max(0) == 19
            ctx.decode([5])
            fresh.prefill([*tokens(20).tolist(), 5])
            assert_same_logits(ctx.logits(), fresh.logits())
        assert bool(caught.value.removed) == (ctx.model.is_recurrent or ctx.model.is_hybrid)


def test_copies_do_not_fill_the_window_with_the_past() -> None:
    with context("iswa", n_ctx=1024, n_seq_max=2, n_batch=64) as ctx, context("iswa", n_ctx=1024) as fresh:
        ctx.prefill(tokens(200), chunk=64)
        ctx.seq_cp(0, 1)
        new = tokens(260, 1)
        for at in range(0, 260, 20):
            ctx.decode(new[at : at + 20], seq_id=0)
            ctx.decode(new[at : at + 20], seq_id=1)
        fresh.prefill(np.concatenate([tokens(200), new]), chunk=64)
        assert_same_logits(ctx.logits(), fresh.logits())


def test_window_cells_that_cannot_be_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    with context("iswa", n_ctx=256, n_seq_max=2) as ctx:
        ctx.prefill(tokens(250), chunk=64)
        ctx.seq_cp(0, 1)
        with pytest.raises(NoKVSlotError):
            ctx.decode(tokens(20, 1), seq_id=1)
        assert ctx.seq_pos_max(1) == 249


def test_pooled_embeddings_of_a_state_that_is_gone() -> None:
    with context("dense", embeddings=True, pooling_type="mean") as ctx:
        ctx.decode(tokens(8))
        assert ctx.embeddings_seq(0).shape == (ctx.model.n_embd_out,)
        ctx.clear()
        with pytest.raises(LogitsUnavailableError):
            ctx.embeddings_seq(0)


@pytest.mark.parametrize("unified", [True, False])
def test_a_copy_from_the_beginning_replaces(unified: bool) -> None:
    with context("dense", n_ctx=1024, n_seq_max=2, kv_unified=unified) as ctx:
        ctx.decode(tokens(80), seq_id=0)
        ctx.decode(tokens(100, 1), seq_id=1)
        ctx.seq_cp(0, 1, 0, 50)
        assert ctx.seq_pos_max(1) == 49


def test_saving_keeps_permissions(tmp_path: Path) -> None:
    path = tmp_path / "private"
    path.write_bytes(b"old")
    path.chmod(0o600)
    atomic.write_atomically(path, [b"new"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_forked_children_end(tmp_path: Path) -> None:
    """A thread of the parent is inside a context when it forks: the child must not wait for it at its end."""
    with context("dense") as ctx:
        inside, go = threading.Event(), threading.Event()

        def hold() -> None:
            with ctx._handle:
                inside.set()
                go.wait(60)

        thread = threading.Thread(target=hold)
        thread.start()
        inside.wait(60)
        script = tmp_path / "mark"
        pid = os.fork()
        if not pid:
            try:
                from llamastate import lifetimes

                lifetimes._close_all()
                script.write_text("ended")
            finally:
                os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        go.set()
        thread.join()
        assert script.read_text() == "ended"
