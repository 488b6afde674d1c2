"""The bytes of an entry: back as they were, or a typed error."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import xxhash

from llamastate.errors import BadMagicError, CorruptStateError, LoadError, VersionMismatchError
from llamastate.prefix.entry import HEADER_BYTES, Kind, build, read, read_header, seal
from tests.prefix.entries import ROOT, SIZE, anchor, block


def test_round_trip_of_a_block():
    entry = block(depth=3, n_bytes=1234)
    back = read(entry.image.tobytes())
    assert (back.kind, back.key, back.parent, back.root) == (Kind.BLOCK, entry.key, ROOT, ROOT)
    assert (back.start, back.tail, back.end, back.nbytes) == (3 * SIZE, SIZE, 4 * SIZE, entry.nbytes)
    np.testing.assert_array_equal(back.tokens, entry.tokens)
    np.testing.assert_array_equal(back.rows, entry.rows)
    assert back.rows.nbytes == 1234
    assert back.partial.size == 0
    assert back.logits is None


def test_round_trip_of_an_anchor():
    entry = anchor(ROOT, 2, 5, n_bytes=77)
    back = read(bytearray(entry.image))
    assert (back.kind, back.start, back.tail) == (Kind.ANCHOR, 2 * SIZE, 5)
    np.testing.assert_array_equal(back.tokens, entry.tokens)
    np.testing.assert_array_equal(back.partial, entry.partial)
    np.testing.assert_array_equal(back.logits, np.arange(7, dtype=np.float32))
    assert back.rows.size == 0


def test_an_anchor_right_after_a_block_has_no_tokens():
    back = read(anchor(ROOT, 2, 0).image)
    assert (back.tail, back.tokens.size, back.end) == (0, 0, 2 * SIZE)


def test_rows_can_be_filled_in_later():
    ids = np.arange(SIZE, dtype=np.int32)
    entry = build(Kind.BLOCK, key=b"k" * 32, parent=ROOT, root=ROOT, start=0, tokens=ids, rows=100)
    entry.rows[:] = 7
    assert not entry.sealed
    with pytest.raises(CorruptStateError):
        read(entry.image)
    seal(entry)
    assert entry.sealed
    assert read(entry.image).rows.tolist() == [7] * 100


def test_the_format_is_frozen():
    """Other bytes are another version."""
    ids = np.arange(100, 103, dtype=np.int32)
    made = build(
        Kind.ANCHOR,
        key=bytes(range(32)),
        parent=bytes(range(32, 64)),
        root=bytes(range(64, 96)),
        start=128,
        tokens=ids,
        rows=np.arange(5, dtype=np.uint8),
        partial=np.arange(9, dtype=np.uint8),
        logits=np.array([1.5, -2], np.float32),
    )
    seal(made)
    image = made.image.tobytes()
    assert len(image) == 256 + 64 + 64 + 64 + 8
    assert hashlib.sha256(image).hexdigest() == "02b0f7c7b5c371675a4bd27b2253d1aa4ccae6ef4ed4085872a59d7b41963567"
    assert image[256:268] == ids.tobytes()


def test_every_truncation():
    for entry in (block(n_bytes=100), anchor(ROOT, 0, 3, n_bytes=100)):
        image = entry.image.tobytes()
        for n in range(len(image)):
            with pytest.raises((CorruptStateError, BadMagicError)):
                read(image[:n])
        with pytest.raises(CorruptStateError):
            read(image + b"\0")


def test_flipped_bits():
    chance = np.random.default_rng(5)
    image = anchor(ROOT, 1, 5, n_bytes=3000).image
    for at in (*range(0, 8 * HEADER_BYTES, 3), *chance.integers(0, 8 * image.nbytes, 1000)):
        image[at // 8] ^= 1 << at % 8
        with pytest.raises(LoadError):
            read(image)
        image[at // 8] ^= 1 << at % 8
    read(image)


def test_a_newer_version():
    """As a later package would write it: sound, but not for this one."""
    for at, value in ((8, 2), (12, 3)):
        image = block().image
        image[at] = value
        image[224:240] = np.frombuffer(xxhash.xxh3_128_digest(image[:224].data), np.uint8)
        with pytest.raises(VersionMismatchError) as caught:
            read(image)
        assert caught.value.expected == 1


def test_sections_that_do_not_add_up():
    for at, value in ((128, 3), (136, 2**63), (16, 2**40), (152, 3)):
        image = block().image
        image[at : at + 8].view("<u8")[0] = value
        image[224:240] = np.frombuffer(xxhash.xxh3_128_digest(image[:224].data), np.uint8)
        with pytest.raises(CorruptStateError):
            read_header(image)


def test_something_else():
    for data in (b"", b"x", bytes(HEADER_BYTES), b"GGUF" + bytes(1000)):
        with pytest.raises(LoadError):
            read(data)
