"""llama.cpp's own state functions, through llama-cpp-python's ctypes declarations, on a context of ours.

What this package says about llama.cpp has to be tested against llama.cpp, and not against its own binding.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import llama_cpp as lib
import numpy as np
import numpy.typing as npt
from llama_cpp._logger import set_verbose

from llamastate import Context

set_verbose(False)  # llama-cpp-python hears llama.cpp's log from the moment of its import

Bytes = npt.NDArray[np.uint8]


def pointer(ctx: Context) -> int:
    """The ``llama_context *``."""
    return ctx._handle.address


def _ids(tokens: npt.NDArray[np.int32]) -> Any:
    return (lib.llama_token * len(tokens))(*tokens.tolist())


def _out(n: int) -> tuple[Bytes, Any]:
    out = np.zeros(n, np.uint8)
    return out, out.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def get(ctx: Context) -> Bytes:
    out, p = _out(lib.llama_state_get_size(pointer(ctx)))
    assert lib.llama_state_get_data(pointer(ctx), p, len(out)) == len(out)
    return out


def set_(ctx: Context, blob: Bytes) -> int:
    return int(lib.llama_state_set_data(pointer(ctx), blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)), len(blob)))


def seq_get(ctx: Context, seq_id: int, flags: int = 0) -> Bytes:
    out, p = _out(lib.llama_state_seq_get_size_ext(pointer(ctx), seq_id, flags))
    assert lib.llama_state_seq_get_data_ext(pointer(ctx), p, len(out), seq_id, flags) == len(out)
    return out


def seq_set(ctx: Context, blob: Bytes, seq_id: int, flags: int = 0) -> int:
    p = blob.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    return int(lib.llama_state_seq_set_data_ext(pointer(ctx), p, len(blob), seq_id, flags))


def save_file(ctx: Context, path: os.PathLike[str], tokens: npt.NDArray[np.int32]) -> bool:
    return bool(lib.llama_state_save_file(pointer(ctx), os.fsencode(path), _ids(tokens), len(tokens)))


def load_file(ctx: Context, path: os.PathLike[str]) -> list[int]:
    out, n = (lib.llama_token * 4096)(), ctypes.c_size_t()
    assert lib.llama_state_load_file(pointer(ctx), os.fsencode(path), out, 4096, ctypes.byref(n))
    return list(out[: n.value])


def seq_save_file(ctx: Context, path: os.PathLike[str], seq_id: int, tokens: npt.NDArray[np.int32]) -> int:
    return int(lib.llama_state_seq_save_file(pointer(ctx), os.fsencode(path), seq_id, _ids(tokens), len(tokens)))


def seq_load_file(ctx: Context, path: os.PathLike[str], seq_id: int) -> tuple[list[int], int]:
    out, n = (lib.llama_token * 4096)(), ctypes.c_size_t()
    size = lib.llama_state_seq_load_file(pointer(ctx), os.fsencode(path), seq_id, out, 4096, ctypes.byref(n))
    return list(out[: n.value]), int(size)


def seq_rm(ctx: Context, seq_id: int, p0: int, p1: int) -> bool:
    return bool(lib.llama_memory_seq_rm(lib.llama_get_memory(pointer(ctx)), seq_id, p0, p1))
