"""A restored snapshot goes on as what it was taken from: over all kinds of memory, here and in another process."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llamastate import Snapshot
from tests.exactness.matrix import CHUNK, MATRIX, PROMPT, STEPS, USUAL, Settings, assert_continues, name
from tests.helpers import follow, tokens

#: Every kind with flash attention on and off, unified and not, in one sequence and several.
POINTS = [p for p in MATRIX if p.cache_type == "f16"]
IDS = tokens(PROMPT, seed=9)


@pytest.fixture(scope="module")
def other_process() -> Iterator[ProcessPoolExecutor]:
    """A process that was not forked: it has nothing of ours."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("point", POINTS, ids=name)
def test_into_a_fresh_context(point: Settings):
    ctx, first = point.filled()
    snapshot = Snapshot.take(ctx, point.seq_id, IDS)
    found = point.context()
    assert snapshot.restore(found, point.seq_id) == PROMPT
    assert_continues(
        point, follow(found, first, STEPS, seq_id=point.seq_id), follow(ctx, first, STEPS, seq_id=point.seq_id)
    )


@pytest.mark.parametrize("point", USUAL, ids=name)
def test_over_what_another_sequence_holds(point: Settings):
    """In a pool that sequences share; the others go on undisturbed."""
    ctx, first = point.filled()
    snapshot = Snapshot.take(ctx, point.seq_id, IDS)
    bystander = ctx.state_seq_get_data(1)
    assert snapshot.restore(ctx, 0) == PROMPT
    if point.seq_id != 1:
        assert (ctx.state_seq_get_data(1) == bystander).all()
    chosen, rows = follow(ctx, first, STEPS, seq_id=0)
    expected = follow(ctx, first, STEPS, seq_id=point.seq_id)
    assert chosen == expected[0]
    assert np.abs(rows - expected[1]).max() < 0.02  # the order of cells makes noise


def go_on(point: Settings, head: bytes, memory: str, n_bytes: int, first: int) -> tuple[list[int], npt.NDArray[Any]]:
    """What the other process does: the pickle comes through the pipe, the bytes through shared memory."""
    shared = SharedMemory(memory)
    try:
        with shared.buf[:n_bytes] as image:
            snapshot = pickle.loads(head, buffers=[image])
            with point.context() as ctx:
                assert snapshot.restore(ctx, point.seq_id) == PROMPT
                found = follow(ctx, first, STEPS, seq_id=point.seq_id)
            assert snapshot.tokens.tolist() == IDS.tolist()
            snapshot.close()
        return found
    finally:
        shared.close()


@pytest.mark.parametrize("point", USUAL, ids=name)
def test_in_another_process(point: Settings, other_process: ProcessPoolExecutor):
    ctx, first = point.filled()
    shared = SharedMemory(create=True, size=1 << 20)
    try:
        # Taken right into the shared memory: the state has moved once when the other process has it.
        snapshot = Snapshot.take(ctx, point.seq_id, IDS, out=shared.buf)
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(snapshot, protocol=5, buffer_callback=buffers.append)
        assert len(head) < 200
        found = other_process.submit(go_on, point, head, shared.name, snapshot.nbytes, first).result()
        for buffer in buffers:
            buffer.release()
        snapshot.close()
    finally:
        shared.close()
        shared.unlink()
    assert_continues(point, found, follow(ctx, first, STEPS, seq_id=point.seq_id))


@pytest.mark.parametrize("point", USUAL, ids=name)
def test_logits_come_along(point: Settings, tmp_path):
    """The next token can be chosen before anything has been decoded."""
    ctx = point.context()
    ctx.prefill(IDS, seq_id=point.seq_id, chunk=CHUNK)
    expected = ctx.logits()
    Snapshot.take(ctx, point.seq_id, IDS, logits="last").save(tmp_path / "s")
    np.testing.assert_array_equal(Snapshot.open(tmp_path / "s").logits, expected)


@pytest.mark.parametrize("kind", ["iswa", "iswa11", "lfm2swa"])
def test_between_a_full_and_a_windowed_cache(kind: str):
    """How many cells a context keeps beyond the window is no part of a sequence's state."""
    point = Settings(kind)
    for source, target in ((True, False), (False, True)):
        ctx, first = point.filled(swa_full=source)
        found = point.context(swa_full=target)
        Snapshot.take(ctx, 0, IDS).restore(found, 0)
        assert_continues(point, follow(found, first, STEPS), follow(ctx, first, STEPS))


@pytest.mark.parametrize("point", USUAL, ids=name)
def test_an_empty_sequence(point: Settings):
    ctx, _ = point.filled()
    empty = point.context()
    snapshot = Snapshot.take(empty, 0, [])
    assert snapshot.n_tokens == 0
    assert snapshot.restore(ctx, point.seq_id) == 0
    assert ctx.seq_pos_max(point.seq_id) == -1
