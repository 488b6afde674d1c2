"""The little of llama.cpp that these tests need, straight through llama-cpp-python's ctypes functions.

The layout must be tested against llama.cpp itself and not against this package's own binding of it.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import llama_cpp as lib
import numpy as np
from numpy.typing import NDArray

from llamastate.layout import Limits, Schema, infer_schema
from tests import tiny

N_VOCAB = 256
CELLS = 512  # of each sequence's share of the cache
KINDS = {
    "dense": "attention",
    "iswa": "iswa",
    "iswa11": "iswa",
    "mamba": "recurrent",
    "mamba2": "recurrent",
    "jamba": "hybrid",
    "lfm2": "hybrid",
    "lfm2swa": "hybrid-iswa",
    "qwen35": "hybrid",
    "qwen2vl": "attention",
}
NAMES = tuple(KINDS)
M_ROPE = ("qwen35", "qwen2vl")


@lib.llama_log_callback
def _silent(level: int, text: bytes, user_data: Any) -> None:
    pass


@cache
def model(name: str) -> Any:
    lib.llama_log_set(_silent, ctypes.c_void_p(0))
    lib.llama_backend_init()
    loaded = lib.llama_model_load_from_file(str(tiny.path(name)).encode(), lib.llama_model_default_params())
    assert loaded
    return loaded


def tokens(n: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(1, N_VOCAB - 1, n)]


class Native:
    """One context. Sequence ids, lengths and flags are trusted: callers are tests."""

    def __init__(
        self, name: str, *, flash: bool = True, unified: bool = True, n_seq_max: int = 1, type_kv: int = 1
    ) -> None:
        self.name, self.flash, self.unified, self.n_seq_max = name, flash, unified, n_seq_max
        params = lib.llama_context_default_params()
        params.n_ctx = CELLS * n_seq_max
        params.n_batch = params.n_ubatch = CELLS
        params.n_seq_max = n_seq_max
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = int(flash)
        params.kv_unified = unified
        params.type_k = params.type_v = type_kv
        self.ctx = lib.llama_init_from_model(model(name), params)
        assert self.ctx
        self.memory = lib.llama_get_memory(self.ctx)

    def close(self) -> None:
        if self.ctx:
            lib.llama_free(self.ctx)
            self.ctx = None

    def __enter__(self) -> Native:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def decode(self, ids: list[int], seq_id: int = 0) -> NDArray[np.float32]:
        """Append tokens; the logits of the last one."""
        batch = lib.llama_batch_init(len(ids), 0, 1)
        try:
            start = self.span(seq_id)[1] + 1
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
                batch.seq_id[i][0] = seq_id
                batch.logits[i] = i + 1 == len(ids)
            assert lib.llama_decode(self.ctx, batch) == 0
        finally:
            lib.llama_batch_free(batch)
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(self.ctx, -1), (N_VOCAB,)).copy()

    def decode_image(self, width: int, height: int, seq_id: int = 0) -> None:
        """Append an image of random embeddings, with M-RoPE's positions."""
        n = width * height
        n_embd = lib.llama_model_n_embd(model(self.name))
        at = self.span(seq_id)[1] + 1
        pos = np.zeros((4, n), np.int32)
        pos[0], pos[1], pos[2] = at, at + np.arange(n) // width, at + np.arange(n) % width
        embd = np.random.default_rng(n).standard_normal((n, n_embd)).astype(np.float32)
        batch = lib.llama_batch_init(n, n_embd, 1)
        # A reference to a field of the structure would change with it; the address does not.
        own = ctypes.cast(batch.pos, ctypes.c_void_p).value
        try:
            batch.n_tokens = n
            ctypes.memmove(batch.embd, embd.ctypes.data, embd.nbytes)
            batch.pos = pos.ctypes.data_as(type(batch.pos))
            for i in range(n):
                batch.n_seq_id[i], batch.logits[i] = 1, 0
                batch.seq_id[i][0] = seq_id
            assert lib.llama_decode(self.ctx, batch) == 0
        finally:
            batch.pos = ctypes.cast(own, type(batch.pos))
            lib.llama_batch_free(batch)

    def decode_at(self, token: int, pos: int, seq_id: int = 0) -> NDArray[np.float32]:
        """Append one token at a position of its own (after an image the next position is not the next number)."""
        batch = lib.llama_batch_init(1, 0, 1)
        try:
            batch.n_tokens = 1
            batch.token[0], batch.pos[0], batch.n_seq_id[0], batch.logits[0] = token, pos, 1, 1
            batch.seq_id[0][0] = seq_id
            assert lib.llama_decode(self.ctx, batch) == 0
        finally:
            lib.llama_batch_free(batch)
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(self.ctx, -1), (N_VOCAB,)).copy()

    def span(self, seq_id: int) -> tuple[int, int]:
        return (
            lib.llama_memory_seq_pos_min(self.memory, seq_id),
            lib.llama_memory_seq_pos_max(self.memory, seq_id),
        )

    def remove(self, seq_id: int, p0: int = -1, p1: int = -1) -> None:
        assert lib.llama_memory_seq_rm(self.memory, seq_id, p0, p1)

    def copy(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        lib.llama_memory_seq_cp(self.memory, src, dst, p0, p1)

    def clear(self) -> None:
        lib.llama_memory_clear(self.memory, True)

    def get(self, seq_id: int = 0, flags: int = 0) -> bytes:
        size = lib.llama_state_seq_get_size_ext(self.ctx, seq_id, flags)
        out = (ctypes.c_uint8 * size)()
        written = lib.llama_state_seq_get_data_ext(self.ctx, out, size, seq_id, flags)
        return bytes(out)[:written]

    def set(self, blob: bytes, seq_id: int = 0, flags: int = 0) -> int:
        data = (ctypes.c_uint8 * len(blob)).from_buffer_copy(blob)
        return int(lib.llama_state_seq_set_data_ext(self.ctx, data, len(blob), seq_id, flags))

    def get_all(self) -> bytes:
        size = lib.llama_state_get_size(self.ctx)
        out = (ctypes.c_uint8 * size)()
        written = lib.llama_state_get_data(self.ctx, out, size)
        return bytes(out)[:written]

    def set_all(self, blob: bytes) -> int:
        data = (ctypes.c_uint8 * len(blob)).from_buffer_copy(blob)
        return int(lib.llama_state_set_data(self.ctx, data, len(blob)))

    @property
    def limits(self) -> Limits:
        cells = CELLS * (self.n_seq_max if self.unified else 1)
        return Limits(self.n_seq_max, cells, cells, N_VOCAB)

    def schema(self) -> Schema:
        """Inferred from one token, which is taken away again. The context must be empty."""
        self.decode([1])
        probe = self.get()
        self.clear()
        arch = ctypes.create_string_buffer(64)
        lib.llama_model_meta_val_str(model(self.name), b"general.architecture", arch, 64)
        n_swa = lib.llama_model_n_swa(model(self.name))
        return infer_schema(
            probe,
            arch=arch.value.decode(),
            recurrent=lib.llama_model_is_recurrent(model(self.name)),
            hybrid=lib.llama_model_is_hybrid(model(self.name)),
            n_swa=n_swa,
            swa_type="standard" if n_swa else "none",
            m_rope=self.name in M_ROPE,
        )
