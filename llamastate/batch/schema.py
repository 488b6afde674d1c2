"""JSON Schema as a grammar (GBNF), so that a model can write nothing else.

The grammar may allow less than the schema, never more: properties come in the order of the schema, none come that it
does not name, and white space is at most one blank. A keyword that cannot be kept is refused, for an answer that only
looks checked is worse than none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from llamastate.errors import SamplerError
from llamastate.words import brief

__all__ = ["UnsupportedSchemaError", "json_grammar", "schema_grammar"]

#: They say nothing about which values are valid. Of ``format`` only those in :data:`_FORMATS` are kept; JSON Schema has
#: the others as remarks.
_REMARKS = frozenset(
    [
        *("$schema", "$id", "$comment", "$anchor", "$defs", "definitions", "title", "description", "default"),
        *("examples", "deprecated", "readOnly", "writeOnly", "discriminator", "contentEncoding", "contentMediaType"),
    ]
)
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
#: Bounds of integers become one alternative for each value up to so many.
_MAX_RANGE = 1000
#: A larger one llama.cpp takes for none.
_MAX_REPEAT = 2000

_BASE = {
    "ws": '" "?',
    "char": r'[^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" ([0-9a-cA-CeEfF] hex | [dD] [0-7]) hex hex)',
    "hex": "[0-9a-fA-F]",
    "string": r'"\"" char* "\""',
    "digits": '"0" | [1-9] [0-9]{0,14}',
    "integer": '"-"? digits',
    "number": '"-"? digits ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "object": '"{" ws (string ws ":" ws value ("," ws string ws ":" ws value)*)? ws "}"',
    "array": '"[" ws (value ("," ws value)*)? ws "]"',
    "value": "object | array | string | number | boolean | null",
    "date": '[0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | "1" [0-9] | "2" [0-8])',
    "time": '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{3} ([0-9]{3})?)? '
    '("Z" | [-+] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])',
    "uuid": 'hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12}',
}
_FORMATS = {"date": "date", "time": "time", "date-time": 'date "T" time', "uuid": "uuid"}


class UnsupportedSchemaError(SamplerError):
    """A schema that may well be one, and has what no grammar here can keep."""


def json_grammar() -> str:
    """The grammar of any JSON object."""
    return _text({"root": "object", **_BASE})


def schema_grammar(schema: Any) -> str:
    """The grammar of what a JSON Schema allows.

    Parameters
    ----------
    schema : mapping or bool
        As ``json.loads`` gives it.

    Returns
    -------
    str
        GBNF; its start symbol is ``root``.

    Raises
    ------
    SamplerError
        The schema is none; ``reason`` tells what and where.
    UnsupportedSchemaError
        It has what no grammar here can keep: ``reason`` names the keyword.
    """
    try:
        return _cached(json.dumps(schema))  # not sorted: the order of the properties is the order they are written in
    except (TypeError, ValueError, RecursionError, AttributeError, LookupError) as error:
        if isinstance(error, SamplerError):
            raise
        raise _refused("#", f"it cannot be read: {brief(str(error))}") from None


@lru_cache(maxsize=64)
def _cached(text: str) -> str:
    return _Writer(json.loads(text)).grammar()


def _text(rules: Mapping[str, str]) -> str:
    return "".join(f"{name} ::= {rule}\n" for name, rule in rules.items())


class _Writer:
    """One schema's rules. Names of its own begin with ``r``, which none in :data:`_BASE` does."""

    def __init__(self, schema: Any) -> None:
        self.schema = schema
        self.rules: dict[str, str] = {}
        self.refs: dict[str, str] = {}

    def grammar(self) -> str:
        root = self.visit(self.schema, "#")
        return _text({"root": root, **self.rules, **_BASE})

    def rule(self, text: str) -> str:
        name = f"r{len(self.rules)}"
        self.rules[name] = text
        return name

    # --- any schema ---------------------------------------------------------------------------------------------------

    def visit(self, schema: Any, at: str) -> str:
        """What stands for ``schema`` in a rule: always one item."""
        if schema is True:
            return "value"
        if not isinstance(schema, dict):
            raise _refused(at, f"{brief(schema)} is no schema that anything fits")
        words = {word: value for word, value in schema.items() if word not in _REMARKS}
        if not words:
            return "value"
        for word, visit in self.wholes().items():
            if word in words:
                return visit(words, at)
        kinds = words.get("type")
        if kinds is None:
            kinds = sorted({kind for word in words for kind in _KINDS_OF.get(word, ())})
            if len(kinds) != 1:
                raise _unsupported(at, f"without a type, {sorted(words)} cannot be kept")
        if isinstance(kinds, str):
            return self.typed(kinds, words, at)
        if not isinstance(kinds, list) or not kinds:
            raise _refused(at, f"type {brief(kinds)}")
        return self.either([self.typed(kind, _words_for(kind, words), at) for kind in kinds])

    def wholes(self) -> dict[str, Callable[[dict[str, Any], str], str]]:
        """Keywords that say all there is to say."""
        return {
            "$ref": self.ref,
            "const": self.values,
            "enum": self.values,
            "anyOf": self.any_of,
            "oneOf": self.one_of,
            "allOf": self.all_of,
        }

    def either(self, items: Sequence[str]) -> str:
        return items[0] if len(items) == 1 else self.rule(" | ".join(dict.fromkeys(items)))

    def ref(self, words: dict[str, Any], at: str) -> str:
        _only(words, ["$ref"], at)
        pointer = words["$ref"]
        if not isinstance(pointer, str) or not re.fullmatch(r"#(/.*)?", pointer, re.DOTALL):
            raise _unsupported(at, f"$ref {brief(pointer)}: only parts of the schema itself can be meant")
        if pointer not in self.refs:
            target = self.schema
            for part in pointer[2:].split("/") if pointer != "#" else ():
                key: Any = part.replace("~1", "/").replace("~0", "~")
                if isinstance(target, list) and part.isdecimal():
                    key = int(part)
                try:
                    target = target[key]
                except (KeyError, IndexError, TypeError):
                    raise _refused(at, f"$ref {brief(pointer)}: there is no such part") from None
            name = self.refs[pointer] = self.rule("")  # known by its name before its own parts ask for it
            self.rules[name] = self.visit(target, pointer)
        return self.refs[pointer]

    def values(self, words: dict[str, Any], at: str) -> str:
        _only(words, ["const", "enum", "type"], at)
        values = [words["const"]] if "const" in words else words["enum"]
        if not isinstance(values, list):
            raise _refused(at, f"enum {brief(values)}")
        if "const" in words and "enum" in words:
            values = [value for value in values if value in words["enum"]]
        kinds = words.get("type", list(_TYPES))
        kinds = [kinds] if isinstance(kinds, str) else kinds
        values = [value for value in values if any(_is(kind, value) for kind in kinds)]
        if not values:
            raise _refused(at, "no value is left of enum, const and type")
        return self.either([_literal(json.dumps(value, ensure_ascii=False)) for value in values])

    def any_of(self, words: dict[str, Any], at: str) -> str:
        _only(words, ["anyOf"], at)
        return self.either([self.visit(s, f"{at}/anyOf/{i}") for i, s in enumerate(_list(words, "anyOf", at))])

    def one_of(self, words: dict[str, Any], at: str) -> str:
        _only(words, ["oneOf"], at)
        schemas = _list(words, "oneOf", at)
        known = [self.told_by(schema) for schema in schemas]
        for i, one in enumerate(known):
            for other in known[:i]:
                if not _apart(one, other):
                    raise _unsupported(at, "oneOf: two of its schemas may fit the same value; anyOf could be kept")
        return self.either([self.visit(s, f"{at}/oneOf/{i}") for i, s in enumerate(schemas)])

    def told_by(self, schema: Any) -> dict[str, Any]:
        """``schema``, found through its references: by its type and constants it can be told from others."""
        for _ in range(32):
            if isinstance(schema, dict) and isinstance(schema.get("$ref"), str) and schema["$ref"].startswith("#/"):
                target: Any = self.schema
                for part in schema["$ref"][2:].split("/"):
                    target = target.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else {}
                schema = target
        return schema if isinstance(schema, dict) else {}

    def all_of(self, words: dict[str, Any], at: str) -> str:
        _only(words, ["allOf"], at)
        schemas = _list(words, "allOf", at)
        if len(schemas) != 1:
            raise _unsupported(at, "allOf of more than one schema is not supported")
        return self.visit(schemas[0], f"{at}/allOf/0")

    # --- by type ------------------------------------------------------------------------------------------------------

    def typed(self, kind: Any, words: dict[str, Any], at: str) -> str:
        if kind == "object":
            return self.object(words, at)
        if kind == "array":
            return self.array(words, at)
        if kind == "string":
            return self.string(words, at)
        if kind in ("number", "integer"):
            return self.number(kind, words, at)
        if kind not in ("boolean", "null"):
            raise _refused(at, f"type {brief(kind)}")
        _only(words, ["type"], at)
        return str(kind)

    def object(self, words: dict[str, Any], at: str) -> str:
        _only(words, ["type", "properties", "required", "additionalProperties"], at)
        properties = words.get("properties", {})
        required = words.get("required", [])
        more = words.get("additionalProperties", True)
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise _refused(at, "properties are no object, or required is no list")
        if unknown := [name for name in required if name not in properties]:
            raise _refused(at, f"{brief(unknown[0])} is required and not among the properties")
        if properties:
            return self.rule(f'"{{" ws {self.members(properties, set(required), at)} ws "}}"')
        if more is False:
            return self.rule('"{" ws "}"')
        item = f'string ws ":" ws {self.visit(more, f"{at}/additionalProperties")}'
        return self.rule(f'"{{" ws ({item} ("," ws {item})*)? ws "}}"')

    def members(self, properties: dict[str, Any], required: set[str], at: str) -> str:
        """The properties in order. Which comma is needed depends on whether one stands before it."""
        items = [
            (f'{_literal(json.dumps(name, ensure_ascii=False))} ws ":" ws {self.visit(schema, f"{at}/{name}")}', name)
            for name, schema in properties.items()
        ]
        rest = '""'
        ways: list[str] = []  # to begin with each property, up to the first that has to be there
        must = next((i for i, (_, name) in enumerate(items) if name in required), len(items))
        for i in reversed(range(len(items))):
            item, name = items[i]
            if i <= must:
                ways.append(f"{item} {rest}")
            rest = self.rule(f'"," ws {item} {rest}' if name in required else f'("," ws {item})? {rest}')
        if must == len(items):
            ways.insert(0, '""')
        return self.rule(" | ".join(reversed(ways)))

    def array(self, words: dict[str, Any], at: str) -> str:
        _only(words, ["type", "items", "prefixItems", "minItems", "maxItems"], at)
        low, high = _counts(words, "minItems", "maxItems", at)
        if "prefixItems" in words:
            items = [self.visit(s, f"{at}/prefixItems/{i}") for i, s in enumerate(_list(words, "prefixItems", at))]
            # nothing obliges an array to go on after them
            if not low <= len(items) or (high is not None and len(items) > high):
                raise _refused(at, "minItems or maxItems do not fit prefixItems")
            listed = ' "," ws '.join(items)
            return self.rule(f'"[" ws {listed} ws "]"')
        item = self.visit(words.get("items", True), f"{at}/items")
        if high == 0:
            return self.rule('"[" ws "]"')
        more = "" if high == 1 else f'("," ws {item}){_times(max(low - 1, 0), None if high is None else high - 1)}'
        listed = f"{item} {more}"
        return self.rule(f'"[" ws {listed if low else f"({listed})?"} ws "]"')

    def string(self, words: dict[str, Any], at: str) -> str:
        _only(words, ["type", "minLength", "maxLength", "format"], at)
        low, high = _counts(words, "minLength", "maxLength", at)
        form = _FORMATS.get(str(words.get("format")))
        if form is None:
            if (low, high) == (0, None):
                return "string"
            return self.rule(r'"\"\""' if high == 0 else rf'"\"" char{_times(low, high)} "\""')
        if (low, high) != (0, None):
            raise _unsupported(at, "a length beside a format is not supported")
        return self.rule(rf'"\"" {form} "\""')

    def number(self, kind: str, words: dict[str, Any], at: str) -> str:
        _only(words, ["type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "format"], at)
        bounds = {word: value for word, value in words.items() if word not in ("type", "format")}
        if not bounds:
            return kind
        for word, value in bounds.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
                raise _unsupported(at, f"{word} {brief(value)} (only whole numbers can be kept)")
        if kind == "number":
            if bounds == {"minimum": 0}:
                return self.rule(_BASE["number"].removeprefix('"-"? '))
            raise _unsupported(at, f"{sorted(bounds)} of numbers is not supported (but for minimum 0)")
        lows = [int(bounds[w]) + (w != "minimum") for w in ("minimum", "exclusiveMinimum") if w in bounds]
        highs = [int(bounds[w]) - (w != "maximum") for w in ("maximum", "exclusiveMaximum") if w in bounds]
        low, high = max(lows, default=None), min(highs, default=None)
        if low is not None and high is not None:
            if not 0 <= high - low <= _MAX_RANGE:
                raise _refused(at, f"integers from {low} to {high}: more than {_MAX_RANGE}, or none")
            return self.rule(" | ".join(f'"{number}"' for number in range(low, high + 1)))
        if low in (0, 1):
            return "digits" if low == 0 else self.rule("[1-9] [0-9]{0,14}")
        raise _unsupported(at, f"{sorted(bounds)} alone is not supported (but for a minimum of 0 or 1)")


_KINDS_OF = {
    "properties": ("object",),
    "required": ("object",),
    "additionalProperties": ("object",),
    "items": ("array",),
    "prefixItems": ("array",),
}
_WORDS_OF = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "format", "pattern"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}
_ALL_WORDS = frozenset().union(*_WORDS_OF.values())


def _words_for(kind: Any, words: dict[str, Any]) -> dict[str, Any]:
    """Of the keywords of several types those that one of them has to keep, and what no type has, to be refused."""
    own = _WORDS_OF.get(kind, set()) if isinstance(kind, str) else set()
    return {word: value for word, value in words.items() if word in own or word not in _ALL_WORDS}


def _only(words: Mapping[str, Any], known: Sequence[str], at: str) -> None:
    for word in words:
        if word not in known:
            beside = next((k for k in known if k in words and k != "type"), None)
            where = f" beside {beside}" if beside else ""
            raise _unsupported(at, f"the keyword {brief(word)}{where} is not supported")


def _list(words: Mapping[str, Any], word: str, at: str) -> list[Any]:
    found = words[word]
    if not isinstance(found, list) or not found:
        raise _refused(at, f"{word} {brief(found)}")
    return found


def _counts(words: Mapping[str, Any], least: str, most: str, at: str) -> tuple[int, int | None]:
    low, high = words.get(least, 0), words.get(most)
    for value in (low, 0 if high is None else high):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_REPEAT:
            raise _refused(at, f"{least} or {most}: {brief(value)} is not in [0, {_MAX_REPEAT}]")
    if high is not None and high < low:
        raise _refused(at, f"{least} {low} is more than {most} {high}")
    return low, high


def _times(low: int, high: int | None) -> str:
    if high is None:
        return "*" if not low else "+" if low == 1 else f"{{{low},}}"
    return f"{{{low},{high}}}"


def _is(kind: Any, value: Any) -> bool:
    if isinstance(value, bool):
        return bool(kind == "boolean")
    if isinstance(value, int):
        return kind in ("integer", "number")
    if isinstance(value, float):
        return kind == "number" or (kind == "integer" and value.is_integer())
    names = {str: "string", list: "array", dict: "object", type(None): "null"}
    return bool(kind == names[type(value)])


def _apart(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether no value can fit both, as far as types, constants and required constant properties tell."""
    kinds = [_kinds(schema) for schema in (one, other)]
    if not kinds[0] & kinds[1] and not ("number" in kinds[0] | kinds[1] and "integer" in kinds[0] | kinds[1]):
        return True
    values = [_constants(schema) for schema in (one, other)]
    if values[0] is not None and values[1] is not None:
        return not any(value in values[1] for value in values[0])
    if kinds[0] != {"object"} or kinds[1] != {"object"}:
        return False
    named = [found for schema in (one, other) if isinstance(found := schema.get("properties"), dict)]
    if len(named) != 2:
        return False
    for name in set(one.get("required", ())) & set(other.get("required", ())):
        found = [_constants(properties.get(name)) for properties in named]
        if found[0] is not None and found[1] is not None and not any(value in found[1] for value in found[0]):
            return True
    return False


def _kinds(schema: dict[str, Any]) -> set[str]:
    kinds = schema.get("type")
    if kinds is None and (values := _constants(schema)) is not None:
        return {kind for kind in _TYPES for value in values if _is(kind, value)}
    if kinds is None and "properties" in schema:
        return {"object"}
    return set(_TYPES) if kinds is None else {kinds} if isinstance(kinds, str) else set(kinds)


def _constants(schema: Any) -> list[Any] | None:
    if not isinstance(schema, dict):
        return None
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else None


def _literal(text: str) -> str:
    """``text`` between quotes, as GBNF has it."""
    escaped = re.sub(r'[\\"]', lambda match: "\\" + match.group(), text)
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\x{ord(match.group()):02X}", escaped) + '"'


def _refused(at: str, reason: str) -> SamplerError:
    return SamplerError(f"JSON schema, at {brief(at)}: {reason}", parameter="response_format", reason=reason)


def _unsupported(at: str, reason: str) -> UnsupportedSchemaError:
    return UnsupportedSchemaError(f"JSON schema, at {brief(at)}: {reason}", parameter="response_format", reason=reason)
