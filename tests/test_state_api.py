"""The state functions as functions: buffers of every type, sizes, return values, and what becomes of logits."""

from __future__ import annotations

import array
import ctypes
import io
import mmap
from collections.abc import Callable, Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from llamastate import Context, SeqFlags
from tests.helpers import KINDS, context, tokens

GUARD = 0xA5


class Access(NamedTuple):
    """One of the two functions of each direction, for the whole context and for a sequence."""

    size: Callable[[Context], int]
    into: Callable[[Context, Any], int]
    get: Callable[[Context], np.ndarray[Any, np.dtype[np.uint8]]]
    set: Callable[[Context, Any], int]


WHOLE = Access(Context.state_get_size, Context.state_get_data_into, Context.state_get_data, Context.state_set_data)
SEQUENCE = Access(
    lambda ctx: ctx.state_seq_get_size(1),
    lambda ctx, out: ctx.state_seq_get_data_into(out, 1),
    lambda ctx: ctx.state_seq_get_data(1),
    lambda ctx, src: ctx.state_seq_set_data(src, 1),
)
PARTIAL = Access(
    lambda ctx: ctx.state_seq_get_size(1, SeqFlags.PARTIAL_ONLY),
    lambda ctx, out: ctx.state_seq_get_data_into(out, 1, SeqFlags.PARTIAL_ONLY),
    lambda ctx: ctx.state_seq_get_data(1, SeqFlags.PARTIAL_ONLY),
    lambda ctx, src: ctx.state_seq_set_data(src, 1, SeqFlags.PARTIAL_ONLY),
)
every_access = pytest.mark.parametrize("access", [WHOLE, SEQUENCE, PARTIAL], ids=["whole", "sequence", "partial"])


@pytest.fixture
def ctx() -> Iterator[Context]:
    """Two sequences of a window model, whose partial state is smaller than the whole one."""
    with context("iswa", n_seq_max=2) as ctx:
        ctx.decode(tokens(50, seed=1), seq_id=0)
        ctx.decode(tokens(70, seed=2), seq_id=1)
        yield ctx


# --- buffers to write to ----------------------------------------------------------------------------------------------


