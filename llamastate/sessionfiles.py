"""llama.cpp's own session files as sessions: those of llama-cli, of llama-server's slots, of llama-cpp-python.

A GGSN file is a whole context's state, a GGSQ file one sequence's. Both have tokens in front; llama-server packs them
(``server_tokens::serialize``, little-endian words)::

    i32 -1    u32 version (1)    u32 n    i32 token × n    u32 n_media    u32 index × n_media
    media chunk × n_media: u32 n_bytes, bytes    zeros to a multiple of four bytes
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llamastate import layout, restore
from llamastate._native import state
from llamastate.arrays import Int32Array
from llamastate.errors import (
    CorruptStateError,
    InvalidArgumentError,
    LoadError,
    MediaTokensError,
    TokensMismatchError,
    VersionMismatchError,
)
from llamastate.flags import SeqFlags
from llamastate.layout.schema import KVSchema
from llamastate.layout.walk import Cells
from llamastate.state import SEQ_HEADER
from llamastate.statefiles import MappedFile, naming, save
from llamastate.words import brief

if TYPE_CHECKING:
    from llamastate.context import Context

__all__ = ["FORMATS", "load_file", "pack_tokens", "save_file", "unpack_tokens"]

#: What :func:`save_file` writes: one sequence, the same with llama-server's payload, a whole context.
FORMATS = ("ggsq", "ggsq-packed", "ggsn")

_PACKED = -1  # LLAMA_TOKEN_NULL
_PACKED_VERSION = 1  # SERVER_TOKENS_STATE_VERSION
_WORD = struct.Struct("<I")


def pack_tokens(tokens: npt.ArrayLike) -> Int32Array:
    """Token ids as llama-server stores them.

    Parameters
    ----------
    tokens : int32[n]

    Returns
    -------
    int32[n + 4]
    """
    ids = np.asarray(tokens, np.int32)
    front = np.array([_PACKED, _PACKED_VERSION, len(ids)], np.int32)
    return np.concatenate([front, ids, np.zeros(1, np.int32)])


def unpack_tokens(payload: npt.ArrayLike) -> Int32Array:
    """The token ids in the front of a session file, packed by llama-server or plain.

    Parameters
    ----------
    payload : int32[n]

    Returns
    -------
    int32[m]
        A copy.

    Raises
    ------
    MediaTokensError
        There are images or audio among them.
    VersionMismatchError
        Packed by a newer llama-server.
    CorruptStateError
        It contradicts itself.
    """
    words = np.array(payload, np.int32)
    if not len(words) or words[0] != _PACKED:
        return words
    if len(words) < 4:
        raise _corrupt(f"a packed payload of {len(words)} words")
    version, n = (int(w) for w in words[1:3].view(np.uint32))
    if version != _PACKED_VERSION:
        raise VersionMismatchError(
            f"tokens packed in version {version}; this package reads version {_PACKED_VERSION}",
            reason="packed tokens",
            expected=_PACKED_VERSION,
            found=version,
        )
    if n > len(words) - 4:
        raise _corrupt(f"{n} packed tokens are claimed, {len(words) - 4} words follow")
    n_media = int(words[3 + n : 4 + n].view(np.uint32)[0])
    if n_media:
        _check_media(words[4 + n :].tobytes(), n_media)
        raise MediaTokensError(
            f"{n_media} images or pieces of audio are among the tokens: only llama-server with the same projector can "
            "restore them",
            reason="media among the tokens",
            n_chunks=n_media,
        )
    if len(words) > 4 + n:
        raise _corrupt(f"{len(words) - 4 - n} words follow the packed tokens")
    return words[3 : 3 + n].copy()


def _check_media(data: bytes, n_media: int) -> None:
    at = 4 * n_media
    for i in range(n_media):
        if at + 4 > len(data) or at + 4 + _WORD.unpack_from(data, at)[0] > len(data):
            raise _corrupt(f"media chunk {i} of {n_media} does not end")
        at += 4 + _WORD.unpack_from(data, at)[0]
    if len(data) - at >= 4:
        raise _corrupt(f"{len(data) - at} bytes follow the media chunks")


def load_file(ctx: Context, path: str | os.PathLike[str], seq_id: int) -> Int32Array:
    """Make a sequence hold what a session file holds, in place of what it held; its tokens.

    Raises
    ------
    LoadError
        One of its subclasses says why; the sequence, and all others, are as they were.
    TokensMismatchError
        The state is not of the tokens beside it; likewise.
    """
    with MappedFile(path) as file, naming(path):
        head = layout.read_header(file.view)
        tokens = unpack_tokens(head.tokens)
        _check_ids(tokens, ctx.model.n_vocab)
        with ctx._handle as handle:
            state.check(handle, seq_id, SeqFlags.NONE)
            if head.kind == "context":
                blob = _only_sequence(file.view[head.state_offset :], ctx.schema)
            else:
                # in our own copy of the page: what llama.cpp takes has two words in front that the file does not have
                start = head.state_offset - SEQ_HEADER
                struct.pack_into("<Ii", file.view, start, layout.SEQUENCE_MAGIC, 0)
                blob = file.view[start:]
            info = layout.validate_sequence(blob[SEQ_HEADER:], ctx.schema, ctx.limits, header=False)
            n = len(tokens)
            whole = info.pos_max == n - 1 and (
                ctx.schema.kind == "recurrent" or not n or (info.first_pos == 0 and info.n_cells == n)
            )
            if not whole:
                raise TokensMismatchError(
                    f"{os.fsdecode(path)}: {n} tokens beside a state of positions {info.first_pos} to {info.pos_max}",
                    n_tokens=n,
                    pos_min=info.first_pos,
                    pos_max=info.pos_max,
                )
            restore.replace_sequence(ctx, blob, info, seq_id, SeqFlags.NONE, partial=False)
        return tokens


def save_file(ctx: Context, path: str | os.PathLike[str], seq_id: int, tokens: Int32Array, format: str) -> int:  # noqa: A002
    """Write a sequence to a file that llama.cpp reads, atomically and durably; how many bytes."""
    if format not in FORMATS:
        raise InvalidArgumentError(f"format = {brief(format)} is none of {FORMATS}", name="format", value=format)
    if format != "ggsn":
        ids = pack_tokens(tokens) if format == "ggsq-packed" else tokens
        header = np.frombuffer(layout.header_bytes("sequence", ids), np.uint8)
        blob = ctx.state_seq_get_data(seq_id)[SEQ_HEADER:]
    else:
        header = np.frombuffer(layout.header_bytes("context", tokens), np.uint8)
        blob = np.frombuffer(_as_context(ctx.state_seq_get_data(seq_id), ctx.schema), np.uint8)
    return save(path, np.concatenate([header, blob]))


def _only_sequence(view: memoryview, schema: layout.Schema) -> memoryview:
    """The state of the one sequence that a context's state holds."""
    context = layout.parse_context(view, schema)
    found = context.seq_ids
    if len(found) > 1:
        raise LoadError(f"the file holds {len(found)} sequences, not one", reason="several sequences")
    return memoryview(context.extract(found[0] if found else 0).to_bytes())


