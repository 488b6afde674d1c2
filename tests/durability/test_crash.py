"""A program that dies while it saves, or another that loads meanwhile: always the old file or the new one, whole."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from llamastate import Session
from tests import children
from tests.helpers import assert_same_logits, context, tokens

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


STATE_SAVER = """
import itertools
from tests.helpers import context, tokens
ctx = context("dense")
blobs = []
for n in (300, 200):
    ctx.clear()
    ctx.prefill(tokens(n, seed=n))
    blobs.append((ctx.state_get_data(), tokens(n, seed=n)))

def work(path, ready):
    for i, (blob, ids) in enumerate(itertools.cycle(blobs)):
        ctx.state_set_data(blob)
        ctx.state_seq_save_file(path, 0, ids)
        if not i:
            ready()
"""


def test_killed_while_saving(tmp_path: Path):
    """A hundred times, at any moment after the first save."""
    path = tmp_path / "state"
    chance = random.Random(0)
    with context("dense") as ctx, children.Victims(STATE_SAVER) as victims:
        expected = {}
        for n in (200, 300):
            ctx.clear()
            ctx.prefill(tokens(n, seed=n))
            expected[n] = ctx.state_seq_get_data(0)
        for _ in range(100):
            victims.kill(path, chance.uniform(0, 0.01))
            ids, _ = ctx.state_seq_load_file(path, 0)
            assert ids.tolist() == tokens(len(ids), seed=len(ids)).tolist()
            np.testing.assert_array_equal(ctx.state_seq_get_data(0), expected[len(ids)])
    # What was left of unfinished files is hidden and in nobody's way.
    assert all(left.name.startswith(".state.") for left in tmp_path.iterdir() if left != path)


#: The same with sessions and their checkpoints.
SESSION_SAVER = """
import itertools
from llamastate import Session
from tests.helpers import context, tokens
ctx = context("jamba", n_ctx=1024, n_seq_max=2)
sessions = [Session(ctx, i, checkpoint_every=64) for i in range(2)]
for session, n in zip(sessions, (300, 200)):
    session.feed(tokens(n, seed=n))
    session.checkpoint("here")

def work(path, ready):
    sessions[0].save(path)
    ready()
    for session in itertools.cycle(sessions):
        session.save(path)
"""


def test_killed_while_saving_a_session(tmp_path: Path):
    """Two hundred times: the session of before or the next, with its checkpoints; and its logits, so it goes on."""
    path = tmp_path / "chat.llsnap"
    chance = random.Random(5)
    seen = set()
    with context("jamba", n_ctx=1024) as ctx, children.Victims(SESSION_SAVER) as victims:
        expected = {}
        for n in (200, 300):
            ctx.clear()
            ctx.prefill(tokens(n, seed=n), chunk=64)
            expected[n] = ctx.logits()
        for _ in range(200):
            victims.kill(path, chance.uniform(0, 0.01))
            session = Session.load(ctx, path)
            assert session.tokens.tolist() == tokens(session.n_past, seed=session.n_past).tolist()
            assert [p.label for p in session.checkpoints] == ["here"]
            assert_same_logits(session.logits, expected[session.n_past])
            seen.add(session.n_past)
    assert seen == {200, 300}
    left = [name for name in tmp_path.iterdir() if name != path]
    assert left, "or nothing was killed in the middle"
    assert all(name.name.startswith(".chat.llsnap.") for name in left)


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
