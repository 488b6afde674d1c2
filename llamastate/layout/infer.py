"""Learning a model's layout from one small blob.

llama.cpp tells nobody which caches a context has, so the first blob of a context has to. The probe is read once for
each arrangement of parts that the model's properties allow, the natural one first, and the first arrangement that
accounts for every byte is the layout. A memory with parts of another kind (an indexer's cache, a compressed cache)
fits none of them and is refused rather than guessed.
"""

from __future__ import annotations

from collections.abc import Iterator

from llamastate.errors import CorruptStateError, UnsupportedLayoutError
from llamastate.layout.cursor import Cursor, byte_view
from llamastate.layout.schema import GGML_SCALARS, MAX_SEQ, KVSchema, RecurrentSchema, Schema, SwaType
from llamastate.layout.walk import SEQUENCE_MAGIC, read_cells

__all__ = ["identify", "infer_schema"]

# Bytes of a block of the block types that KV may have: q4_0, q4_1, q5_0, q5_1, q8_0, iq4_nl.
_BLOCK_BYTES = {2: 18, 3: 20, 6: 22, 7: 24, 8: 34, 20: 18}
_MAX_LAYERS = 4096

# Their second attention cache may be an indexer's, whose bytes look just like a window's.
_INDEXER_ARCHS = frozenset({"minimax-m3", "glm-dsa", "deepseek32", "hy_v4", "dots3note", "deepseek4", "glm5-next"})

_ATTENTION = ("base",)
_ISWA = ("base", "window")
_RECURRENT = ("recurrent",)
_HYBRID = ("base", "recurrent")
_HYBRID_ISWA = ("base", "window", "recurrent")


def infer_schema(
    probe: object, *, arch: str, recurrent: bool, hybrid: bool, n_swa: int, swa_type: str, m_rope: bool
) -> Schema:
    """Learn the layout of a context's state from a sequence blob of a few tokens.

    Parameters
    ----------
    probe : buffer
        A blob of ``llama_state_seq_get_data_ext`` with flags 0 (with its 0xaf143cd8 header) of a sequence that holds
        at least one token, all of them inside the sliding window.
    arch : str
        ``general.architecture``.
    recurrent, hybrid : bool
        ``llama_model_is_recurrent``, ``llama_model_is_hybrid``.
    n_swa : int
        ``llama_model_n_swa``.
    swa_type : {"none", "standard", "chunked"}
        How the window slides ("chunked" for llama4).
    m_rope : bool
        The model's RoPE type is M-RoPE, so cells carry 2-D positions.

    Returns
    -------
    Schema
        One that ``probe`` satisfies to the last byte.

    Raises
    ------
    UnsupportedLayoutError
        No known arrangement of parts accounts for every byte, or the window slides in another way.
    """
    view = byte_view(probe)
    if swa_type not in ("none", "standard", "chunked"):
        raise UnsupportedLayoutError(
            f"a {swa_type!r} window cannot be checked", arch=arch, kind=swa_type, reason="the window looks ahead"
        )
    windowed = n_swa > 0 and swa_type != "none"
    kinds: tuple[tuple[str, ...], ...]
    if hybrid:
        # A hybrid's draft head (MTP) runs on a plain cache.
        kinds = (_HYBRID_ISWA, _HYBRID, _ATTENTION) if windowed else (_HYBRID, _ATTENTION)
    elif recurrent:
        kinds = (_RECURRENT,)
    else:
        kinds = (_ISWA, _ATTENTION) if windowed else (_ATTENTION,)
    for kind in kinds:
        for parts in _readings(view, kind, (m_rope, not m_rope), header=True):
            has_window = "window" in kind
            if has_window and arch in _INDEXER_ARCHS:
                continue
            ext = any(isinstance(p, KVSchema) and p.has_ext for p in parts)
            slides: SwaType = ("chunked" if swa_type == "chunked" else "standard") if has_window else "none"
            return Schema(arch, parts, n_swa, slides, m_rope and ext)
    raise UnsupportedLayoutError(
        f"the state of this {arch!r} model has a layout that is not known here",
        arch=arch,
        kind="/".join("+".join(kind) for kind in kinds),
        reason=f"no known arrangement of caches accounts for the {len(view)} bytes of its state",
    )


def identify(view: memoryview, *, header: bool = True) -> tuple[KVSchema | RecurrentSchema, ...] | None:
    """The parts of a sequence blob of any model, if one arrangement accounts for every byte of it.

    Only used to tell a foreign blob from a damaged one, after it has already been refused.
    """
    for kind in (_ATTENTION, _ISWA, _HYBRID, _HYBRID_ISWA, _RECURRENT):
        for parts in _readings(view, kind, (False, True), header=header):
            return parts
    return None


