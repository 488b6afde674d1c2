"""States that go to another process: in shared memory, without a copy, and in files."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.exactness.matrix import STEPS, Settings, assert_continues, name
from tests.helpers import KINDS, follow, tokens

#: The settings in which a state looks different, over all kinds; the matrix itself is in test_state.
POINTS = [
    Settings(kind, flash, unified, n_seq_max)
    for kind, flash, unified, n_seq_max in zip(
        KINDS, ("on", "off") * 5, (True, True, False, False) * 3, (1, 4, 4, 1, 4) * 2, strict=False
    )
]
every_point = pytest.mark.parametrize("point", POINTS, ids=name)


@pytest.fixture(scope="module")
def other_process() -> Iterator[ProcessPoolExecutor]:
    """A process that was not forked: it has nothing of ours."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def restore_and_go_on(
    point: Settings, memory: str, n_bytes: int, whole: bool, first: int
) -> tuple[list[int], npt.NDArray[Any]]:
    """What the other process does. Sizes in shared memory are rounded up to pages, so the length is told."""
    shared = SharedMemory(memory)
    try:
        with shared.buf[:n_bytes] as blob, point.context() as ctx:
            if whole:
                assert ctx.state_set_data(blob) == n_bytes
            else:
                assert ctx.state_seq_set_data(blob, point.seq_id) == n_bytes
            return follow(ctx, first, STEPS, seq_id=point.seq_id)
    finally:
        shared.close()


def load_and_go_on(point: Settings, path: str, first: int) -> tuple[list[int], list[int], npt.NDArray[Any]]:
    with point.context() as ctx:
        ids, _ = ctx.state_seq_load_file(path, point.seq_id)
        return ids.tolist(), *follow(ctx, first, STEPS, seq_id=point.seq_id)


@pytest.mark.parametrize("whole", [False, True], ids=["sequence", "context"])
@every_point
def test_shared_memory(point: Settings, whole: bool, other_process: ProcessPoolExecutor):
    ctx, first = point.filled()
    size = ctx.state_get_size() if whole else ctx.state_seq_get_size(point.seq_id)
    shared = SharedMemory(create=True, size=size)
    try:
        with shared.buf[:size] as out:
            if whole:
                assert ctx.state_get_data_into(out) == size
            else:
                assert ctx.state_seq_get_data_into(out, point.seq_id) == size
        found = other_process.submit(restore_and_go_on, point, shared.name, size, whole, first).result()
    finally:
        shared.close()
        shared.unlink()
    assert_continues(point, found, follow(ctx, first, STEPS, seq_id=point.seq_id))


@every_point
def test_file(point: Settings, tmp_path: Path, other_process: ProcessPoolExecutor):
    ctx, first = point.filled()
    ids = tokens(90, seed=9)
    ctx.state_seq_save_file(tmp_path / "state", point.seq_id, ids)
    loaded, *found = other_process.submit(load_and_go_on, point, str(tmp_path / "state"), first).result()
    assert loaded == ids.tolist()
    chosen, rows = found
    assert_continues(point, (chosen, np.asarray(rows)), follow(ctx, first, STEPS, seq_id=point.seq_id))
