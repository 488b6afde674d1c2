"""Logits are no part of a state: when there are any, when they are refused, how long a view of them lives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from llamastate import Batch, ClosedError, Context, ContextBusyError, LoadError, LogitsUnavailableError, Model, SeqFlags
from tests.conftest import THREADS
from tests.helpers import context, model, tokens


@pytest.fixture
def ctx() -> Iterator[Context]:
    """Two sequences of a window model, whose partial state is smaller than the whole one."""
    with context("iswa", n_seq_max=2) as ctx:
        ctx.decode(tokens(50, seed=1), seq_id=0)
        ctx.decode(tokens(70, seed=2), seq_id=1)
        yield ctx


CHANGES: dict[str, Callable[[Context], Any]] = {
    "restored": lambda ctx: ctx.state_seq_set_data(ctx.state_seq_get_data(1), 1),
    "restored from a part": lambda ctx: ctx.state_seq_set_data(
        ctx.state_seq_get_data(1, SeqFlags.PARTIAL_ONLY), 1, SeqFlags.PARTIAL_ONLY
    ),
    "emptied": lambda ctx: ctx.seq_rm(1),
    "trimmed": lambda ctx: ctx.seq_rm(1, ctx.seq_pos_max(1)),
    "overwritten": lambda ctx: ctx.seq_cp(0, 1),
    "not kept": lambda ctx: ctx.seq_keep(0),
}


def two_outputs(ctx: Context) -> None:
    """Output 0 belongs to sequence 0, output 1 to sequence 1."""
    batch = Batch()
    for seq in (0, 1):
        batch.add(7 + seq, pos=ctx.seq_pos_max(seq) + 1, seq_ids=seq, logits=True)
    assert ctx.decode_batch(batch) == 2


@pytest.mark.parametrize("change", CHANGES)
def test_logits_of_a_changed_sequence_are_refused(ctx: Context, change: str):
    two_outputs(ctx)
    kept = ctx.logits(0)
    CHANGES[change](ctx)
    for index in (1, -1):
        with pytest.raises(LogitsUnavailableError) as caught:
            ctx.logits(index)
        assert caught.value.index == index
        with pytest.raises(LogitsUnavailableError):
            ctx.logits(index, copy=False)
    np.testing.assert_array_equal(ctx.logits(0), kept)
    np.testing.assert_array_equal(ctx.logits(-2), kept)
    ctx.decode([9], seq_id=1)
    assert np.isfinite(ctx.logits()).all()


def test_logits_of_a_shifted_sequence_are_refused():
    with context("dense", n_seq_max=2) as ctx:
        two_outputs(ctx)
        kept = ctx.logits(0)
        ctx.seq_add(1, 0, -1, 1)
        with pytest.raises(LogitsUnavailableError):
            ctx.logits(1)
        np.testing.assert_array_equal(ctx.logits(0), kept)


WHOLE_CHANGES: dict[str, Callable[[Context], Any]] = {
    "restored": lambda ctx: ctx.state_set_data(ctx.state_get_data()),
    "cleared": lambda ctx: ctx.clear(),
}


@pytest.mark.parametrize("change", WHOLE_CHANGES)
def test_all_logits_of_a_changed_context_are_refused(ctx: Context, change: str):
    two_outputs(ctx)
    WHOLE_CHANGES[change](ctx)
    for index in (0, 1, -1, -2):
        with pytest.raises(LogitsUnavailableError):
            ctx.logits(index)


def test_taking_a_state_leaves_the_logits(ctx: Context):
    two_outputs(ctx)
    before = [ctx.logits(0), ctx.logits(1)]
    ctx.state_get_data()
    ctx.state_seq_get_data(1)
    ctx.seq_rm(1, 500)  # nothing there
    np.testing.assert_array_equal([ctx.logits(0), ctx.logits(1)], before)


def test_a_refused_blob_leaves_the_logits(ctx: Context):
    two_outputs(ctx)
    before = ctx.logits(1)
    with pytest.raises(LoadError):
        ctx.state_seq_set_data(ctx.state_seq_get_data(1)[:-4], 1)
    with pytest.raises(LoadError):
        ctx.state_set_data(ctx.state_get_data()[:-4])
    np.testing.assert_array_equal(ctx.logits(1), before)


# --- views of logits --------------------------------------------------------------------------------------------------


def test_a_view_shows_what_is_there_now():
    with context("dense") as ctx:
        ctx.decode(tokens(5))
        view, copy = ctx.logits(copy=False), ctx.logits()
        np.testing.assert_array_equal(view, copy)
        assert not view.flags.writeable
        assert not view.flags.owndata
        with pytest.raises(ValueError, match="WRITEABLE"):
            view.flags.writeable = True
        ctx.decode([9])  # one output again: it goes to the same place
        np.testing.assert_array_equal(view, ctx.logits())
        assert (view != copy).any()
        del view


def test_a_decode_that_would_move_a_view_is_refused():
    with context("dense") as ctx:
        ctx.decode(tokens(5))
        view = ctx.logits(copy=False)
        expected = view.copy()
        state = ctx.state_get_data()
        with pytest.raises(ContextBusyError) as caught:
            ctx.decode(tokens(6), logits="all")
        assert caught.value.operation == "decode"
        np.testing.assert_array_equal(ctx.state_get_data(), state)
        np.testing.assert_array_equal(view, expected)
        part = view[3:7]  # a part of a view holds it as well
        del view
        with pytest.raises(ContextBusyError):
            ctx.decode(tokens(6), logits="all")
        del part
        assert ctx.decode(tokens(6), logits="all") == 6
        several = [ctx.logits(i, copy=False) for i in range(6)]
        assert ctx.decode(tokens(6), logits="all") == 6  # no more than before: nothing moves
        np.testing.assert_array_equal(several, [ctx.logits(i) for i in range(6)])


def test_a_view_outlives_its_context():
    ctx = Context(Model(model("dense").path), n_ctx=256, n_threads=THREADS)
    ctx.decode(tokens(5))
    view = ctx.logits(copy=False)
    expected = view.copy()
    ctx.close()
    ctx.model.close()
    assert ctx.closed
    with pytest.raises(ClosedError):
        ctx.decode([1])
    del ctx
    np.testing.assert_array_equal(view, expected)
