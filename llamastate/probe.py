"""How the schema of a context's state is learnt.

llama.cpp tells nobody which layers have a cache, of which types and row sizes: that takes the model's
hyperparameters and an ``if`` per architecture. But it writes all of it in front of the rows of any state. So a scratch
context of the same model and the same cache types, as small as llama.cpp makes them, takes one token, and its state
is the template that every blob is compared with. Nothing of that token is computed but the first node of its graph:
what is in the rows does not matter. So it costs a few milliseconds, however large the model, once for a model and its
cache settings; the user's own context is not touched.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llamastate._native import decode, handles, memory, state, vocab
from llamastate.errors import ContextCreateError, UnsupportedLayoutError
from llamastate.layout import KVSchema, Limits, RecurrentSchema, Schema, infer_schema
from llamastate.params import ROPE_FLOATS

if TYPE_CHECKING:
    from llamastate._native.handles import ContextHandle, ModelHandle
    from llamastate.model import Model

__all__ = [
    "available_memory",
    "check_memory",
    "context_limits",
    "context_schema",
    "layers_on_gpu",
    "shift_problem",
]

#: Context parameters that decide what a blob looks like, apart from the number of streams.
DECISIVE = ("type_k", "type_v", "flash_attn_type", "offload_kqv", "op_offload", "embeddings", "pooling_type")
#: And those that decide how its keys are turned.
ROPE = ("rope_scaling_type", "yarn_orig_ctx", *sorted(ROPE_FLOATS))

#: Architectures whose window does not slide but begins anew every n_swa tokens (LLAMA_SWA_TYPE_CHUNKED).
CHUNKED = frozenset({"llama4"})

#: ``ggml_type`` of keys that llama.cpp turns without harm: f32 and f16. bf16 ends the process, and so do types of
#: blocks where heads are not a multiple of 64 channels; where they are, every sequence's keys are rounded anew.
_TURNED = frozenset({0, 1})


def context_schema(model: Model, handle: ContextHandle, params: dict[str, Any]) -> Schema:
    """Learn what the blobs of a context look like.

    Parameters
    ----------
    model : Model
    handle : ContextHandle
        The context; only its number of streams is read.
    params : dict
        What it was made with.

    Raises
    ------
    UnsupportedLayoutError
        A kind of memory whose state format is not known here.
    ContextCreateError
        No room for the scratch context.
    """
    weights = handles.handle_model(handle)  # the context's claim on them: the model may have been closed
    schema = _schema_of(model, weights, params)
    n_stream = 1 if params.get("kv_unified", False) else handle.n_seq_max
    parts = tuple(replace(p, n_stream=n_stream) if isinstance(p, KVSchema) else p for p in schema.parts)
    return replace(schema, parts=parts)


def shift_problem(model: Model, handle: ContextHandle, schema: Schema, params: dict[str, Any]) -> str | None:
    """Why llama.cpp cannot turn the keys of one sequence and leave all others as they are; ``None`` if it can.

    It turns every key of the cache, those that were not moved by an angle of nothing. That is exact unless the scale
    that YaRN puts on the keys is put on once more. Whether it is, is tried: in a scratch context, once for a model and
    its rope parameters.

    Parameters
    ----------
    model : Model
    handle : ContextHandle
    schema : Schema
        That of the context.
    params : dict
        What it was made with.
    """
    if handle.recurrent:
        return None
    types = {entry[0] for part in schema.parts if isinstance(part, KVSchema) for entry in part.k}
    if types - _TURNED:
        return "the keys are neither f16 nor f32"
    decisive = {name: params[name] for name in (*DECISIVE, *ROPE) if name in params}
    key = tuple(sorted(decisive.items()))
    if key not in model._turns_exactly:
        model._turns_exactly[key] = _turns_exactly(handles.handle_model(handle), decisive)
    return None if model._turns_exactly[key] else "its rope scaling (YaRN) would be applied to every key once more"


def _turns_exactly(weights: ModelHandle, decisive: dict[str, Any]) -> bool:
    small = dict(decisive, n_ctx=2, n_batch=2, n_ubatch=2, n_seq_max=2, n_threads=1, n_threads_batch=1, kv_unified=True)
    # one cache of all cells: what is asked is not asked of windows alone
    handle = handles.create_context(weights, dict(small, swa_full=True), raise_if_busy=False)
    zeros, ones = np.zeros(2, np.int32), np.ones(2, np.int32)
    try:
        decode.decode(handle, zeros, zeros, ones, np.arange(2, dtype=np.int32), np.zeros(2, np.int8))
        before = np.empty(state.seq_get_size(handle, 0, 0), np.uint8)
        state.seq_get_data_into(handle, before, 0, 0)
        memory.seq_add(handle, 1, 0, -1, 1)
        decode.decode(handle, zeros[:1], ones[:1] * 2, ones[:1], ones[:1], np.zeros(1, np.int8))
        after = np.empty_like(before)
        state.seq_get_data_into(handle, after, 0, 0)
    finally:
        handle.close()
    return bool((before == after).all())


def check_memory(model: Model, params: dict[str, Any]) -> None:
    """Refuse a cache that is larger than the memory there is.

    The system grants memory before it has it, and llama.cpp fills the cache with zeros at once: instead of an error
    there would be a killed process. What lies on a GPU is left to llama.cpp, for a GPU refuses what it has not.

    Raises
    ------
    ContextCreateError
    """
    n_cells = params["n_ctx"] or model.n_ctx_train
    available = available_memory()
    # 16 bytes for each layer, cell and channel: more than any usual cache takes, so that this asks no questions mostly
    if available is None or n_cells * model.n_layer * model.n_embd * 16 < available:
        return
    on_gpu = layers_on_gpu(model, params)
    if on_gpu >= model.n_layer:
        return
    try:
        parts = _schema_of(model, model._handle, params).parts
    except UnsupportedLayoutError:
        return
    needed = 0
    for part in parts:
        cells = params["n_seq_max"]
        if isinstance(part, KVSchema):
            full = part.role == "base" or params["swa_full"]
            cells = n_cells if full else min(n_cells, model.n_swa * params["n_seq_max"])
        needed += cells * _bytes_on_host(part, on_gpu)
    if needed > available:
        raise ContextCreateError(
            f"the cache would take {needed} bytes, and {available} are available", params=params, reason="memory"
        )


def layers_on_gpu(model: Model, params: dict[str, Any]) -> int:
    """How many layers have their cache on a GPU, at most: llama.cpp puts the last ones there, and the output first."""
    if not params["offload_kqv"] or not model._n_gpu_layers or not handles.gpu_alignments():
        return 0
    return model.n_layer if model._n_gpu_layers < 0 else model._n_gpu_layers - 1


def _bytes_on_host(part: KVSchema | RecurrentSchema, on_gpu: int) -> int:
    """Bytes of a cell that lie in the host's memory at least: which of a part's layers are where is not known here."""
    if not on_gpu:
        return part.bytes_per_cell
    layers: dict[int, int] = {}
    for tensor in part.tensors:
        layers[tensor.layer] = layers.get(tensor.layer, 0) + tensor.cell_bytes
    sizes = sorted(layers.values(), reverse=True)
    return sum(sizes[on_gpu:])


def available_memory() -> int | None:
    """Bytes that this process can still get without swapping or being killed, as far as the system tells."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        free = (int(lines["MemAvailable"].split()[0]) + int(lines["SwapFree"].split()[0])) << 10
    except (OSError, ValueError, KeyError):
        return None
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit:
            most = limit.read().strip()
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as current:
            used = int(current.read())
    except (OSError, ValueError):
        return free
    return min(free, int(most) - used) if most.isdigit() else free


