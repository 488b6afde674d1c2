"""Schemas as grammars: whatever a model writes under one is valid, and what cannot be kept is refused."""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest

from llamastate import Sampler
from llamastate.batch.schema import json_grammar, schema_grammar
from llamastate.errors import SamplerError
from tests.helpers import model

_NODE = {
    "type": "object",
    "properties": {
        "v": {"type": "integer", "minimum": 0},
        "next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]},
    },
    "required": ["v", "next"],
}


def _tagged(tag: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"k": {"const": tag}, **more}, "required": ["k"]}


SCHEMAS: list[Any] = [
    True,
    {},
    {"type": "object"},
    {"type": "object", "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {
        "type": "object",
        "title": "t",
        "properties": {
            "a": {"type": "string", "maxLength": 5},
            "b": {"type": "integer", "minimum": 3, "exclusiveMaximum": 12},
            'c"\\é': {"enum": ['x"y', "\\", "\n\x7f", None, 1.5]},
        },
        "required": ["b"],
    },
    {"properties": {"a": {"type": "null"}, "b": {"type": "null"}, "c": {"type": "null"}}},
    {"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}}, "required": ["a", "b"]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "items": {"type": "null"}, "maxItems": 1},
    {"type": "array", "maxItems": 0},
    {"type": "array", "minItems": 1},
    {"prefixItems": [{"type": "integer"}, {"const": "k"}]},
    {"type": ["string", "null"], "minLength": 1, "maxLength": 3},
    {"type": "string", "maxLength": 0},
    {"type": "string", "minLength": 2},
    *({"type": "string", "format": form} for form in ("date", "time", "date-time", "uuid")),
    {"type": "number", "minimum": 0},
    {"type": "integer", "exclusiveMinimum": 0},
    {"type": "integer", "enum": [1, 2.0, "x", 3]},
    {"$defs": {"n": _NODE}, "$ref": "#/$defs/n"},
    {"oneOf": [_tagged("a"), _tagged("b", z={"type": "number"})]},
    {"$defs": {"a": _tagged("a"), "b": _tagged("b")}, "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]},
    {"allOf": [{"type": "boolean"}], "description": "wrapped"},
    {"definitions": {"a/b": {"type": "null"}}, "type": "object", "properties": {"a/b": {"$ref": "#/definitions/a~1b"}}},
]


def written(grammar: str, rng: np.random.Generator) -> str | None:
    """What chance writes under a grammar; None if it came to no end."""
    m = model("dense", vocab="spm")
    tokens: list[int] = []
    with Sampler(m, temperature=1.0, grammar=grammar, seed=int(rng.integers(1 << 30))) as sampler:
        for _ in range(400):
            row = 3 * rng.standard_normal(m.n_vocab).astype(np.float32)
            # bytes that are no characters by themselves: llama.cpp's grammars take any of them for half of one
            row[0] = row[5 + 128 : 5 + 256] = -1e9
            row[[2, 4]] += 6  # come to an end
            token = sampler.sample_logits(row)
            if m.is_eog(token):
                return b"".join(map(m.token_to_piece, tokens)).decode()
            tokens.append(token)
    return None


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_everything_written_is_valid(schema: Any) -> None:
    grammar, rng = schema_grammar(schema), np.random.default_rng(0)
    found = [text for _ in range(20) if (text := written(grammar, rng)) is not None]
    assert len(found) >= 10
    for text in found:
        value = json.loads(text)
        jsonschema.validate(value, schema, jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    ("form", "read"),
    [
        ("date", dt.date.fromisoformat),
        ("time", lambda text: dt.time.fromisoformat(text.replace("Z", "+00:00"))),
        ("date-time", lambda text: dt.datetime.fromisoformat(text.replace("Z", "+00:00"))),
        ("uuid", uuid.UUID),
    ],
)
def test_formats(form: str, read: Callable[[str], Any]) -> None:
    grammar, rng = schema_grammar({"type": "string", "format": form}), np.random.default_rng(0)
    for _ in range(20):
        text = written(grammar, rng)
        assert text is not None
        assert read(json.loads(text))


def test_any_object() -> None:
    rng = np.random.default_rng(1)
    found = [text for _ in range(20) if (text := written(json_grammar(), rng)) is not None]
    assert found
    assert all(isinstance(json.loads(text), dict) for text in found)


def test_properties_keep_their_order() -> None:
    one, other = ({"type": "object", "properties": dict.fromkeys(names, True)} for names in ("ab", "ba"))
    assert schema_grammar(one) != schema_grammar(other)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (False, "no schema"),
        (3, "no schema"),
        ({"type": "string", "pattern": "a"}, "pattern"),
        ({"type": "number", "minimum": 1}, "minimum"),
        ({"type": "integer", "minimum": 1.5}, "whole"),
        ({"type": "integer", "minimum": 0, "maximum": 10**6}, "1000"),
        ({"type": "integer", "multipleOf": 3}, "multipleOf"),
        ({"allOf": [{}, {}]}, "allOf"),
        ({"anyOf": [], "type": "null"}, "type"),
        ({"anyOf": []}, "anyOf"),
        ({"anyOf": [True], "properties": {}}, "properties"),
        ({"not": {}}, "not"),
        ({"type": "object", "required": ["x"]}, "required"),
        ({"type": "object", "minProperties": 1}, "minProperties"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"oneOf": [_tagged("a"), {"type": "object"}]}, "oneOf"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "more than"),
        ({"type": "array", "maxItems": 5000}, "2000"),
        ({"$ref": "http://example.com"}, "itself"),
        ({"$ref": "#/nowhere"}, "no such part"),
        ({"type": "date"}, "date"),
        ({"enum": []}, "no value"),
        ({"type": ["string", "integer"], "foo": 1}, "foo"),
        ({"minLength": 3}, "type"),
        ({"a": {1}}, "cannot be read"),
        ({"oneOf": [{"properties": [], "required": ["a"]}, {"properties": {"a": True}, "required": ["a"]}]}, "oneOf"),
        ({"oneOf": [{"type": [[]]}, {"type": "string"}]}, ""),
        ({"enum": 5, "const": 1}, ""),
        ({"oneOf": [{"required": 5, "properties": {}}, {"required": 5, "properties": {}}]}, ""),
        ({"$ref": "#/a/b", "a": 5}, ""),
    ],
)
def test_refused(schema: Any, words: str) -> None:
    with pytest.raises(SamplerError) as caught:
        schema_grammar(schema)
    assert words in str(caught.value)
    assert caught.value.parameter == "response_format"


def test_endless_schemas_are_refused() -> None:
    deep: Any = {"type": "null"}
    for _ in range(5000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(SamplerError):
        schema_grammar(deep)
    loop = schema_grammar({"$ref": "#"})
    with pytest.raises(SamplerError):
        Sampler(model("dense", vocab="spm"), grammar=loop)
