"""Nothing is copied that need not be: addresses tell."""

from __future__ import annotations

import mmap
import pickle
import threading
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
import pytest

from llamastate import Context, InvalidBufferError, Snapshot
from tests.helpers import tokens

IDS = tokens(90, seed=9)


def address(buffer: object) -> int:
    return np.frombuffer(buffer, np.uint8).ctypes.data


def assert_inside(snapshot: Snapshot, start: int) -> None:
    """Everything that the snapshot gives out lies where its image does."""
    arrays = [snapshot.tokens, snapshot.state, snapshot.logits, snapshot.checkpoints[0].state]
    for array in arrays:
        assert start <= array.ctypes.data
        assert array.ctypes.data + array.nbytes <= start + snapshot.nbytes
        assert (array.ctypes.data - start) % 64 == 0
    assert address(memoryview(snapshot)) == start


@pytest.fixture
def snapshot(filled: Context) -> Snapshot:
    from llamastate import CheckpointRecord

    record = CheckpointRecord(3, state=np.arange(500, dtype=np.uint8))
    return Snapshot.take(filled, 0, IDS, logits="last", checkpoints=[record])


def test_taken(snapshot: Snapshot):
    assert_inside(snapshot, snapshot._image().address)


def test_from_buffer(snapshot: Snapshot):
    for data in (bytes(memoryview(snapshot)), bytearray(memoryview(snapshot)), np.array(memoryview(snapshot))):
        assert_inside(Snapshot.from_buffer(data), address(data))


def test_from_shared_memory(snapshot: Snapshot, filled: Context):
    shared = SharedMemory(create=True, size=snapshot.nbytes + 5000)
    try:
        shared.buf[: snapshot.nbytes] = memoryview(snapshot)
        found = Snapshot.from_buffer(shared.buf)
        assert found.restore(filled, 1) == 90
        assert found.nbytes == snapshot.nbytes
        with pytest.raises(BufferError):
            shared.close()  # held
        found.close()
    finally:
        shared.close()
        shared.unlink()


def test_opened(snapshot: Snapshot, tmp_path: Path):
    snapshot.save(tmp_path / "s")
    opened = Snapshot.open(tmp_path / "s")
    assert isinstance(opened._image().source, mmap.mmap)
    assert_inside(opened, address(opened._image().source))


def test_pickled_out_of_band(snapshot: Snapshot):
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(snapshot, protocol=5, buffer_callback=buffers.append)
    assert len(head) < 200
    assert len(buffers) == 1
    assert address(buffers[0]) == snapshot._image().address
    found = pickle.loads(head, buffers=buffers)
    assert_inside(found, snapshot._image().address)


@pytest.mark.parametrize("protocol", range(6))
def test_pickled_in_band(snapshot: Snapshot, filled: Context, protocol: int):
    found = pickle.loads(pickle.dumps(snapshot, protocol=protocol))
    assert bytes(memoryview(found)) == bytes(memoryview(snapshot))
    assert found.restore(filled, 1) == 90


def test_views_are_read_only(snapshot: Snapshot):
    view = memoryview(snapshot)
    assert view.readonly
    assert (view.ndim, view.format, view.nbytes) == (1, "B", snapshot.nbytes)
    with pytest.raises(TypeError):
        view[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        snapshot.tokens.flags.writeable = True


def test_no_buffers():
    for data in ("text", 5, None, np.zeros((4, 4), np.uint8)[:, ::2]):
        with pytest.raises(InvalidBufferError):
            Snapshot.from_buffer(data)


def test_sealed_once_by_many_threads(filled: Context):
    snapshot = Snapshot.take(filled, 0, IDS)
    images: list[bytes] = []
    threads = [threading.Thread(target=lambda: images.append(bytes(memoryview(snapshot)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(images)) == 1
    assert Snapshot.from_buffer(images[0]).restore(filled, 1) == 90
