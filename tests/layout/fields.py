"""A second reading of the blob format, for the tests: where each field is.

Written against the tables of the format and apart from the package's own walk, so that the two check each other.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from llamastate.layout import KVSchema, Schema


class Field(NamedTuple):
    name: str
    start: int
    end: int


def sequence_fields(blob: bytes, schema: Schema, *, partial: bool = False) -> Iterator[Field]:
    """Every field of a sequence blob that is no tensor content, and the tensor contents as fields named ``data``."""
    at = 0

    def field(name: str, size: int) -> Field:
        nonlocal at
        at += size
        return Field(name, at - size, at)

    def u32() -> int:
        return int(struct.unpack_from("<I", blob, at)[0])

    yield field("header.magic", 4)
    yield field("header.seq_id", 4)
    for part in schema.parts_of(partial):
        kv = isinstance(part, KVSchema)
        streams = 1
        if isinstance(part, KVSchema):
            streams = u32()
            yield field(f"{part.name}.n_stream", 4)
        for _ in range(streams):
            n_cells = u32()
            yield field(f"{part.name}.n_cells", 4)
            if kv and not n_cells:
                continue
            for i in range(n_cells):
                yield field(f"{part.name}.pos", 4)
                yield field(f"{part.name}.n_seq_id", 4)
                if isinstance(part, KVSchema):
                    for name in ("x", "y", "token") if part.has_ext else ():
                        yield field(f"{part.name}.{name}", 4)
                    yield field(f"{part.name}.seq_id[{i}]", 4)
            yield field(f"{part.name}.trans", 4)
            yield field(f"{part.name}.n_layer", 4)
            if isinstance(part, KVSchema):
                columns = part.v_trans
                entries = [("K", e, False) for e in part.k] + [("V", e, columns) for e in part.v]
            else:
                entries = [("R", e, False) for e in part.r] + [("S", e, False) for e in part.s]
            for letter, entry, transposed in entries:
                yield field(f"{part.name}.{letter}.type", 4)
                if transposed:
                    yield field(f"{part.name}.{letter}.element", 4)
                    yield field(f"{part.name}.{letter}.n_embd", 4)
                    size = entry[1] * entry[2]
                else:
                    yield field(f"{part.name}.{letter}.row", 8)
                    size = entry[1]
                yield field("data", n_cells * size)
    assert at == len(blob)
