"""llama.cpp called as directly as Python can: ctypes, arguments bound beforehand, nothing checked.

The library is the one that llamastate itself runs on, so both sides of a comparison are the same machine code. ctypes
gives up the GIL around a call, as llamastate does.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llamastate import Context, native_version

#: Where the little C clock is compiled.
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "bench"


class Batch(ctypes.Structure):
    """``struct llama_batch``."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "llama_state_seq_get_size_ext": (c_size_t, [c_void_p, c_int32, c_uint32]),
    "llama_state_seq_get_data_ext": (c_size_t, [c_void_p, c_void_p, c_size_t, c_int32, c_uint32]),
    "llama_state_seq_set_data_ext": (c_size_t, [c_void_p, c_void_p, c_size_t, c_int32, c_uint32]),
    "llama_state_seq_load_file": (
        c_size_t,
        [c_void_p, c_char_p, c_int32, c_void_p, c_size_t, POINTER(c_size_t)],
    ),
    "llama_state_seq_save_file": (c_size_t, [c_void_p, c_char_p, c_int32, c_void_p, c_size_t]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_memory_seq_cp": (None, [c_void_p, c_int32, c_int32, c_int32, c_int32]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_sampler_init_greedy": (c_void_p, []),
    "llama_sampler_sample": (c_int32, [c_void_p, c_void_p, c_int32]),
    "llama_sampler_free": (None, [c_void_p]),
}


@functools.cache
def function(name: str) -> Callable[..., Any]:
    """A function of ``llama.h``."""
    found = ctypes.CDLL(native_version()["library"])[name]
    found.restype, found.argtypes = _PROTOTYPES[name]
    return found


def pointer(ctx: Context) -> int:
    """The ``llama_context *`` of a context."""
    return ctx._handle.address


def get_data(ctx: Context, out: npt.NDArray[np.uint8], seq_id: int, flags: int = 0) -> Callable[[], int]:
    """``llama_state_seq_get_data`` into ``out``."""
    call = function("llama_state_seq_get_data_ext")
    return functools.partial(
        call, c_void_p(pointer(ctx)), c_void_p(out.ctypes.data), c_size_t(out.nbytes), c_int32(seq_id), c_uint32(flags)
    )


def set_data(ctx: Context, src: npt.NDArray[np.uint8], seq_id: int, flags: int = 0) -> Callable[[], int]:
    """``llama_state_seq_set_data`` from ``src``."""
    call = function("llama_state_seq_set_data_ext")
    return functools.partial(
        call, c_void_p(pointer(ctx)), c_void_p(src.ctypes.data), c_size_t(src.nbytes), c_int32(seq_id), c_uint32(flags)
    )


def get_size(ctx: Context, seq_id: int, flags: int = 0) -> Callable[[], int]:
    """``llama_state_seq_get_size``."""
    call = function("llama_state_seq_get_size_ext")
    return functools.partial(call, c_void_p(pointer(ctx)), c_int32(seq_id), c_uint32(flags))


def save_file(ctx: Context, path: str | os.PathLike[str], seq_id: int, tokens: npt.ArrayLike) -> Callable[[], int]:
    """``llama_state_seq_save_file``, which neither waits for the disk nor spares the old file."""
    call = function("llama_state_seq_save_file")
    ids = np.ascontiguousarray(tokens, np.int32)
    name = os.fsencode(path)
    address = c_void_p(pointer(ctx))

    def run(keep: object = ids) -> int:
        return int(call(address, name, seq_id, ids.ctypes.data, len(ids)))

    return run


def load_file(ctx: Context, path: str | os.PathLike[str], seq_id: int, capacity: int) -> Callable[[], int]:
    """``llama_state_seq_load_file`` with room for ``capacity`` tokens."""
    call = function("llama_state_seq_load_file")
    tokens = (c_int32 * capacity)()
    count = c_size_t()
    name = os.fsencode(path)
    address = c_void_p(pointer(ctx))
    return lambda: call(address, name, seq_id, tokens, capacity, ctypes.byref(count))


def decode(ctx: Context, tokens: Sequence[int], pos: Sequence[int], seq_ids: Sequence[int]) -> Callable[[], int]:
    """``llama_decode`` of one token each of several sequences, all with logits."""
    n = len(tokens)
    owners = [(c_int32 * 1)(seq) for seq in seq_ids]
    columns = (
        (c_int32 * n)(*tokens),
        (c_int32 * n)(*pos),
        (c_int32 * n)(*[1] * n),
        (POINTER(c_int32) * n)(*[ctypes.cast(owner, POINTER(c_int32)) for owner in owners]),
        (c_int8 * n)(*[1] * n),
    )
    token, position, n_seq_id, seq_id, logits = columns
    batch = Batch(n, token, None, position, n_seq_id, seq_id, logits)
    call, address = function("llama_decode"), c_void_p(pointer(ctx))

    def run(keep: object = (columns, owners)) -> int:
        return int(call(address, batch))

    return run


def trim(ctx: Context, seq_ids: Sequence[int], length: int) -> Callable[[], None]:
    """``llama_memory_seq_rm`` of everything from ``length`` on."""
    call, memory = function("llama_memory_seq_rm"), c_void_p(function("llama_get_memory")(pointer(ctx)))

    def run() -> None:
        for seq in seq_ids:
            call(memory, seq, length, -1)

    return run


def clock() -> Callable[[Context, int, int], float] | None:
    """Compile ``clock.c``: seconds of one ``get_size``, out of so many calls for a sequence. None: no compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    CACHE.mkdir(parents=True, exist_ok=True)
    library = CACHE / "clock.so"
    source = Path(__file__).with_name("clock.c")
    made = subprocess.run(
        [*compiler.split(), "-O2", "-shared", "-fPIC", str(source), "-o", str(library)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        return None
    measure = ctypes.CDLL(str(library)).seconds_a_call
    measure.restype = ctypes.c_double
    measure.argtypes = [c_void_p, c_void_p, c_int32, c_uint32, ctypes.c_long]
    address = ctypes.cast(function("llama_state_seq_get_size_ext"), c_void_p)  # type: ignore[arg-type]
    return lambda ctx, seq_id, calls: float(measure(address, pointer(ctx), seq_id, 0, calls))
