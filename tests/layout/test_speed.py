"""How long a check takes; printed, not asserted, because machines differ. `make bench` has the figures that count."""

from __future__ import annotations

import struct
import timeit

import numpy as np
import pytest

from llamastate.layout import KVSchema, Limits, Schema, validate_context, validate_sequence


def large_blob(n_cells, n_layer, *, has_ext=False, window=0):
    kv = KVSchema("base", 1, has_ext, False, ((1, 384),) * n_layer, ((1, 384),) * n_layer)
    caches = [(kv, n_cells)]
    if window:
        caches.append((KVSchema("window", 1, has_ext, False, kv.k, kv.v), window))
    schema = Schema("llama", tuple(c for c, _ in caches), window, "standard" if window else "none", has_ext)
    out = [struct.pack("<Ii", 0xAF143CD8, 0)]
    for cache, n in caches:
        cells = np.zeros(n, cache.record_dtype)
        cells["pos"] = np.arange(n_cells - n, n_cells)
        cells["n_seq_id"] = 1
        if has_ext:
            cells["x"] = cells["y"] = cells["pos"]
        out += [struct.pack("<II", 1, n), cells.tobytes(), cache.preamble]
        for tensor in cache.tensors:
            out += [tensor.header, bytes(n * tensor.cell_bytes)]
    return b"".join(out), schema


@pytest.mark.parametrize("settings", [{}, {"has_ext": True}, {"window": 512}], ids=["dense", "m-rope", "iswa"])
def test_time_to_validate(settings, capsys):
    blob, schema = large_blob(2048, 30, **settings)
    limits = Limits(1, 4096, 4096, 1000)
    whole = struct.pack("<I", 5) + b"llama" + blob[8:]
    assert validate_sequence(blob, schema, limits).pos_max == 2047
    assert validate_context(whole, schema, limits).sequences[0][1] == 2047
    one = min(timeit.repeat(lambda: validate_sequence(blob, schema, limits), number=20, repeat=5)) / 20
    every = min(timeit.repeat(lambda: validate_context(whole, schema, limits), number=20, repeat=5)) / 20
    with capsys.disabled():
        print(f"\nvalidate 2,048 cells x 30 layers {settings}: {one * 1e6:.0f} us, whole context {every * 1e6:.0f} us")
