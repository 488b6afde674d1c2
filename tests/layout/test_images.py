"""M-RoPE: the cells of an image share one position and form a rectangle of 2-D positions."""

from __future__ import annotations

import numpy as np
import pytest

from llamastate.errors import CorruptStateError
from llamastate.layout import Limits, compose, parse_context, parse_sequence, validate_context, validate_sequence
from tests.layout.native import N_VOCAB, Native, tokens


def with_image(context, width=5, height=3):
    """Text, an image, text: the image stands at position 10, the text after it begins at 10 + max(width, height)."""
    context.decode(tokens(10))
    context.decode_image(width, height)
    after = 10 + max(width, height)
    for i in range(4):
        context.decode_at(20 + i, after + i)
    return after + 3


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("name", ["qwen2vl", "qwen35"])
def test_images(native, name, flash):
    context = native(name, flash=flash)
    schema = context.schema()
    for width, height in ((5, 3), (3, 5), (4, 4), (1, 1), (1, 6), (6, 1)):
        context.clear()
        last = with_image(context, width, height)
        blob = context.get()
        info = validate_sequence(blob, schema, context.limits)
        assert (info.n_cells, info.pos_max) == (14 + width * height, last)
        assert validate_context(context.get_all(), schema, context.limits).sequences == {0: context.span(0)}
        state = parse_sequence(blob, schema)
        assert state.to_bytes() == blob
        assert parse_context(context.get_all(), schema).extract(0).to_bytes() == blob
        assert state.base is not None
        inside = state.base.cells[10 : 10 + width * height]
        assert (inside["pos"] == 10).all()
        if (width, height) != (1, 1):
            assert (inside["token"] == -1).all()
        if name == "qwen2vl":
            joined = compose([state.slice(10), state.slice(0, 10)])
            assert joined.to_bytes() == blob
            with Native(name, flash=flash) as fresh:
                data = joined.to_bytes()
                assert fresh.set(data) == len(data)
                assert np.array_equal(fresh.decode_at(9, last + 1), context.decode_at(9, last + 1))


def test_an_image_at_the_end(native):
    context = native("qwen2vl")
    schema = context.schema()
    context.decode(tokens(10))
    context.decode_image(4, 2)
    info = validate_sequence(context.get(), schema, context.limits)
    assert (info.pos_min, info.pos_max, info.n_cells) == (0, 10, 18)


@pytest.mark.parametrize(
    ("name", "rows", "change", "said"),
    [
        ("x", 12, 40, "rectangle"),
        ("y", 12, 11, "rectangle"),
        ("x", 3, 9, "rectangle"),
        ("y", 3, -1, "negative"),
        ("pos", 12, 11, "rectangle"),
        ("pos", 25, 10, "rectangle"),
        ("pos", slice(25, 29), np.array([16, 17, 18, 19]), r"rectangle|follow"),
        ("token", 3, N_VOCAB, "token"),
        ("token", 3, -2, "token"),
    ],
)
def test_cells_that_are_no_image(native, name, rows, change, said):
    context = native("qwen2vl")
    schema = context.schema()
    with_image(context)
    data = np.frombuffer(context.get(), np.uint8).copy()
    cells = data[16 : 16 + 29 * 24].view(parse_sequence(data, schema).base.cells.dtype)
    cells[name][rows] = change
    with pytest.raises(CorruptStateError, match=said) as caught:
        validate_sequence(data, schema, context.limits)
    assert caught.value.section == "base.cells"
    assert caught.value.offset == 16


def test_gap_after_an_image(native):
    context = native("qwen2vl")
    schema = context.schema()
    context.decode(tokens(10))
    context.decode_image(4, 2)
    context.decode_at(5, 20)
    with pytest.raises(CorruptStateError, match="positions 10 and 20 do not follow"):
        validate_sequence(context.get(), schema, context.limits)


def test_token_ids_in_cells(native):
    context = native("qwen2vl")
    schema = context.schema()
    context.decode([200, 201])
    with pytest.raises(CorruptStateError, match="token 200 is not in"):
        validate_sequence(context.get(), schema, Limits(1, 100, 100, 200))
