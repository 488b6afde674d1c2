r"""State blobs of llama.cpp: what is inside, whether it may be restored, and how to cut and join it.

Nothing here touches llama.cpp; bytes go in, and structure, errors or bytes come out. All numbers are little-endian. ::

    sequence blob      u32 0xaf143cd8 · i32 seq_id · part …             (GGSQ files: without these two words)
    whole context      u32 length · architecture · part …
    session file       u32 magic · u32 version · u32 n_tokens · i32 token … · state

    memory             parts                                        PARTIAL_ONLY
    attention          KV(base)                                     the same
    iswa               KV(base) · KV(window)                        KV(window)
    recurrent          RS                                           the same
    hybrid             KV(base) · RS                                RS
    hybrid-iswa        KV(base) · KV(window) · RS                   KV(window) · RS

    KV                 u32 n_stream · stream × n_stream             (one stream if unified, else one a sequence)
      stream           u32 n_cells, and if that is not 0:
        cell × n       i32 pos · u32 n_seq_id · [i32 x · i32 y · i32 token] · i32 seq_id × n_seq_id
        preamble       u32 v_trans · u32 n_layer
        K per layer    i32 type · u64 row_bytes · row × n
        V per layer    i32 type · u64 row_bytes · row × n                          flash attention on
                       i32 type · u32 element_bytes · u32 n_embd_v · element[n_embd_v][n]      off (v_trans)
    RS                 u32 n_cells · cell × n (i32 pos · u32 n_seq_id · i32 seq_id × n_seq_id)
                       u32 s_trans (0) · u32 n_layer (all layers)
      R, then S        i32 type · u64 row_bytes · row × n           one each for every recurrent layer

An ``ON_DEVICE`` blob is the same without rows. The cells of a stream stand in the order of the cache's cells, which
need not be the order of their positions.

=================  ====================================================================================================
`schema`           what is fixed for one model in one context; tables of the headers to expect
`infer`            learning a schema from one small blob
`walk`             where everything is; the one pass over a blob that the two below share
`positions`        what the positions of a sequence must be like
`validate`         whether a blob may be restored
`structure`        one sequence as arrays, without copying; slice, convert, write
`pieces`           joining pieces of a sequence
`whole`            a whole context as arrays; take one sequence out of it
`files`            the front of session files
=================  ====================================================================================================
"""

from llamastate.layout.files import MAGIC, VERSION, FileHeader, header_bytes, read_header
from llamastate.layout.infer import infer_schema
from llamastate.layout.pieces import compose
from llamastate.layout.schema import KVSchema, Limits, RecurrentSchema, Schema, Tensor
from llamastate.layout.structure import (
    KVPart,
    RecurrentPart,
    SequenceState,
    parse_sequence,
)
from llamastate.layout.validate import ContextInfo, SequenceInfo, validate_context, validate_sequence
from llamastate.layout.walk import SEQUENCE_MAGIC
from llamastate.layout.whole import ContextState, StreamPart, parse_context

__all__ = [
    "MAGIC",
    "SEQUENCE_MAGIC",
    "VERSION",
    "ContextInfo",
    "ContextState",
    "FileHeader",
    "KVPart",
    "KVSchema",
    "Limits",
    "RecurrentPart",
    "RecurrentSchema",
    "Schema",
    "SequenceInfo",
    "SequenceState",
    "StreamPart",
    "Tensor",
    "compose",
    "header_bytes",
    "infer_schema",
    "parse_context",
    "parse_sequence",
    "read_header",
    "validate_context",
    "validate_sequence",
]
