"""Ways to damage a blob. Each is a function of a random generator and bytes; what it does decides nothing else."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from llamastate.layout import Schema
from llamastate.layout.walk import Span, walk_context, walk_sequence

#: Values at the edges of what types and tables can hold, and of what the format uses.
WORDS = (
    0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 31, 32, 33, 64, 127, 128, 255, 256, 257, 512, 1023, 4096, 0xFFFF, 0x10000,
    0x7FFFFFFE, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFE, 0xFFFFFFFF, 0xFFFFFFF9, 300, 0xAF143CD8, 0x6767736E,
    0x67677371, 0x3F800000, 0x7FC00000, 0x40000000, 0xC0000000, 0x20000000, 0x55555556,
)  # fmt: skip


class Blob(NamedTuple):
    """Bytes that llama.cpp or this package made, and where in them the bytes are that decide something."""

    data: bytes
    headers: Sequence[int]


def sequence_headers(data: bytes, schema: Schema, *, partial: bool, on_device: bool = False) -> list[int]:
    """Offsets of a sequence blob that are no tensor content."""
    walk = walk_sequence(memoryview(data), schema, partial=partial, on_device=on_device)
    spans = [span for span in walk.spans if span is not None]
    return sorted({*range(min(len(data), 24)), *_of(spans, on_device), *_around(walk.starts, len(data))})


def context_headers(data: bytes, schema: Schema) -> list[int]:
    """Offsets of a whole-context blob that are no tensor content."""
    walk = walk_context(memoryview(data), schema)
    spans = [span for part in walk.parts for span in part]
    return sorted({*range(min(len(data), 24)), *_of(spans, False), *_around(walk.starts, len(data))})


def _around(starts: Sequence[int], size: int) -> list[int]:
    return [at for start in starts for at in range(start, min(size, start + 24))]


def _of(spans: Sequence[Span], on_device: bool) -> list[int]:
    found: list[int] = []
    for span in spans:
        found += range(max(0, span.cells.at - 4), span.data)
        at = span.data
        for tensor in span.part.tensors:
            found += range(at, at + len(tensor.header))
            at += len(tensor.header) + (0 if on_device else span.n_cells * tensor.cell_bytes)
    return found


def mutate(rng: random.Random, source: Blob, donors: Sequence[bytes]) -> tuple[bytes, str]:
    """Damage a copy of ``source`` in one to six places; the bytes, and the names of what was done."""
    data = bytearray(source.data)
    names = []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3, 6))):
        how = rng.choice(HOW)
        how(rng, data, source.headers, donors)
        names.append(how.__name__)
    return bytes(data), "+".join(names)


def _place(rng: random.Random, data: bytearray, headers: Sequence[int]) -> int:
    """Mostly where something is decided, sometimes anywhere."""
    if headers and rng.random() < 0.85:
        return min(rng.choice(headers), max(0, len(data) - 1))
    return rng.randrange(len(data)) if data else 0


def flip_bit(rng: random.Random, data: bytearray, headers: Sequence[int], donors: Sequence[bytes]) -> None:
    if data:
        data[_place(rng, data, headers)] ^= 1 << rng.randrange(8)


def set_byte(rng: random.Random, data: bytearray, headers: Sequence[int], donors: Sequence[bytes]) -> None:
    if data:
        data[_place(rng, data, headers)] = rng.randrange(256)


def set_word(rng: random.Random, data: bytearray, headers: Sequence[int], donors: Sequence[bytes]) -> None:
    at = _place(rng, data, headers) & ~3
    if at + 4 <= len(data):
        struct.pack_into("<I", data, at, rng.choice(WORDS))


def add_to_word(rng: random.Random, data: bytearray, headers: Sequence[int], donors: Sequence[bytes]) -> None:
    at = _place(rng, data, headers) & ~3
    if at + 4 <= len(data):
        value = struct.unpack_from("<I", data, at)[0] + rng.choice((-256, -8, -4, -2, -1, 1, 2, 4, 8, 256))
        struct.pack_into("<I", data, at, value & 0xFFFFFFFF)


def set_long(rng: random.Random, data: bytearray, headers: Sequence[int], donors: Sequence[bytes]) -> None:
    at = _place(rng, data, headers) & ~3
    if at + 8 <= len(data):
        struct.pack_into("<II", data, at, rng.choice(WORDS), rng.choice(WORDS))


def swap_words(rng: random.Random, data: bytearray, headers: Sequence[int], donors: Sequence[bytes]) -> None:
    a, b = (_place(rng, data, headers) & ~3 for _ in range(2))
    if max(a, b) + 4 <= len(data):
        data[a : a + 4], data[b : b + 4] = data[b : b + 4], data[a : a + 4]


def truncate(rng: random.Random, data: bytearray, headers: Sequence[int], donors: Sequence[bytes]) -> None:
    del data[_place(rng, data, headers) :]


def extend(rng: random.Random, data: bytearray, headers: Sequence[int], donors: Sequence[bytes]) -> None:
    n = rng.choice((1, 4, 8, 12, 100))
    data += rng.choice((bytes(n), rng.randbytes(n), bytes(data[:n]), bytes(data[-n:])))


def delete(rng: random.Random, data: bytearray, headers: Sequence[int], donors: Sequence[bytes]) -> None:
    at = _place(rng, data, headers)
    del data[at : at + rng.choice((1, 2, 4, 8, 12, 24, 256))]


def duplicate(rng: random.Random, data: bytearray, headers: Sequence[int], donors: Sequence[bytes]) -> None:
    at, n = _place(rng, data, headers), rng.choice((1, 4, 8, 12, 24, 256))
    data[at:at] = data[at : at + n]


def insert(rng: random.Random, data: bytearray, headers: Sequence[int], donors: Sequence[bytes]) -> None:
    at = _place(rng, data, headers)
    data[at:at] = rng.randbytes(rng.choice((1, 4, 8, 12)))


def zero(rng: random.Random, data: bytearray, headers: Sequence[int], donors: Sequence[bytes]) -> None:
    at = _place(rng, data, headers)
    n = min(rng.choice((1, 4, 8, 32, 1000)), len(data) - at)
    data[at : at + n] = bytes(n)


def move(rng: random.Random, data: bytearray, headers: Sequence[int], donors: Sequence[bytes]) -> None:
    a, b, n = _place(rng, data, headers), _place(rng, data, headers), rng.choice((4, 8, 12, 24))
    piece = data[a : a + n]
    data[b : b + len(piece)] = piece


def splice(rng: random.Random, data: bytearray, headers: Sequence[int], donors: Sequence[bytes]) -> None:
    """The front of one and the end of another."""
    donor = rng.choice(donors)
    at = _place(rng, data, headers)
    data[at:] = donor[rng.choice((at, rng.randrange(len(donor) + 1))) :]


def other_front(rng: random.Random, data: bytearray, headers: Sequence[int], donors: Sequence[bytes]) -> None:
    donor = rng.choice(donors)
    n = min(_place(rng, data, headers) + 1, len(donor))
    data[:n] = donor[:n]


def other_words(rng: random.Random, data: bytearray, headers: Sequence[int], donors: Sequence[bytes]) -> None:
    donor = rng.choice(donors)
    at = _place(rng, data, headers) & ~3
    piece = donor[at : at + rng.choice((4, 8, 12, 64))]
    data[at : at + len(piece)] = piece


def replace(rng: random.Random, data: bytearray, headers: Sequence[int], donors: Sequence[bytes]) -> None:
    data[:] = rng.choice(donors)


def shift_run(rng: random.Random, data: bytearray, headers: Sequence[int], donors: Sequence[bytes]) -> None:
    """Add the same number to evenly spaced words: positions of cells, with luck all of them."""
    at, step = rng.choice((12, 16, 20, 24, 28)), rng.choice((8, 12, 16, 24))
    n = min(rng.choice((5, 7, 12, 40)), (len(data) - at) // step) if len(data) > at + step else 0
    if n > 0:
        words = np.ndarray((n,), "<i4", data, at, (step,))
        words += np.int32(rng.choice((-1, 1, 2, 100, 2**30)))


Mutation = Callable[[random.Random, bytearray, Sequence[int], Sequence[bytes]], None]

#: Small damage is what checks miss, so it comes more often.
HOW: tuple[Mutation, ...] = (
    *(flip_bit,) * 8, *(set_word,) * 6, *(add_to_word,) * 4, *(set_byte,) * 2, *(truncate,) * 2, *(shift_run,) * 2,
    set_long, swap_words, extend, delete, duplicate, insert, zero, move, splice, other_front, other_words, replace,
)  # fmt: skip
