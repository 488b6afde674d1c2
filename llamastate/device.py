"""States whose tensors stay in the context (``ON_DEVICE``), as far as llama.cpp can be trusted with them.

Such a blob holds only cells; the tensors lie in a storage that llama.cpp keeps for each sequence. It copies them by the
number of *elements* of each stretch of cells, and it uses the storage again whenever the sum of bytes is the same as
the last time. The first goes wrong for types of blocks (q8_0, ...), of which it copies a fraction and says nothing.
The second aborts the process when there are more stretches than the last time and each has to be padded.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from llamastate._native import state
from llamastate.errors import OnDeviceStateError, UnsupportedLayoutError
from llamastate.flags import SeqFlags
from llamastate.layout.schema import GGML_SCALARS, KVSchema

if TYPE_CHECKING:
    from llamastate.state import StateAPI

__all__ = ["check_generation", "check_take", "note_taken"]

_SEQ_HEADER = 8
#: What buffers are aligned to: ggml's on the CPU, the most that a GPU asks for.
_CPU_ALIGNMENT, _GPU_ALIGNMENT = 32, 256


def check_take(ctx: StateAPI, seq_id: int, flags: int) -> int:
    """Refuse to take a state that llama.cpp would get wrong or die of.

    Parameters
    ----------
    ctx : StateAPI
        Locked by the caller, who has checked the sequence id and the flags.
    seq_id, flags : int

    Returns
    -------
    int
        Bytes of the tensors, for :func:`note_taken`.

    Raises
    ------
    UnsupportedLayoutError
        The cache has a type of blocks.
    OnDeviceStateError
        The storage would be used again, and might be too small.
    """
    handle, schema = ctx._handle, ctx.schema
    caches = [part for part in schema.parts if isinstance(part, KVSchema)]
    types = {entry[0] for part in caches for entry in (*part.k, *part.v)}
    if types - GGML_SCALARS.keys():
        raise UnsupportedLayoutError(
            "llama.cpp keeps only a part of a cache of blocks (q8_0, ...) with ON_DEVICE",
            arch=schema.arch,
            kind=schema.kind,
            reason="on_device of a block type",
        )
    plain = int(flags) & ~int(SeqFlags.ON_DEVICE)
    n_bytes: int = state.seq_get_size(handle, seq_id, plain) - state.seq_get_size(handle, seq_id, flags)
    alignment = _GPU_ALIGNMENT if ctx.model._n_gpu_layers else _CPU_ALIGNMENT
    padded = any(part.v_trans or any(entry[1] % alignment for entry in (*part.k, *part.v)) for part in caches)
    last, epoch = handle.device_storage.get(int(seq_id), (None, 0))
    if padded and last == n_bytes and epoch != handle.epoch:
        raise OnDeviceStateError(
            f"the storage of sequence {seq_id} holds a state of as many bytes in other cells; llama.cpp might abort",
            reason="same size in other cells",
            seq_id=int(seq_id),
        )
    return n_bytes


def note_taken(ctx: StateAPI, seq_id: int, flags: int, n_bytes: int, blob: memoryview) -> None:
    """Remember the state just taken: it is the only good one of this sequence."""
    handle = ctx._handle
    handle.on_device[int(seq_id)] = (int(flags), _digest(blob))
    if n_bytes:  # an empty state leaves the storage as it is
        handle.device_storage[int(seq_id)] = (n_bytes, handle.epoch)


def check_generation(ctx: StateAPI, blob: memoryview, flags: int) -> None:
    """Accept the last state taken, byte for byte, and nothing else.

    A blob whose tensors are elsewhere says nothing about them: that it is the last one taken is all there is.

    Raises
    ------
    OnDeviceStateError
        ``seq_id`` is the sequence that it names; ``None`` if it is too short to name one.
    """
    source = int.from_bytes(blob[4:8], "little", signed=True) if blob.nbytes >= _SEQ_HEADER else None
    known = None if source is None else ctx._handle.on_device.get(source)
    if known is None:
        raise OnDeviceStateError(
            "this context holds no ON_DEVICE state for that blob", reason="never taken", seq_id=source
        )
    if known != (flags, _digest(blob)):
        raise OnDeviceStateError(
            f"the ON_DEVICE state of sequence {source} has been taken again since, or the blob was changed",
            reason="not the last one taken",
            seq_id=source,
        )


def _digest(view: memoryview) -> bytes:
    return hashlib.blake2b(view, digest_size=16).digest()
