"""What a state is for: a context that it is put into goes on exactly as the one that it was taken from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llamastate import Context
from tests.exactness.matrix import MATRIX, PROMPT, STEPS, USUAL, Settings, assert_continues, name
from tests.helpers import assert_same_logits, context, follow, nmse, tokens

every_point = pytest.mark.parametrize("point", MATRIX, ids=name)
usual_points = pytest.mark.parametrize("point", USUAL, ids=name)


@every_point
def test_one_sequence(point: Settings):
    source, first = point.filled()
    blob = source.state_seq_get_data(point.seq_id)
    expected = follow(source, first, STEPS, seq_id=point.seq_id)

    fresh = point.context()
    assert fresh.state_seq_set_data(blob, point.seq_id) == blob.nbytes
    assert_continues(point, follow(fresh, first, STEPS, seq_id=point.seq_id), expected)


@every_point
def test_whole_context(point: Settings):
    source, first = point.filled()
    blob = source.state_get_data()
    spans = [(source.seq_pos_min(seq), source.seq_pos_max(seq)) for seq in range(point.n_seq_max)]
    expected = {seq: follow(source, first, STEPS, seq_id=seq) for seq in range(point.n_seq_max)}

    fresh = point.context()
    fresh.decode(tokens(7, seed=3), seq_id=point.seq_id)  # to be replaced
    assert fresh.state_set_data(blob) == blob.nbytes
    assert [(fresh.seq_pos_min(seq), fresh.seq_pos_max(seq)) for seq in range(point.n_seq_max)] == spans
    np.testing.assert_array_equal(fresh.state_get_data(), blob)
    for seq in range(point.n_seq_max):
        # Cells lie where they lay: also several sequences in one pool must go on without a bit's difference. (Next
        # cells of a window are chosen from where the cache's search begins, which is no part of a state.)
        found = follow(fresh, first, STEPS, seq_id=seq)
        exact = point if "iswa" in point.memory_kind else point._replace(n_seq_max=1)
        assert_continues(exact, found, expected[seq])


@every_point
def test_through_files(point: Settings, tmp_path: Path):
    source, first = point.filled()
    ids = tokens(PROMPT, seed=9)
    of_sequence, of_context = tmp_path / "sequence", tmp_path / "context"
    size = source.state_seq_save_file(of_sequence, point.seq_id, ids)
    source.state_save_file(of_context, ids)
    expected = follow(source, first, STEPS, seq_id=point.seq_id)

    fresh = point.context()
    loaded, n_bytes = fresh.state_seq_load_file(of_sequence, point.seq_id)
    np.testing.assert_array_equal(loaded, ids)
    assert n_bytes == size == of_sequence.stat().st_size
    assert_continues(point, follow(fresh, first, STEPS, seq_id=point.seq_id), expected)

    fresh.clear()
    np.testing.assert_array_equal(fresh.state_load_file(of_context), ids)
    assert_continues(point, follow(fresh, first, STEPS, seq_id=point.seq_id), expected)


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@usual_points
def test_into_another_sequence(point: Settings, unified: bool):
    """Between sequences of two contexts, onto one that holds something else; the neighbours never notice."""
    point = point._replace(unified=unified)
    source, first = point.filled()
    blob = source.state_seq_get_data(point.seq_id)
    expected = follow(source, first, STEPS, seq_id=point.seq_id)

    other, _ = point.filled()
    neighbours = [seq for seq in range(point.n_seq_max) if seq != 1]
    before = {seq: other.state_seq_get_data(seq) for seq in neighbours}
    other.state_seq_set_data(blob, 1)
    for seq in neighbours:
        np.testing.assert_array_equal(other.state_seq_get_data(seq), before[seq])
    found = follow(other, first, STEPS, seq_id=1)
    assert found[0] == expected[0]
    assert_same_logits(found[1], expected[1])


@usual_points
def test_back_into_the_same_context(point: Settings):
    """Take, go on, go back, go on: twice, and once from a longer sequence than was restored."""
    ctx, first = point.filled()
    seq = point.seq_id
    blob = ctx.state_seq_get_data(seq)
    expected = follow(ctx, first, STEPS, seq_id=seq)
    for further in (5, 60):
        ctx.prefill(tokens(further, seed=further), seq_id=seq)
        ctx.state_seq_set_data(blob, seq)
        found = follow(ctx, first, STEPS, seq_id=seq)
        assert found[0] == expected[0]
        assert_same_logits(found[1], expected[1])


@usual_points
def test_interleaved_cells(point: Settings):
    """Sequences decoded in turns lie between one another in the cells, and still come out whole."""
    source = point.context()
    ids = tokens(PROMPT, seed=9)
    for at in range(0, PROMPT, 9):
        for seq in range(point.n_seq_max):
            source.decode(ids[at : at + 9] ^ seq, seq_id=seq)
    first = int(source.logits().argmax())
    last = point.n_seq_max - 1
    blob = source.state_seq_get_data(last)
    expected = follow(source, first, STEPS, seq_id=last)

    alone = point.context()
    alone.state_seq_set_data(blob, last)
    found = follow(alone, first, STEPS, seq_id=last)
    assert found[0] == expected[0]
    assert_same_logits(found[1], expected[1])


@pytest.mark.parametrize("flash_attn", ["on", "off"])
@pytest.mark.parametrize("kind", ["iswa", "iswa11", "lfm2swa"])
def test_window_cells_used_again(kind: str, flash_attn: str):
    """A text so long that the window's cache has gone round: its cells lie in no order, some are masked."""

    def small() -> Context:
        return context(kind, n_ctx=1024, n_ubatch=64, flash_attn=flash_attn)

    source = small()
    source.prefill(tokens(600), chunk=50)
    assert source.seq_pos_min(0) > 300
    first = int(source.logits().argmax())
    whole, one = source.state_get_data(), source.state_seq_get_data(0)
    expected = follow(source, first, STEPS)

    again = small()
    again.state_set_data(whole)
    assert_same_logits(follow(again, first, STEPS)[1], expected[1])
    again.state_seq_set_data(one, 0)
    assert_same_logits(follow(again, first, STEPS)[1], expected[1])


@usual_points
def test_empty_sequence(point: Settings):
    """The state of an empty sequence is a state too: it empties the one that it is put into."""
    source = point.context()
    blob = source.state_seq_get_data(point.seq_id)
    first = 7
    expected = follow(source, first, STEPS, seq_id=point.seq_id)

    other, _ = point.filled()
    other.state_seq_set_data(blob, point.seq_id)
    assert other.seq_pos_max(point.seq_id) == -1
    found = follow(other, first, STEPS, seq_id=point.seq_id)
    assert found[0] == expected[0]
    assert_same_logits(found[1], expected[1])


@usual_points
def test_tolerance_sees_one_wrong_token(point: Settings):
    """What passes for noise above is far below what another token, 20 positions back, does to the logits."""
    one, first = point.filled()
    other, _ = point.filled()
    changed = tokens(PROMPT, seed=9)
    changed[PROMPT - 20] ^= 1
    other.seq_rm(point.seq_id)
    other.prefill(changed, seq_id=point.seq_id, chunk=40)
    wrong = other.state_seq_get_data(point.seq_id)
    assert wrong.shape == one.state_seq_get_data(point.seq_id).shape

    expected = follow(one, first, 1, seq_id=point.seq_id)[1]
    fresh = point.context()
    fresh.state_seq_set_data(wrong, point.seq_id)
    assert nmse(follow(fresh, first, 1, seq_id=point.seq_id)[1], expected) > 1e-4
