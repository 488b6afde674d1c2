"""What a child is doing, in memory that outlives it: the parent reads there what killed it."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

_HEAD = struct.Struct("<II")
_SIZE = 4 << 20


class Journal:
    """A note and some bytes, overwritten by each next one. Written through shared memory: no call, no flush."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        if create:
            path.write_bytes(bytes(_SIZE))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SIZE)

    def write(self, note: str, data: bytes = b"") -> None:
        text = note.encode()[: _SIZE // 4]
        data = data[: _SIZE // 2]
        self._map[: _HEAD.size + len(text) + len(data)] = _HEAD.pack(len(text), len(data)) + text + data

    def read(self) -> tuple[str, bytes]:
        n_text, n_data = _HEAD.unpack_from(self._map)
        at = _HEAD.size + n_text
        return self._map[_HEAD.size : at].decode(errors="replace"), self._map[at : at + n_data]

    def close(self) -> None:
        self._map.close()