def _as_context(blob: npt.NDArray[np.uint8], schema: layout.Schema) -> bytes:
    """The state of a context that has just this sequence, as sequence 0."""
    parts = []
    for part in layout.parse_sequence(blob, schema).parts:
        n = part.n_cells
        if isinstance(part.schema, KVSchema):
            records = part.cells.copy()
            records["seq_id"] = 0
        else:
            # in a sequence's own blob the recurrent cell has no owner; in a context's it has
            records = np.zeros(n, np.dtype([("pos", "<i4"), ("n_seq_id", "<u4"), ("seq_id", "<i4")]))
            records["pos"], records["n_seq_id"] = part.pos, 1
        zeros = np.zeros(n, np.int32)
        cells = Cells(0, records.nbytes, np.asarray(part.pos), None, zeros + 1, zeros)
        stream = layout.StreamPart(part.schema, 0, cells, np.frombuffer(records.tobytes(), np.uint8), part.tensors())
        parts.append((stream,) if n or not isinstance(part.schema, KVSchema) else ())
    return layout.ContextState(schema, schema.arch, tuple(parts)).to_bytes()


def _check_ids(tokens: Int32Array, n_vocab: int) -> None:
    outside = (tokens < 0) | (tokens >= n_vocab)
    if outside.any():
        index = int(np.argmax(outside))
        raise _corrupt(f"token {index} is {int(tokens[index])}, not in [0, {n_vocab})")


def _corrupt(reason: str) -> CorruptStateError:
    return CorruptStateError(f"corrupt session file: {reason}", reason=reason, offset=12, section="tokens")
