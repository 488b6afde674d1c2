"""What a blob of one model in one context must look like.

A :class:`Schema` holds everything of a state blob that does not depend on the tokens: which caches there are, how
many streams, which layers with which types and row sizes. It is inferred once per context from a small blob
(:func:`llamastate.layout.infer_schema`) and compared with every blob after that.

Each part keeps a table of :class:`Tensor` entries, one a layer and kind, with the exact bytes that stand in front of
that layer's rows and the bytes one cell takes there. Parsing, validating and writing all walk this one table.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from struct import Struct
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llamastate.errors import UnsupportedLayoutError

__all__ = [
    "GGML_SCALARS",
    "MAX_SEQ",
    "KVSchema",
    "Limits",
    "RecurrentSchema",
    "Schema",
    "SwaType",
    "Tensor",
]

MAX_SEQ = 256
"""``LLAMA_MAX_SEQ``: sequence ids and streams are below this."""

GGML_SCALARS = {0: 4, 1: 2, 24: 1, 25: 2, 26: 4, 27: 8, 28: 8, 30: 2}
"""``ggml_type`` → bytes, for the types whose block is one element (f32, f16, i8, i16, i32, i64, f64, bf16)."""

SwaType = Literal["none", "standard", "chunked"]

_TYPE_ROW = Struct("<iQ")
_TYPE_ELEMENT_COUNT = Struct("<iII")
_TWO_U32 = Struct("<II")


class Tensor(NamedTuple):
    """One layer's K, V, R or S in a blob.

    ``header`` are the bytes in front of its rows, ``cell_bytes`` what one cell takes after them. ``columns`` is 0 when
    each cell is one row, or ``n_embd_v`` when the cells run along the last axis of ``[n_embd_v][n_cells]``.
    """

    header: bytes
    cell_bytes: int
    kind: str
    layer: int
    columns: int = 0

    @property
    def element(self) -> np.dtype[Any]:
        """The dtype of one element of a transposed tensor: an integer of the right width, or raw bytes."""
        size = self.cell_bytes // self.columns if self.columns else 1
        return np.dtype(f"<u{size}") if size in (1, 2, 4, 8) else np.dtype((np.void, size))


@dataclass(frozen=True)
class KVSchema:
    """One attention cache (``llama_kv_cache::state_write``).

    Parameters
    ----------
    role : {"base", "window"}
        The full cache, or the sliding-window one of an iSWA memory.
    n_stream : int
        1 for a unified cache, else the number of sequences.
    has_ext : bool
        Each cell carries x, y and a token id (M-RoPE, or n-gram embeddings).
    v_trans : bool
        V is stored transposed, as it is without flash attention.
    k : tuple of (ggml_type, row_bytes)
        One entry a layer.
    v : tuple
        The same; ``(ggml_type, element_bytes, n_embd_v)`` where ``v_trans``. Empty for MLA, which keeps no V.
    """

    role: Literal["base", "window"]
    n_stream: int
    has_ext: bool
    v_trans: bool
    k: tuple[tuple[int, int], ...]
    v: tuple[tuple[int, ...], ...]

    @property
    def name(self) -> str:
        """How errors call this part."""
        return self.role

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of one cell's record in a sequence blob (one sequence id)."""
        return 24 if self.has_ext else 12

    @cached_property
    def record_dtype(self) -> np.dtype[Any]:
        """One cell's record in a sequence blob as a structured dtype."""
        ext = [("x", "<i4"), ("y", "<i4"), ("token", "<i4")] if self.has_ext else []
        return np.dtype([("pos", "<i4"), ("n_seq_id", "<u4"), *ext, ("seq_id", "<i4")])

    @cached_property
    def preamble(self) -> bytes:
        """The two words between the cells and the layers."""
        return _TWO_U32.pack(int(self.v_trans), len(self.k))

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """The layers in the order of the blob: all K, then all V."""
        keys = [Tensor(_TYPE_ROW.pack(t, row), row, "K", i) for i, (t, row) in enumerate(self.k)]
        values = []
        for i, entry in enumerate(self.v):
            if self.v_trans:
                t, element, n_embd = entry
                values.append(Tensor(_TYPE_ELEMENT_COUNT.pack(t, element, n_embd), element * n_embd, "V", i, n_embd))
            else:
                t, row = entry
                values.append(Tensor(_TYPE_ROW.pack(t, row), row, "V", i))
        return (*keys, *values)

    @cached_property
    def scan_table(self) -> tuple[bytes, NDArray[np.int64]]:
        """The layers as ``_native.scan`` compares them: all headers in a row, bytes of a cell in each layer."""
        return b"".join(t.header for t in self.tensors), np.array([t.cell_bytes for t in self.tensors], np.int64)

    @cached_property
    def bytes_per_cell(self) -> int:
        """Bytes that one cell adds to a sequence blob: its record and its row of every layer."""
        return self.record_bytes + sum(t.cell_bytes for t in self.tensors)

    @cached_property
    def fixed_bytes(self) -> int:
        """Bytes of a non-empty part that do not depend on the number of cells (one stream non-empty)."""
        return 4 + 4 * self.n_stream + len(self.preamble) + sum(len(t.header) for t in self.tensors)

    def sequence_bytes(self, n_cells: int) -> int:
        """Size of this part in a sequence blob of ``n_cells`` cells."""
        if not n_cells:
            return 4 + 4 * self.n_stream
        return self.fixed_bytes + n_cells * self.bytes_per_cell

    def with_v_trans(self, v_trans: bool) -> KVSchema:
        """The same cache with V stored the other way.

        Raises
        ------
        UnsupportedLayoutError
            V has a type of blocks (q8_0, …), which llama.cpp only allows with flash attention.
        """
        if v_trans == self.v_trans:
            return self
        entries: list[tuple[int, ...]] = []
        for entry in self.v:
            element = GGML_SCALARS.get(entry[0])
            if element is None:
                raise UnsupportedLayoutError(
                    f"V of ggml type {entry[0]} comes in blocks and cannot be transposed",
                    kind="v_trans",
                    reason=f"type_v {entry[0]} is a block type",
                )
            if v_trans:
                entries.append((entry[0], element, entry[1] // element))
            else:
                entries.append((entry[0], entry[1] * entry[2]))
        return replace(self, v_trans=v_trans, v=tuple(entries))


@dataclass(frozen=True)
class RecurrentSchema:
    """The recurrent state (``llama_memory_recurrent::state_write``).

    Parameters
    ----------
    n_layer : int
        All layers of the model, as the blob records it.
    r, s : tuple of (ggml_type, row_bytes)
        The convolution and the state rows; one entry for each *recurrent* layer. A row may have 0 bytes.
    """

    n_layer: int
    r: tuple[tuple[int, int], ...]
    s: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        """How errors call this part."""
        return "recurrent"

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of one cell's record in a sequence blob (no sequence ids)."""
        return 8

    @cached_property
    def record_dtype(self) -> np.dtype[Any]:
        """One cell's record in a sequence blob as a structured dtype."""
        return np.dtype([("pos", "<i4"), ("n_seq_id", "<u4")])

    @cached_property
    def preamble(self) -> bytes:
        """The two words between the cells and the layers: not transposed, number of layers."""
        return _TWO_U32.pack(0, self.n_layer)

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """The layers in the order of the blob: all R, then all S."""
        rows = [Tensor(_TYPE_ROW.pack(t, row), row, "R", i) for i, (t, row) in enumerate(self.r)]
        rows += [Tensor(_TYPE_ROW.pack(t, row), row, "S", i) for i, (t, row) in enumerate(self.s)]
        return tuple(rows)

    @cached_property
    def bytes_per_cell(self) -> int:
        """Bytes that one cell (one sequence's whole state) takes."""
        return self.record_bytes + sum(t.cell_bytes for t in self.tensors)

    @cached_property
    def fixed_bytes(self) -> int:
        """Bytes of this part that do not depend on the number of cells. They are there even without cells."""
        return 4 + len(self.preamble) + sum(len(t.header) for t in self.tensors)

    def sequence_bytes(self, n_cells: int) -> int:
        """Size of this part in a sequence blob of ``n_cells`` (0 or 1) cells."""
        return self.fixed_bytes + n_cells * self.bytes_per_cell


@dataclass(frozen=True)
class Schema:
    """The layout of every blob of one model in one context.

    Parameters
    ----------
    arch : str
        ``general.architecture``; a whole-context blob begins with it.
    parts : tuple of KVSchema and RecurrentSchema
        In the order of the blob: base, window, recurrent; those that there are.
    n_swa : int
        Width of the sliding window, 0 without one.
    swa_type : {"none", "standard", "chunked"}
        How the window slides; "none" when there is no window cache.
    m_rope : bool
        Cells carry 2-D positions that obey M-RoPE's rules.
    """

    arch: str
    parts: tuple[KVSchema | RecurrentSchema, ...]
    n_swa: int = 0
    swa_type: SwaType = "none"
    m_rope: bool = False

    @cached_property
    def kind(self) -> str:
        """One of "attention", "iswa", "recurrent", "hybrid" or "hybrid-iswa"."""
        names = tuple(part.name for part in self.parts)
        return _KINDS[names]

    @cached_property
    def has_partial(self) -> bool:
        """Whether ``PARTIAL_ONLY`` gives less than the whole sequence."""
        return self.kind in ("iswa", "hybrid", "hybrid-iswa")

    @cached_property
    def partial_parts(self) -> tuple[KVSchema | RecurrentSchema, ...]:
        """The parts that a ``PARTIAL_ONLY`` blob holds."""
        return self.parts[1:] if self.has_partial else self.parts

    def parts_of(self, partial: bool) -> tuple[KVSchema | RecurrentSchema, ...]:
        """The parts of a full or of a ``PARTIAL_ONLY`` blob."""
        return self.partial_parts if partial else self.parts

    @cached_property
    def n_stream(self) -> int:
        """Streams of the attention caches; 1 where there are none."""
        return next((p.n_stream for p in self.parts if isinstance(p, KVSchema)), 1)

    @cached_property
    def v_trans(self) -> bool:
        """Whether V is stored transposed; False where there is no attention cache."""
        return any(p.v_trans for p in self.parts if isinstance(p, KVSchema))

    @cached_property
    def bytes_per_token(self) -> int:
        """Bytes one more token adds to a sequence blob while every attention cache still keeps it."""
        return sum(p.bytes_per_cell for p in self.parts if isinstance(p, KVSchema))

    def window_start(self, pos: int) -> int:
        """First position that the token at ``pos`` can see through the window (``llama_hparams::is_masked_swa``)."""
        if self.swa_type == "standard":
            return max(0, pos - self.n_swa + 1)
        if self.swa_type == "chunked":
            return pos // self.n_swa * self.n_swa
        return 0

    def with_v_trans(self, v_trans: bool) -> Schema:
        """The layout of the same model with flash attention off (True) or on (False)."""
        return replace(self, parts=tuple(p.with_v_trans(v_trans) if isinstance(p, KVSchema) else p for p in self.parts))

    def with_n_stream(self, n_stream: int) -> Schema:
        """The layout of the same model with another number of streams (1: unified)."""
        if not 1 <= n_stream <= MAX_SEQ:
            raise ValueError(f"n_stream must be in [1, {MAX_SEQ}], not {n_stream}")
        parts = (replace(p, n_stream=n_stream) if isinstance(p, KVSchema) else p for p in self.parts)
        return replace(self, parts=tuple(parts))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types; :meth:`from_dict` gives an equal schema back."""
        parts: list[dict[str, Any]] = []
        for p in self.parts:
            if isinstance(p, KVSchema):
                parts.append(
                    {
                        "role": p.role,
                        "n_stream": p.n_stream,
                        "has_ext": p.has_ext,
                        "v_trans": p.v_trans,
                        "k": [list(e) for e in p.k],
                        "v": [list(e) for e in p.v],
                    }
                )
            else:
                parts.append(
                    {
                        "role": "recurrent",
                        "n_layer": p.n_layer,
                        "r": [list(e) for e in p.r],
                        "s": [list(e) for e in p.s],
                    }
                )
        return {
            "arch": self.arch,
            "n_swa": self.n_swa,
            "swa_type": self.swa_type,
            "m_rope": self.m_rope,
            "parts": parts,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Schema:
        """The schema that :meth:`to_dict` was called on."""
        parts: list[KVSchema | RecurrentSchema] = []
        for p in data["parts"]:
            if p["role"] == "recurrent":
                parts.append(RecurrentSchema(p["n_layer"], _pairs(p["r"]), _pairs(p["s"])))
            else:
                v = tuple(tuple(int(x) for x in e) for e in p["v"])
                parts.append(KVSchema(p["role"], p["n_stream"], p["has_ext"], p["v_trans"], _pairs(p["k"]), v))
        return cls(data["arch"], tuple(parts), data["n_swa"], data["swa_type"], data["m_rope"])

    def digest(self) -> str:
        """SHA-256 (hex) over :meth:`to_dict` as canonical JSON: equal exactly for equal schemas, on every machine."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _pairs(entries: list[list[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((int(a), int(b)) for a, b in entries)


_KINDS = {
    ("base",): "attention",
    ("base", "window"): "iswa",
    ("recurrent",): "recurrent",
    ("base", "recurrent"): "hybrid",
    ("base", "window", "recurrent"): "hybrid-iswa",
}


class Limits(NamedTuple):
    """What the context that a blob is meant for can hold.

    Parameters
    ----------
    n_seq_max : int
        Sequences of the context; a whole-context blob may name no other.
    base_cells, window_cells : int
        Cells of one stream of each cache (``window_cells`` is not looked at without a window cache).
    n_vocab : int
        Token ids in cells lie in ``[-1, n_vocab)``.
    """

    n_seq_max: int
    base_cells: int
    window_cells: int
    n_vocab: int