def _array(code: str) -> Callable[[int], Any]:
    return lambda n: array.array(
        code, bytes([GUARD]) * (-(-n // array.array(code).itemsize) * array.array(code).itemsize)
    )


def _numpy(dtype: str, columns: int = 1) -> Callable[[int], Any]:
    def make(n: int) -> Any:
        rows = -(-n // (np.dtype(dtype).itemsize * columns))
        flat = np.full(rows * columns * np.dtype(dtype).itemsize, GUARD, np.uint8).view(dtype)
        return flat.reshape(rows, columns) if columns > 1 else flat

    return make


def _mmap(n: int) -> Any:
    mapped = mmap.mmap(-1, n)
    mapped.write(bytes([GUARD]) * n)
    return mapped


WRITABLE: dict[str, Callable[[int], Any]] = {
    "bytearray": lambda n: bytearray([GUARD]) * n,
    "memoryview": lambda n: memoryview(bytearray([GUARD]) * n),
    "memoryview of words": lambda n: memoryview(bytearray([GUARD]) * (-(-n // 8) * 8)).cast("q"),
    "bytesio": lambda n: io.BytesIO(bytes([GUARD]) * n).getbuffer(),
    "ctypes": lambda n: (ctypes.c_ubyte * n)(*[GUARD] * n),
    "mmap": _mmap,
    **{f"array {code}": _array(code) for code in "bBiqfd"},
    **{f"numpy {dtype}": _numpy(dtype) for dtype in ("u1", "i1", "<i4", "<f2", "<f8", "<c16", "?", "S3")},
    "numpy of two dimensions": _numpy("u1", 7),
    "numpy of two dimensions of words": _numpy("<u4", 5),
}


def flat(buffer: Any) -> bytes:
    return bytes(memoryview(buffer).cast("B"))


@every_access
@pytest.mark.parametrize("kind", WRITABLE)
def test_into_writes_exactly_the_state(ctx: Context, access: Access, kind: str):
    """Into a buffer that is longer: the bytes behind the state are left alone."""
    n = access.size(ctx)
    expected = access.get(ctx).tobytes()
    out = WRITABLE[kind](n + 64)
    assert access.into(ctx, out) == n == len(expected)
    written = flat(out)
    assert written[:n] == expected
    assert set(written[n:]) == {GUARD}
    assert len(written) >= n + 64


@every_access
@pytest.mark.parametrize("offset", [0, 1, 3, 8])
def test_into_a_part_of_a_buffer(ctx: Context, access: Access, offset: int):
    """Exactly as long as the state, anywhere in memory: not one byte before it nor after."""
    n = access.size(ctx)
    out = bytearray([GUARD]) * (offset + n + 5)
    assert access.into(ctx, memoryview(out)[offset : offset + n]) == n
    assert set(out[:offset]) <= {GUARD}
    assert out[offset : offset + n] == access.get(ctx).tobytes()
    assert set(out[offset + n :]) == {GUARD}


@every_access
def test_into_shared_memory(ctx: Context, access: Access):
    n = access.size(ctx)
    shared = SharedMemory(create=True, size=n)
    try:
        assert access.into(ctx, shared.buf) == n
        assert shared.buf[:n] == access.get(ctx).tobytes()
        with shared.buf[:n] as blob:
            assert access.set(ctx, blob) == n
    finally:
        shared.close()  # raises if anything still held the memory
        shared.unlink()


# --- buffers to read from ---------------------------------------------------------------------------------------------


def _read_only_numpy(blob: bytes) -> Any:
    out = np.frombuffer(blob, np.uint8)
    assert not out.flags.writeable
    return out


READABLE: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "bytearray": bytearray,
    "memoryview": memoryview,
    "part of a memoryview": lambda blob: memoryview(b"abc" + blob + b"d")[3:-1],
    "read-only view of a bytearray": lambda blob: memoryview(bytearray(blob)).toreadonly(),
    "ctypes": lambda blob: (ctypes.c_ubyte * len(blob)).from_buffer_copy(blob),
    "array": lambda blob: array.array("B", blob),
    "numpy": lambda blob: np.frombuffer(bytearray(blob), np.uint8),
    "read-only numpy": _read_only_numpy,
    "numpy of pairs": lambda blob: np.frombuffer(blob, "<u2"),
    "numpy of two dimensions": lambda blob: np.frombuffer(blob, np.uint8).reshape(2, -1),
}


@every_access
@pytest.mark.parametrize("kind", READABLE)
def test_set_reads_any_buffer(ctx: Context, access: Access, kind: str):
    blob = access.get(ctx).tobytes()
    assert len(blob) % 2 == 0
    source = READABLE[kind](blob)
    ctx.decode(tokens(9, seed=5), seq_id=1)
    assert access.get(ctx).tobytes() != blob
    assert access.set(ctx, source) == len(blob)
    assert ctx.seq_pos_max(1) == 69
    assert flat(source) == blob  # reading changes nothing
    assert access.size(ctx) == len(blob)


def test_set_reads_a_file_mapped_for_reading(ctx: Context, tmp_path: Path):
    blob = ctx.state_seq_get_data(1)
    (tmp_path / "blob").write_bytes(blob.tobytes())
    ctx.decode([3], seq_id=1)
    with (tmp_path / "blob").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert ctx.state_seq_set_data(mapped, 1) == blob.nbytes
    np.testing.assert_array_equal(ctx.state_seq_get_data(1), blob)


@pytest.mark.parametrize("name", KINDS)
def test_sizes_are_those_of_the_data(name: str):
    """Of empty and filled sequences, with every flag, and they grow with the text where memory does."""
    with context(name, n_seq_max=2) as ctx:
        for n in (0, 1, 40):
            if n:
                ctx.decode(tokens(n), seq_id=1)
            for flags in (SeqFlags.NONE, SeqFlags.PARTIAL_ONLY, SeqFlags.ON_DEVICE):
                for seq in (0, 1):
                    assert ctx.state_seq_get_size(seq, flags) == ctx.state_seq_get_data(seq, flags).nbytes
            assert ctx.state_get_size() == ctx.state_get_data().nbytes
        grown = ctx.state_seq_get_size(1) > ctx.state_seq_get_size(0) + 40 * 4
        assert grown
        assert ctx.state_seq_get_data(0).dtype == ctx.state_get_data().dtype == np.uint8


def test_flags_are_also_plain_integers(ctx: Context):
    assert ctx.state_seq_get_size(1, 1) == ctx.state_seq_get_size(1, SeqFlags.PARTIAL_ONLY)
    assert SeqFlags.SWA_ONLY == SeqFlags.PARTIAL_ONLY
    assert ctx.state_seq_get_size(np.int64(1)) == ctx.state_seq_get_size(1)