def _readings(
    view: memoryview, kind: tuple[str, ...], exts: tuple[bool, ...], *, header: bool
) -> Iterator[tuple[KVSchema | RecurrentSchema, ...]]:
    """Each way to read ``view`` as these parts, with or without cell extras and with or without V (MLA has none)."""
    attention = kind != _RECURRENT
    for has_ext in exts if attention else (False,):
        for has_v in (True, False) if attention else (True,):
            try:
                cursor = Cursor(view)
                if header and cursor.u32("header.magic") != SEQUENCE_MAGIC:
                    return
                if header:
                    cursor.i32("header.seq_id")
                parts: list[KVSchema | RecurrentSchema] = []
                for role in kind:
                    if role == "recurrent":
                        parts.append(_read_recurrent(cursor))
                    else:
                        parts.append(_read_kv(cursor, role, has_ext, has_v))
            except CorruptStateError:
                continue
            if cursor.at == cursor.size and _one_memory(parts):
                yield tuple(parts)


def _one_memory(parts: list[KVSchema | RecurrentSchema]) -> bool:
    """The attention caches of one context agree on streams and on the way V is stored, and have layers together."""
    caches = [p for p in parts if isinstance(p, KVSchema)]
    if not caches:
        return True
    return len({(p.n_stream, p.v_trans) for p in caches}) == 1 and any(p.k for p in caches)


def _read_kv(cursor: Cursor, role: str, has_ext: bool, has_v: bool) -> KVSchema:
    """One attention cache of unknown dimensions."""
    n_stream = cursor.u32("n_stream")
    if not 1 <= n_stream <= MAX_SEQ:
        cursor.fail("n_stream", "not a number of streams")
    found: KVSchema | None = None
    for _ in range(n_stream):
        n_cells = cursor.u32("n_cells")
        if not n_cells:
            continue
        if found is not None:
            cursor.fail("n_cells", "a second stream with cells")
        cells = read_cells(cursor, n_cells, has_ext, 1, "cells")
        if int(cells.pos.min()) < 0 or int(cells.ids.min()) < 0 or int(cells.ids.max()) >= MAX_SEQ:
            cursor.fail("cells", "not cells")
        v_trans = cursor.u32("v_trans")
        n_layer = cursor.u32("n_layer")
        # One of two caches may have no layer at all: where every attention layer slides, the base cache is empty.
        if v_trans > 1 or n_layer > _MAX_LAYERS:
            cursor.fail("preamble", "not a preamble")
        k = tuple(_read_rows(cursor, n_cells) for _ in range(n_layer))
        v: tuple[tuple[int, ...], ...] = ()
        if has_v:
            read = _read_columns if v_trans else _read_rows
            v = tuple(read(cursor, n_cells) for _ in range(n_layer))
        found = KVSchema("window" if role == "window" else "base", n_stream, has_ext, bool(v_trans), k, v)
    if found is None:
        cursor.fail("n_cells", "no cells to learn from")
    return found


def _read_recurrent(cursor: Cursor) -> RecurrentSchema:
    """The recurrent state of unknown dimensions. It is always the last part, so its layers go on to the end."""
    if cursor.u32("n_cells") != 1:
        cursor.fail("n_cells", "a sequence has one recurrent cell")
    if int(read_cells(cursor, 1, False, 0, "cells").pos[0]) < 0:
        cursor.fail("cells", "not a cell")
    s_trans = cursor.u32("s_trans")
    n_layer = cursor.u32("n_layer")
    if s_trans or not 1 <= n_layer <= _MAX_LAYERS:
        cursor.fail("preamble", "not a preamble")
    entries: list[tuple[int, int]] = []
    while cursor.at < cursor.size and len(entries) <= 2 * n_layer:
        entries.append(_read_rows(cursor, 1, empty=True))
    half = len(entries) // 2
    if not entries or len(entries) % 2 or half > n_layer:
        cursor.fail("layers", "R and S rows do not pair up")
    return RecurrentSchema(n_layer, tuple(entries[:half]), tuple(entries[half:]))


def _read_rows(cursor: Cursor, n_cells: int, *, empty: bool = False) -> tuple[int, int]:
    ggml_type = cursor.i32("type")
    row = cursor.u64("row")
    unit = GGML_SCALARS.get(ggml_type) or _BLOCK_BYTES.get(ggml_type)
    if unit is None or row % unit or not (row or empty):
        cursor.fail("row", "not a row")
    cursor.claim(n_cells * row, "rows")
    return ggml_type, row


def _read_columns(cursor: Cursor, n_cells: int) -> tuple[int, int, int]:
    ggml_type = cursor.i32("type")
    element = cursor.u32("element")
    n_embd = cursor.u32("n_embd")
    unit = GGML_SCALARS.get(ggml_type) or _BLOCK_BYTES.get(ggml_type)
    if element != unit or not n_embd:
        cursor.fail("columns", "not columns")
    cursor.claim(n_cells * element * n_embd, "columns")
    return ggml_type, element, n_embd
