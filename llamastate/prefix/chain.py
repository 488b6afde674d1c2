"""Names of prefixes: a hash over the model's fingerprint and every token so far.

::

    root       = H("llamastate prefix 1" · fingerprint · u32 block_tokens)
    key[0]     = root
    key[i]     = H("block"  · key[i-1] · tokens of block i)         after i whole blocks
    anchor key = H("anchor" · key[i] · tokens after block i)        for a state after any number of tokens

H is BLAKE2b-256; tokens are int32, little-endian. Equal keys mean equal fingerprints and equal tokens from the very
beginning. What is stored under a key is compared with the tokens asked for all the same.
"""

from __future__ import annotations

import dataclasses
import struct
from hashlib import blake2b

from llamastate.arrays import Int32Array
from llamastate.fingerprint import Fingerprint
from llamastate.layout import Schema

__all__ = ["KEY_BYTES", "anchor_key", "block_keys", "pin_name", "portable", "root_key"]

KEY_BYTES = 32

_ROOT = b"llamastate prefix 1"


def portable(fingerprint: Fingerprint, schema: Schema) -> Fingerprint:
    """The fingerprint with a unified cache: how many streams there are changes no row, so blocks are shared."""
    if fingerprint.n_streams == 1:
        return fingerprint
    return dataclasses.replace(fingerprint, n_streams=1, layout=schema.with_n_stream(1).digest())


def root_key(fingerprint: Fingerprint, block_tokens: int) -> bytes:
    """The key of the empty prefix: where all chains of one model and one size of blocks begin."""
    digest = bytes.fromhex(fingerprint.digest)
    return blake2b(_ROOT + digest + struct.pack("<I", block_tokens), digest_size=KEY_BYTES).digest()


def block_keys(root: bytes, tokens: Int32Array, block_tokens: int) -> list[bytes]:
    """Keys after 0, 1, 2, … whole blocks.

    Parameters
    ----------
    root : bytes
        Of :func:`root_key`.
    tokens : int32[n]
    block_tokens : int

    Returns
    -------
    list of bytes
        ``n // block_tokens + 1`` keys; the first is ``root``.

    Notes
    -----
    About 1 µs a block.
    """
    data = tokens.astype("<i4", copy=False).tobytes()
    step = 4 * block_tokens
    keys = [root]
    for at in range(0, len(data) - step + 1, step):
        keys.append(blake2b(b"block" + keys[-1] + data[at : at + step], digest_size=KEY_BYTES).digest())
    return keys


def anchor_key(parent: bytes, tail: Int32Array) -> bytes:
    """The key of a state ``len(tail)`` tokens after the block that ``parent`` names."""
    return blake2b(b"anchor" + parent + tail.astype("<i4", copy=False).tobytes(), digest_size=KEY_BYTES).digest()


def pin_name(root: bytes, tokens: Int32Array) -> bytes:
    """What a pin of these very tokens is called."""
    return blake2b(b"pin" + root + tokens.astype("<i4", copy=False).tobytes(), digest_size=KEY_BYTES).digest()