def _schema_of(model: Model, weights: ModelHandle, params: dict[str, Any]) -> Schema:
    decisive = {name: params[name] for name in DECISIVE if name in params}
    key = tuple(sorted(decisive.items()))
    schema = model._schemas.get(key)
    if schema is None:
        schema = model._schemas[key] = _probe(model, weights, decisive)
    return schema


def _probe(model: Model, weights: ModelHandle, decisive: dict[str, Any]) -> Schema:
    small = dict(decisive, n_ctx=1, n_batch=1, n_ubatch=1, n_seq_max=1, n_threads=1, n_threads_batch=1, kv_unified=True)
    handle = handles.create_context(weights, small, raise_if_busy=False, compute=False)
    try:
        if handle.has_memory:
            zero, one = np.zeros(1, np.int32), np.ones(1, np.int32)
            decode.decode(handle, zero, zero, one, zero, np.zeros(1, np.int8))
        blob = np.empty(state.seq_get_size(handle, 0, 0), np.uint8)
        state.seq_get_data_into(handle, blob, 0, 0)
    finally:
        handle.close()
    arch = vocab.meta(weights).get("general.architecture", "")
    swa_type = "none" if not model.n_swa else "chunked" if arch in CHUNKED else "standard"
    return infer_schema(
        blob.tobytes(),
        arch=arch,
        recurrent=model.is_recurrent,
        hybrid=model.is_hybrid,
        n_swa=model.n_swa,
        swa_type=swa_type,
        m_rope=model.uses_m_rope,
    )


def context_limits(handle: ContextHandle, n_swa: int, swa_full: bool, unified: bool) -> Limits:
    """How much a context can hold.

    Notes
    -----
    The size of the window cache is llama.cpp's (``llama_kv_cache_iswa``): the window of every sequence that shares it
    and one physical batch, in steps of 256 cells, but never more than the base cache rounded up so.
    """
    base = handle.n_ctx_seq
    window = base
    if n_swa and not swa_full:
        wanted = min(base, n_swa * (handle.n_seq_max if unified else 1) + handle.n_ubatch)
        window = -(-wanted // 256) * 256
    return Limits(n_seq_max=handle.n_seq_max, base_cells=base, window_cells=window, n_vocab=handle.n_vocab)
