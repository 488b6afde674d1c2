"""States whose tensors stay in the context (``ON_DEVICE``), as far as llama.cpp can be trusted with them.

Such a blob holds only cells; the tensors lie in a storage that llama.cpp keeps for each sequence. It copies them by the
number of *elements* of each stretch of cells, and it uses the storage again whenever the sum of bytes is the same as
the last time. The first goes wrong for types of blocks (q8_0, ...), of which it copies a fraction and says nothing.
The second aborts the process when there are more stretches than the last time and each has to be padded.

There is a storage, and a sum, for each device on which layers lie. llama.cpp tells nobody which layer is where: if
there are several devices, any share of each cache's bytes may be in one storage.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from llamastate._native import handles, state
from llamastate.errors import OnDeviceStateError, UnsupportedLayoutError
from llamastate.flags import SeqFlags
from llamastate.layout.schema import GGML_SCALARS, KVSchema

if TYPE_CHECKING:
    from llamastate.state import StateAPI

__all__ = ["check_generation", "check_take", "note_taken"]

_SEQ_HEADER = 8
#: What ggml's buffers in host memory are aligned to.
_CPU_ALIGNMENT = 32
#: Layers that a model may have beyond those it counts (they predict further tokens): no model has as many.
_UNCOUNTED = 8


def check_take(ctx: StateAPI, seq_id: int, flags: int) -> tuple[int, ...]:
    """Refuse to take a state that llama.cpp would get wrong or die of.

    Parameters
    ----------
    ctx : StateAPI
        Locked by the caller, who has checked the sequence id and the flags.
    seq_id, flags : int

    Returns
    -------
    tuple of int
        Bytes of the tensors, for :func:`note_taken`: of the base cache, and of the rest where there is one. 0 for what
        the state leaves out.

    Raises
    ------
    UnsupportedLayoutError
        The cache has a type of blocks.
    OnDeviceStateError
        The storage would be used again, and might be too small.
    """
    schema = ctx.schema
    caches = [part for part in schema.parts if isinstance(part, KVSchema)]
    types = {entry[0] for part in caches for entry in (*part.k, *part.v)}
    if types - GGML_SCALARS.keys():
        raise UnsupportedLayoutError(
            "llama.cpp keeps only a part of a cache of blocks (q8_0, ...) with ON_DEVICE",
            arch=schema.arch,
            kind=schema.kind,
            reason="on_device of a block type",
        )
    taken = _tensor_bytes(ctx, seq_id, flags)
    together, alignment = _placement(ctx)
    padded = any(part.v_trans or any(entry[1] % alignment for entry in (*part.k, *part.v)) for part in caches)
    if padded and _may_fill_again(ctx, int(seq_id), taken, together):
        raise OnDeviceStateError(
            f"the storage of sequence {seq_id} holds a state of as many bytes in other cells; llama.cpp might abort",
            reason="same size in other cells",
            seq_id=int(seq_id),
        )
    return taken


def _placement(ctx: StateAPI) -> tuple[bool, int]:
    """Whether all layers' caches lie in one memory for certain, and what their buffers are aligned to at most."""
    gpus, n_layers = handles.gpu_alignments(), ctx.model._n_gpu_layers
    if not gpus or not n_layers or not ctx._params.get("offload_kqv", True):
        return True, _CPU_ALIGNMENT
    every_layer = n_layers < 0 or n_layers > ctx.model.n_layer + _UNCOUNTED
    return every_layer and len(gpus) == 1, max(_CPU_ALIGNMENT, *gpus)


def _tensor_bytes(ctx: StateAPI, seq_id: int, flags: int) -> tuple[int, ...]:
    def of(flags: int) -> int:
        plain = flags & ~int(SeqFlags.ON_DEVICE)
        return int(state.seq_get_size(ctx._handle, seq_id, plain) - state.seq_get_size(ctx._handle, seq_id, flags))

    if not ctx.schema.has_partial:
        return (of(int(flags)),)
    rest = of(int(flags) | int(SeqFlags.PARTIAL_ONLY))
    return of(int(flags)) - rest, rest


def _may_fill_again(ctx: StateAPI, seq_id: int, taken: tuple[int, ...], together: bool) -> bool:
    """Whether the sum of bytes in some storage could be that of the last time, and the cells others."""
    now, known = ctx._handle.epoch, ctx._handle.device_storage.get(seq_id)
    if known is None:
        return False
    last, then, each = known
    if together:
        return bool(sum(taken) == sum(last) and then != now)
    # A storage of layers of one cache. One of recurrent layers alone is always large enough: there is one stretch.
    told = taken[:1] if ctx.schema.kind == "hybrid" else taken
    if any(n and n == before and at != now for n, (before, at) in zip(told, each, strict=False)):
        return True
    # A storage of layers of both: the sum may be the same if one has grown and the other shrunk.
    return len(taken) == 2 and (taken[0] - last[0]) * (taken[1] - last[1]) < 0


def note_taken(ctx: StateAPI, seq_id: int, flags: int, taken: tuple[int, ...], blob: memoryview) -> None:
    """Remember the state just taken: it is the only good one of this sequence."""
    handle = ctx._handle
    handle.on_device[int(seq_id)] = (int(flags), _digest(blob))
    if not any(taken):  # an empty state leaves the storage as it is
        return
    known = handle.device_storage.get(int(seq_id))
    before = known[2] if known else ((0, 0),) * len(taken)
    # what the state leaves out is in the storage as before
    each = tuple((n, handle.epoch) if n else old for n, old in zip(taken, before, strict=True))
    handle.device_storage[int(seq_id)] = (taken, handle.epoch, each)


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
