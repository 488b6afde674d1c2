"""The same with real weights, which quantisation makes far more sensitive to the order of cells and the cut of batches.

So everything here is decoded in the same pieces on both sides.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llamastate import Context, Model, SeqFlags
from tests import models
from tests.helpers import assert_same_logits, follow

TEXT = """Once there was a king who had three sons, and he did not know to which of them he should leave the crown.
So he sent them out into the world to see which of them would bring him the most beautiful carpet. """


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def model(request: pytest.FixtureRequest) -> Model:
    return Model(models.smollm2() if request.param == "smollm2" else models.gemma3())


def prepared(model: Model, n_threads: int) -> tuple[Context, int]:
    """A context after the text, and the token to go on with."""
    ctx = Context(model, n_ctx=1024, n_ubatch=128, n_threads=n_threads)
    ctx.prefill(model.tokenize(TEXT), chunk=32)
    return ctx, int(ctx.logits().argmax())


def test_restored_state_goes_on_alike(model: Model, n_threads: int, tmp_path: Path):
    source, first = prepared(model, n_threads)
    ids = model.tokenize(TEXT)
    source.state_seq_save_file(tmp_path / "state", 0, ids)
    blob = source.state_seq_get_data(0)
    chosen, rows = follow(source, first, 6)

    fresh = Context(model, n_ctx=1024, n_ubatch=128, n_threads=n_threads)
    for restore in (
        lambda: fresh.state_seq_set_data(blob, 0),
        lambda: fresh.state_seq_load_file(tmp_path / "state", 0),
    ):
        restore()
        assert fresh.seq_pos_max(0) == len(ids) - 1
        found = follow(fresh, first, 6)
        assert found[0] == chosen
        np.testing.assert_array_equal(found[1], rows)


def test_undo_goes_on_alike(model: Model, n_threads: int):
    """A partial state: of Gemma's window, of SmolLM2's whole cache."""
    ctx, first = prepared(model, n_threads)
    last = ctx.seq_pos_max(0)
    checkpoint = ctx.state_seq_get_data(0, SeqFlags.PARTIAL_ONLY)
    chosen, rows = follow(ctx, first, 6)
    ctx.state_seq_set_data(checkpoint, 0, SeqFlags.PARTIAL_ONLY)
    assert ctx.seq_pos_max(0) == last
    found = follow(ctx, first, 6)
    assert found[0] == chosen
    assert_same_logits(found[1], rows)


def test_fork_goes_on_alike(model: Model, n_threads: int):
    """Four sequences of one state, each fed something else, then the first one again."""
    source, first = prepared(model, n_threads)
    blob = source.state_seq_get_data(0)
    expected = follow(source, first, 4)
    forks = Context(model, n_ctx=1024, n_ubatch=128, n_seq_max=4, n_threads=n_threads)
    forks.state_seq_set_data(blob, 2)
    for seq in (0, 1, 3):
        forks.seq_cp(2, seq)
    for seq in (0, 1, 3):
        forks.decode(model.tokenize(" carpet", add_special=False)[:1], seq_id=seq)
    found = follow(forks, first, 4, seq_id=2)
    assert found[0] == expected[0]
    assert_same_logits(found[1], expected[1])
