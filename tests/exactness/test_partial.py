"""Going back: checkpoints of the part that cannot be trimmed, and of states whose tensors stay in the context."""

from __future__ import annotations

import numpy as np
import pytest

from llamastate import SeqFlags
from tests.exactness.matrix import MATRIX, STEPS, USUAL, Settings, assert_continues, name
from tests.helpers import assert_same_logits, context, follow, tokens

#: Quantised caches hold nothing new here.
POINTS = [point for point in MATRIX if point.cache_type == "f16"]
every_point = pytest.mark.parametrize("point", POINTS, ids=name)
usual_points = pytest.mark.parametrize("point", USUAL, ids=name)
every_flag = pytest.mark.parametrize(
    "flags", [SeqFlags.PARTIAL_ONLY, SeqFlags.ON_DEVICE, SeqFlags.PARTIAL_ONLY | SeqFlags.ON_DEVICE], ids=repr
)


@every_point
@every_flag
def test_undo(point: Settings, flags: SeqFlags):
    """Checkpoint, go on, go back, go on: far enough that a window has lost all that it held at the checkpoint."""
    ctx, first = point.filled()
    seq = point.seq_id
    last = ctx.seq_pos_max(seq)
    checkpoint = ctx.state_seq_get_data(seq, flags)
    other, _ = point.filled()
    expected = follow(other, first, STEPS, seq_id=seq)

    for further in (1, 3, 120):
        for at in range(0, further, 40):
            ctx.decode(tokens(min(40, further - at), seed=further), seq_id=seq)
        assert ctx.state_seq_set_data(checkpoint, seq, flags) == checkpoint.nbytes
        assert ctx.seq_pos_max(seq) == last
        found = follow(ctx, first, STEPS, seq_id=seq)
        assert found[0] == expected[0]
        assert_same_logits(found[1], expected[1])


@pytest.mark.parametrize("flash_attn", ["on", "off"])
@pytest.mark.parametrize("kind", ["iswa", "iswa11", "lfm2swa"])
def test_undo_of_a_text_longer_than_the_cache_of_the_window(kind: str, flash_attn: str):
    """The window's cells have all been written again since the checkpoint."""
    ctx, other = (context(kind, n_ctx=1024, n_ubatch=64, flash_attn=flash_attn) for _ in range(2))
    for each in (ctx, other):
        each.prefill(tokens(90), chunk=40)
    first = int(ctx.logits().argmax())
    checkpoint = ctx.state_seq_get_data(0, SeqFlags.PARTIAL_ONLY)
    ctx.prefill(tokens(700, seed=1), chunk=64)
    assert ctx.seq_pos_min(0) > 89
    ctx.state_seq_set_data(checkpoint, 0, SeqFlags.PARTIAL_ONLY)
    found, expected = follow(ctx, first, STEPS), follow(other, first, STEPS)
    assert found[0] == expected[0]
    assert_same_logits(found[1], expected[1])


@every_point
def test_partial_says_what_it_holds(point: Settings):
    """The whole state where there is nothing to leave out, and a smaller one where there is."""
    ctx, _ = point.filled()
    whole = ctx.state_seq_get_data(point.seq_id)
    partial = ctx.state_seq_get_data(point.seq_id, SeqFlags.PARTIAL_ONLY)
    assert ctx.state_seq_get_size(point.seq_id, SeqFlags.PARTIAL_ONLY) == partial.nbytes
    if point.memory_kind in ("attention", "recurrent"):
        np.testing.assert_array_equal(partial, whole)
    else:
        assert partial.nbytes < whole.nbytes
        # The parts follow each other in a blob: what is partial is its end.
        np.testing.assert_array_equal(partial[8:], whole[-(partial.nbytes - 8) :])


@usual_points
def test_partial_onto_a_copy(point: Settings):
    """Fork a sequence, go on in the fork, take the fork back to the branch point: the original is as it was."""
    ctx, first = point.filled()
    src, dst = point.seq_id, point.seq_id + 1
    checkpoint = ctx.state_seq_get_data(src, SeqFlags.PARTIAL_ONLY)
    ctx.seq_cp(src, dst)
    ctx.decode(tokens(50, seed=4), seq_id=dst)
    ctx.state_seq_set_data(checkpoint, dst, SeqFlags.PARTIAL_ONLY)
    forked = follow(ctx, first, STEPS, seq_id=dst)
    original = follow(ctx, first, STEPS, seq_id=src)
    other, _ = point.filled()
    expected = follow(other, first, STEPS, seq_id=src)
    for found in (forked, original):
        assert found[0] == expected[0]
        assert_same_logits(found[1], expected[1])


@usual_points
def test_partial_after_a_full_restore(point: Settings):
    """A full blob is a base for partial ones: keep one, then checkpoints as small as their kind allows."""
    ctx, first = point.filled()
    seq = point.seq_id
    base = ctx.state_seq_get_data(seq)
    ctx.decode([first], seq_id=seq)
    second = int(ctx.logits().argmax())
    partial = ctx.state_seq_get_data(seq, SeqFlags.PARTIAL_ONLY)
    expected = follow(ctx, second, STEPS, seq_id=seq)

    fresh = point.context()
    fresh.state_seq_set_data(base, seq)
    fresh.decode([first], seq_id=seq)
    fresh.decode(tokens(30, seed=2), seq_id=seq)
    fresh.state_seq_set_data(partial, seq, SeqFlags.PARTIAL_ONLY)
    found = follow(fresh, second, STEPS, seq_id=seq)
    assert found[0] == expected[0]
    assert_same_logits(found[1], expected[1])


@usual_points
def test_device_states_of_two_sequences(point: Settings):
    """Each sequence has a state of its own in the context; restoring one leaves the other's good."""
    ctx, first = point.filled()
    one, two = point.seq_id, point.seq_id - 1
    blobs = {seq: ctx.state_seq_get_data(seq, SeqFlags.ON_DEVICE) for seq in (one, two)}
    assert all(blob.nbytes < ctx.state_seq_get_size(seq) for seq, blob in blobs.items())
    other, _ = point.filled()
    for seq in (one, two):
        expected = follow(other, first, STEPS, seq_id=seq)
        ctx.decode(tokens(25, seed=1), seq_id=seq)
        ctx.state_seq_set_data(blobs[seq], seq, SeqFlags.ON_DEVICE)
        found = follow(ctx, first, STEPS, seq_id=seq)
        assert found[0] == expected[0]
        assert_same_logits(found[1], expected[1])


@usual_points
def test_checkpoint_of_one_token(point: Settings):
    """The shortest history there is to go back to."""
    point = point._replace(n_seq_max=1)
    ctx, expected_ctx = point.context(), point.context()
    for each in (ctx, expected_ctx):
        each.decode([5])
    first = int(ctx.logits().argmax())
    checkpoint = ctx.state_seq_get_data(0, SeqFlags.PARTIAL_ONLY)
    ctx.prefill(tokens(70))
    ctx.state_seq_set_data(checkpoint, 0, SeqFlags.PARTIAL_ONLY)
    assert_continues(point, follow(ctx, first, STEPS), follow(expected_ctx, first, STEPS))
