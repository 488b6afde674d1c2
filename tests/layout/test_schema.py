"""Learning a layout from a probe, and keeping it."""

from __future__ import annotations

import dataclasses
import json
import struct

import pytest

from llamastate.errors import UnsupportedLayoutError
from llamastate.layout import KVSchema, RecurrentSchema, Schema, infer_schema, parse_sequence
from tests.layout.native import NAMES, tokens


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_schema_survives_json(native, name, flash):
    schema = native(name, flash=flash).schema()
    again = Schema.from_dict(json.loads(json.dumps(schema.to_dict())))
    assert again == schema
    assert again.digest() == schema.digest()
    assert hash(again) == hash(schema)
    assert dataclasses.replace(schema, arch="other").digest() != schema.digest()
    if schema.kind != "recurrent":
        assert schema.with_n_stream(3).digest() != schema.digest()
    assert schema.with_n_stream(3).with_n_stream(1) == schema
    assert schema.with_v_trans(not schema.v_trans).with_v_trans(schema.v_trans) == schema


def test_sizes(native):
    for name in NAMES:
        context = native(name)
        schema = context.schema()
        context.decode(tokens(20))
        before = len(context.get())
        context.decode(tokens(7))
        assert len(context.get()) - before == 7 * schema.bytes_per_token
        state = parse_sequence(context.get(), schema)
        for part in state.parts:
            assert part.schema.sequence_bytes(part.n_cells) > 0
        assert state.nbytes == len(context.get())


def test_the_digest_is_frozen():
    """It names schemas in files, so another digest of the same schema is another file format."""
    kv = KVSchema("base", 1, False, True, ((1, 64), (1, 64)), ((1, 2, 32), (1, 2, 32)))
    schema = Schema("jamba", (kv, RecurrentSchema(4, ((0, 1536),), ((0, 8192),))), 0, "none", False)
    assert schema.kind == "hybrid"
    assert schema.digest() == "f0bb058aa451f5d5a6e97afaf1281e563c78474aef0cffafd4095367bc02d8e3"


def test_window_start():
    kv = KVSchema("base", 1, False, False, (), ())
    schema = Schema("x", (kv, dataclasses.replace(kv, role="window")), 4, "standard")
    assert [schema.window_start(p) for p in (0, 3, 4, 5, 9)] == [0, 0, 1, 2, 6]
    chunked = dataclasses.replace(schema, swa_type="chunked")
    assert [chunked.window_start(p) for p in (0, 3, 4, 7, 8)] == [0, 0, 4, 4, 8]
    assert dataclasses.replace(schema, swa_type="none").window_start(99) == 0


def probe(*parts, cells=1):
    """A sequence blob of ``cells`` tokens with these KV parts: ``(n_layer_k, n_layer_v)``."""
    out = [struct.pack("<Ii", 0xAF143CD8, 0)]
    for n_k, n_v in parts:
        out.append(struct.pack("<II", 1, cells))
        out += [struct.pack("<iIi", i, 1, 0) for i in range(cells)]
        out.append(struct.pack("<II", 0, n_k))
        out += [struct.pack("<iQ", 1, 64) + bytes(64 * cells)] * (n_k + n_v)
    return b"".join(out)


def infer(blob, arch="x", n_swa=0, swa_type="none", hybrid=False, recurrent=False, m_rope=False):
    return infer_schema(
        blob, arch=arch, recurrent=recurrent, hybrid=hybrid, n_swa=n_swa, swa_type=swa_type, m_rope=m_rope
    )


def test_layouts_besides_the_natural_one():
    assert infer(probe((3, 3))).kind == "attention"
    mla = infer(probe((3, 0)))
    assert (mla.kind, mla.parts[0].v) == ("attention", ())
    plain = infer(probe((3, 3)), n_swa=32, swa_type="standard")
    assert (plain.kind, plain.swa_type) == ("attention", "none")
    windowed = infer(probe((3, 3), (2, 2)), n_swa=32, swa_type="chunked")
    assert (windowed.kind, windowed.swa_type, windowed.n_swa) == ("iswa", "chunked", 32)
    assert infer(probe((3, 3)), hybrid=True).kind == "attention"
    assert infer(probe((0, 0), (2, 2)), n_swa=8, swa_type="standard").parts[0].k == ()


@pytest.mark.parametrize(
    ("blob", "settings"),
    [
        (probe((3, 3), (2, 0)), {}),  # an indexer's keys beside a plain cache
        (probe((3, 0), (2, 0)), {"arch": "deepseek32", "n_swa": 8, "swa_type": "standard"}),
        (probe((3, 3), (2, 2), (1, 1)), {"n_swa": 8, "swa_type": "standard"}),
        (probe(), {}),
        (b"", {}),
        (probe((3, 3))[:-1], {}),
        (probe((3, 3)) + b"\0", {}),
        (probe((3, 3), cells=0), {}),
        (probe((3, 3)), {"recurrent": True}),
        (probe((3, 3)), {"n_swa": 8, "swa_type": "symmetric"}),
    ],
)
def test_what_is_not_known_is_refused(blob, settings):
    with pytest.raises(UnsupportedLayoutError) as caught:
        infer(blob, **settings)
    assert caught.value.arch == settings.get("arch", "x")
    assert caught.value.reason
