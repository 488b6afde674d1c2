"""The front of session files, against files that llama.cpp writes and reads itself."""

from __future__ import annotations

import ctypes
import mmap
import struct

import llama_cpp as lib
import numpy as np
import pytest

from llamastate.errors import (
    BadMagicError,
    CorruptStateError,
    InsufficientMaxTokensError,
    InvalidBufferError,
    LlamaStateError,
    VersionMismatchError,
)
from llamastate.layout import MAGIC, VERSION, header_bytes, read_header, validate_context, validate_sequence
from tests.layout.native import tokens


def as_tokens(ids):
    return (lib.llama_token * len(ids))(*ids)


@pytest.mark.parametrize("name", ["dense", "iswa", "jamba", "mamba"])
def test_files_of_llama_cpp(native, tmp_path, name):
    context = native(name)
    schema = context.schema()
    ids = tokens(40)
    context.decode(ids)
    file = str(tmp_path / "state").encode()

    assert lib.llama_state_save_file(context.ctx, file, as_tokens(ids), len(ids))
    data = (tmp_path / "state").read_bytes()
    head = read_header(data)
    assert (head.kind, head.version, head.packed) == ("context", 10, False)
    assert head.tokens.tolist() == ids
    assert header_bytes("context", ids) == data[: head.state_offset]
    assert data[head.state_offset :] == context.get_all()
    validate_context(memoryview(data)[head.state_offset :], schema, context.limits)

    assert lib.llama_state_seq_save_file(context.ctx, file, 0, as_tokens(ids), len(ids))
    data = (tmp_path / "state").read_bytes()
    head = read_header(data, kind="sequence")
    assert (head.kind, head.version) == ("sequence", 3)
    assert header_bytes("sequence", np.array(ids)) == data[: head.state_offset]
    assert data[head.state_offset :] == context.get()[8:]
    info = validate_sequence(memoryview(data)[head.state_offset :], schema, context.limits, header=False)
    assert info.pos_max == 39

    # And the other way: ours are read by llama.cpp.
    context.clear()
    (tmp_path / "state").write_bytes(header_bytes("sequence", ids) + data[head.state_offset :])
    out, n_out = (lib.llama_token * 64)(), ctypes.c_size_t()
    assert lib.llama_state_seq_load_file(context.ctx, file, 0, out, 64, ctypes.byref(n_out)) == len(data)
    assert list(out)[: n_out.value] == ids


def test_headers_that_are_wrong():
    good = header_bytes("context", [1, 2, 3]) + b"state"
    assert read_header(good).state_offset == 24
    assert read_header(good).tokens.dtype == np.int32
    for cut in range(24):
        with pytest.raises(CorruptStateError) as caught:
            read_header(good[:cut])
        assert caught.value.section.startswith("file.")
        assert caught.value.offset <= cut
    with pytest.raises(BadMagicError) as bad:
        read_header(b"GGUF" + good[4:])
    assert bad.value.found == 0x46554747
    with pytest.raises(BadMagicError) as bad:
        read_header(good, kind="sequence")
    assert (bad.value.expected, bad.value.found) == (MAGIC["sequence"], MAGIC["context"])
    with pytest.raises(VersionMismatchError) as old:
        read_header(good[:4] + struct.pack("<I", 9) + good[8:])
    assert (old.value.expected, old.value.found) == (VERSION["context"], 9)
    with pytest.raises(CorruptStateError) as caught:
        read_header(good[:8] + b"\xff\xff\xff\xff" + good[12:])
    assert caught.value.offset == 8
    with pytest.raises(InsufficientMaxTokensError) as many:
        read_header(good, max_tokens=2)
    assert (many.value.n_out, many.value.max_tokens) == (3, 2)
    assert len(read_header(good, max_tokens=3).tokens) == 3
    with pytest.raises(InvalidBufferError):
        read_header(None)
    for at in range(12):
        for bit in range(8):
            damaged = bytearray(good)
            damaged[at] ^= 1 << bit
            if at < 8 or damaged[8] > 4:
                with pytest.raises(LlamaStateError):
                    read_header(damaged)


def test_packed_tokens_are_told_apart():
    assert read_header(header_bytes("sequence", [-1, 1, 2, 7, 8])).packed
    assert not read_header(header_bytes("sequence", [])).packed
    assert read_header(header_bytes("sequence", [])).state_offset == 12


@pytest.mark.parametrize("bad", [[[1, 2]], [1.5], [2**31], ["a"]])
def test_tokens_that_cannot_be_written(bad):
    with pytest.raises(ValueError, match="tokens"):
        header_bytes("context", bad)


def test_tokens_are_a_view(tmp_path):
    (tmp_path / "f").write_bytes(header_bytes("context", range(1000)) + b"x")
    with (tmp_path / "f").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        tokens_ = read_header(mapped).tokens
        assert tokens_.tolist() == list(range(1000))
        assert not tokens_.flags.owndata
        del tokens_
