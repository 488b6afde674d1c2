"""A program that dies while it saves, or another that loads meanwhile: always the old file or the new one, whole."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest

from tests import children
from tests.helpers import context, tokens

#: Saves by turns the states of two texts of different lengths, and says so, until somebody ends it.
SAVER = """
import itertools, sys
from tests.helpers import context, tokens
path = sys.argv[1]
with context("dense") as ctx:
    blobs = []
    for n in (300, 200):
        ctx.clear()
        ctx.prefill(tokens(n, seed=n))
        blobs.append((ctx.state_get_data(), tokens(n, seed=n)))
    for blob, ids in itertools.cycle(blobs):
        ctx.state_set_data(blob)
        ctx.state_seq_save_file(path, 0, ids)
        print("saved", flush=True)
"""


@pytest.mark.parametrize("run", range(3))
def test_killed_while_saving(run: int, tmp_path: Path):
    """Ten times each, at any moment after the first save: fixed seeds, but where it hits is chance."""
    path = tmp_path / "state"
    chance = random.Random(run)
    with context("dense") as ctx:
        expected = {}
        for n in (200, 300):
            ctx.clear()
            ctx.prefill(tokens(n, seed=n))
            expected[n] = ctx.state_seq_get_data(0)
        for _ in range(10):
            with children.start(SAVER, path) as process:
                assert process.stdout.readline() == "saved\n"
                time.sleep(chance.uniform(0, 0.01))
                process.kill()
            ids, _ = ctx.state_seq_load_file(path, 0)
            assert ids.tolist() == tokens(len(ids), seed=len(ids)).tolist()
            np.testing.assert_array_equal(ctx.state_seq_get_data(0), expected[len(ids)])
        # What was left of unfinished files is hidden and in nobody's way.
        assert all(left.name.startswith(".state.") for left in tmp_path.iterdir() if left != path)


def test_replaced_while_loading(tmp_path: Path):
    """A reader sees one file from its first byte to its last, however often a writer replaces it."""
    path = tmp_path / "state"
    with context("dense") as ctx, children.start(SAVER, path) as process:
        try:
            assert process.stdout.readline() == "saved\n"
            seen = set()
            for _ in range(20000):
                ids, n_bytes = ctx.state_seq_load_file(path, 0)
                assert len(ids) == ctx.seq_pos_max(0) + 1
                seen.add((len(ids), n_bytes))
                if len(seen) == 2:
                    break
            assert {n for n, _ in seen} == {200, 300}
        finally:
            process.kill()
            process.stdout.close()
