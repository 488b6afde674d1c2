"""Images of snapshots made by hand: what they hold depends on no model and no floating point."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from llamastate import snapfile
from llamastate.fingerprint import FINGERPRINT_VERSION, Fingerprint
from llamastate.snapfile import Kind

FINGERPRINT = Fingerprint(
    version=FINGERPRINT_VERSION,
    architecture="llama",
    weights="ab" * 32,
    overrides="",
    adapters=(("cd" * 32, 0.5),),
    rope_scaling="linear",
    rope_freq_base=10000.0,
    rope_freq_scale=1.0,
    yarn_ext_factor=0.0,
    yarn_attn_factor=1.0,
    yarn_beta_fast=None,
    yarn_beta_slow=None,
    yarn_orig_ctx=None,
    rope_factors="",
    state_version=3,
    type_k="f16",
    type_v="q8_0",
    v_trans=False,
    n_streams=1,
    layout="ef" * 32,
)
TOKENS = np.arange(7, dtype="<i4") * 3
STATE = (np.arange(1000) * 7 % 251).astype(np.uint8)
LOGITS = np.arange(16, dtype="<f4") / 8
ROWS = [
    {"created": 1700000000000000000, "flags": 2, "label": "first", "n_tokens": 3},
    {"created": 0.5, "flags": 1, "label": None, "n_tokens": 7},
]


def minimal() -> list[tuple[int, int, Any]]:
    """Sections as (kind, detail, bytes): what there must be."""
    return [(Kind.FINGERPRINT, 0, FINGERPRINT.json), (Kind.TOKENS, 0, TOKENS), (Kind.STATE, 0, STATE)]


def full() -> list[tuple[int, int, Any]]:
    """All that there can be."""
    fingerprint, tokens, state = minimal()
    return [
        fingerprint,
        tokens,
        (Kind.LOGITS, 0, LOGITS),
        (Kind.SAMPLER, 0, b'{"seed":7}'),
        (Kind.METADATA, 0, '{"title":"ünïcode"}'.encode()),
        (Kind.CHECKPOINTS, 0, json.dumps(ROWS, separators=(",", ":")).encode()),
        (Kind.CHECKPOINT_STATE, 0, STATE[:100]),
        (Kind.CHECKPOINT_LOGITS, 0, LOGITS),
        (Kind.CHECKPOINT_STATE, 1, STATE[:33]),
        state,
    ]


def build(items: list[tuple[int, int, Any]]) -> bytearray:
    """A sealed image."""
    sections = snapfile.lay_out([(kind, detail, memoryview(data).nbytes) for kind, detail, data in items])
    image = bytearray(sections[-1].offset + sections[-1].length)
    for section, (_, _, data) in zip(sections, items, strict=True):
        image[section.offset : section.offset + section.length] = memoryview(data).cast("B")
    with memoryview(image) as view:
        snapfile.seal(view, sections)
    return image


def reseal(image: bytearray) -> bytearray:
    """Make the checksums of header and table right again, as somebody would who means harm."""
    n_sections = int.from_bytes(image[12:16], "little")
    image[32:48] = snapfile.checksum(image[64 : 64 + 48 * n_sections])
    image[48:64] = snapfile.checksum(image[:48])
    return image
