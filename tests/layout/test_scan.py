"""The short way through validation finds what the long way finds, or leaves the blob to it."""

from __future__ import annotations

import random

import pytest

from llamastate.errors import LlamaStateError
from llamastate.layout import Limits, validate, validate_sequence
from tests.layout.fields import sequence_fields
from tests.layout.native import NAMES, tokens


def outcome(blob, schema, limits, *, header=True):
    try:
        return validate_sequence(blob, schema, limits, header=header)
    except LlamaStateError as error:
        return type(error), str(error)


@pytest.fixture
def both(monkeypatch):
    """Validate in both ways; the outcome, and whether the short way was enough."""

    def run(blob, schema, limits, **options):
        taken = []
        with monkeypatch.context() as patch:
            short = validate._usual
            patch.setattr(validate, "_usual", lambda *args: taken.append(short(*args)) or taken[-1])
            found = outcome(blob, schema, limits, **options)
            patch.setattr(validate, "_usual", lambda *args: None)
            assert outcome(blob, schema, limits, **options) == found
        return found, taken[-1] is not None

    return run


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flash", [True, False])
def test_sound_blobs(native, both, name, flash):
    context = native(name, flash=flash, n_seq_max=2, unified=True)
    schema = context.schema()
    limits = Limits(2, 256, 256, 1000)
    both(context.get(), schema, limits)
    context.decode(tokens(6))
    blob = context.get()
    usual = len(schema.parts) == 1 and schema.kind == "attention" and not schema.m_rope
    assert both(blob, schema, limits)[1] == usual
    assert both(blob[8:], schema, limits, header=False)[1] == usual
    assert not both(blob, schema, Limits(2, 5, 5, 1000))[1]
    for end in (*range(120), *range(120, len(blob), 101), len(blob) - 1):
        assert not both(blob[:end], schema, limits)[1]


def test_damaged_blobs(native, both):
    context = native("dense", flash=True, n_seq_max=2, unified=True)
    schema, limits = context.schema(), Limits(2, 256, 256, 1000)
    context.decode(tokens(6))
    blob = context.get()
    for field in sequence_fields(blob, schema, partial=False):
        if field.name == "data":
            continue
        for at in range(field.start, field.end):
            for bit in range(8):
                damaged = bytearray(blob)
                damaged[at] ^= 1 << bit
                both(damaged, schema, limits)
    rng = random.Random(1)
    words = [0, 1, 2, 255, 256, 2**31 - 8, 2**31 - 1, 2**31, 2**32 - 1]
    for _ in range(3000):
        damaged = bytearray(blob)
        at = 4 * rng.randrange(24)
        damaged[at : at + 4] = rng.choice(words).to_bytes(4, "little")
        both(damaged, schema, limits)


@pytest.mark.parametrize("first", [0, 5, 2**31 - 8, 2**31 - 7, 2**31 - 6, 2**31 - 1, 2**31, 2**32 - 6, 2**32 - 1])
def test_runs_of_positions(native, both, first):
    context = native("dense", flash=True, n_seq_max=2, unified=True)
    schema, limits = context.schema(), Limits(2, 256, 256, 1000)
    context.decode(tokens(6))
    blob = bytearray(context.get())
    for i in range(6):
        at = 16 + 12 * i
        blob[at : at + 4] = ((first + i) % 2**32).to_bytes(4, "little")
    both(blob, schema, limits)
