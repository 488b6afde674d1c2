"""How the schema of a context's state is learnt.

llama.cpp tells nobody which layers have a cache, of which types and row sizes: that takes the model's
hyperparameters and an ``if`` per architecture. But it writes all of it in front of the rows of any state. So a scratch
context of the same model and the same cache types, as small as llama.cpp makes them, decodes one token, and its
state is the template that every blob is compared with. It costs a few milliseconds, once for a model and
its cache settings; the user's own context is not touched.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llamastate._native import decode, handles, state
from llamastate.layout import KVSchema, Limits, Schema, infer_schema

if TYPE_CHECKING:
    from llamastate._native.handles import ContextHandle
    from llamastate.model import Model

__all__ = ["context_limits", "context_schema"]

#: Context parameters that decide what a blob looks like, apart from the number of streams.
DECISIVE = ("type_k", "type_v", "flash_attn_type", "offload_kqv", "op_offload", "embeddings", "pooling_type")

#: Architectures whose window does not slide but begins anew every n_swa tokens (LLAMA_SWA_TYPE_CHUNKED).
CHUNKED = frozenset({"llama4"})


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
    decisive = {name: params[name] for name in DECISIVE if name in params}
    key = tuple(sorted(decisive.items()))
    schema = model._schemas.get(key)
    if schema is None:
        schema = model._schemas[key] = _probe(model, decisive)
    n_stream = 1 if params.get("kv_unified", False) else handle.n_seq_max
    parts = tuple(replace(p, n_stream=n_stream) if isinstance(p, KVSchema) else p for p in schema.parts)
    return replace(schema, parts=parts)


def _probe(model: Model, decisive: dict[str, Any]) -> Schema:
    small = dict(decisive, n_ctx=1, n_batch=1, n_ubatch=1, n_seq_max=1, n_threads=1, n_threads_batch=1, kv_unified=True)
    handle = handles.create_context(model._handle, small, raise_if_busy=False)
    try:
        if handle.has_memory:
            zero, one = np.zeros(1, np.int32), np.ones(1, np.int32)
            decode.decode(handle, zero, zero, one, zero, np.zeros(1, np.int8))
        blob = np.empty(state.seq_get_size(handle, 0, 0), np.uint8)
        state.seq_get_data_into(handle, blob, 0, 0)
    finally:
        handle.close()
    swa_type = "none" if not model.n_swa else "chunked" if model.arch in CHUNKED else "standard"
    return infer_schema(
        blob.tobytes(),
        arch=model.arch,
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
