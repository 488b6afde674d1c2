"""OpenAI's batch format: what a line asks for, and what is wrong with it."""

from __future__ import annotations

import base64
import contextlib
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamastate.batch import Output, Request, Result, TokenLogprob
from llamastate.batch.openai import Defaults, Line, Query, parse, read_line
from llamastate.batch.responses import Names, error_line, response_line
from llamastate.errors import InvalidRequestError, NoKVSlotError, NotEnoughCellsError
from tests.batch.lines import chat, line

M = [{"role": "user", "content": "hi"}]


def ask(raw: bytes, **defaults: Any) -> Query:
    found = read_line(raw, 1)
    assert found.error is None
    return parse(found, Defaults(**defaults))


def request(raw: bytes, **defaults: Any) -> Request:
    (found,) = ask(raw, **defaults).requests(None)
    return found


def refused(raw: bytes) -> InvalidRequestError:
    found = read_line(raw, 7)
    if found.error is not None:
        return found.error
    with pytest.raises(InvalidRequestError) as caught:
        parse(found, Defaults())
    return caught.value


def test_chat() -> None:
    found = request(
        line(
            "a",
            "/v1/chat/completions",
            model="gpt-4o",
            messages=M,
            max_tokens=5,
            max_completion_tokens=7,
            temperature=0.5,
            top_p=0.9,
            n=2,
            stop="x",
            seed=3,
            presence_penalty=0.1,
            frequency_penalty=0.2,
            logit_bias={"5": -100},
            logprobs=True,
            top_logprobs=3,
            top_k=4,
            min_p=0.1,
            repetition_penalty=1.5,
            ignore_eos=True,
            user="u",
            tools=[{"type": "function"}],
            tool_choice="auto",
            chat_template_kwargs={"enable_thinking": False},
        )
    )
    assert (found.id, found.prompt, found.kind, found.max_tokens, found.n) == ("a", M, "generate", 7, 2)
    assert (found.stop, found.logprobs, found.ignore_eos) == (("x",), 3, True)
    assert found.template == {"enable_thinking": False, "tools": [{"type": "function"}]}
    s = found.sampling
    assert (s.temperature, s.top_p, s.seed, s.top_k, s.min_p, s.repeat_penalty) == (0.5, 0.9, 3, 4, 0.1, 1.5)
    assert (s.presence_penalty, s.frequency_penalty, s.logit_bias, s.grammar) == (0.1, 0.2, {5: -100.0}, None)


def test_defaults_are_openais_but_seeds_are_made_of_names() -> None:
    a, b = request(chat("a", "x")), request(chat("b", "x"))
    assert (a.sampling.temperature, a.sampling.top_p, a.n, a.logprobs, a.stop) == (1.0, 1.0, 1, None, ())
    assert a.max_tokens > 10**5
    assert request(line("a", prompt="x")).max_tokens == 16
    assert a.sampling.seed != b.sampling.seed
    assert a.sampling.seed == request(chat("a", "y")).sampling.seed != request(chat("a", "y"), seed=1).sampling.seed
    assert request(chat("a", "x"), temperature=0.0, max_tokens=9).max_tokens == 9
    assert request(chat("a", "x"), temperature=0.0).sampling.is_greedy
    assert request(chat("a", "x", temperature=0, top_k=-1)).sampling.top_k == 0
    for seed in (-1, 2**64, 0):
        assert 0 <= request(chat("a", "x", seed=seed)).sampling.seed < 2**32 - 1


def test_messages() -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    found = request(line("a", "/v1/chat/completions", messages=messages)).prompt
    assert found[0] == {"role": "system", "content": "a\nb"}
    assert found[1]["content"] == ""
    assert found[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert found[2]["tool_call_id"] == "1"


def test_completions() -> None:
    found = ask(line("a", prompt=["x", "y"], n=2, echo=True, logprobs=2, best_of=2, suffix=""))
    assert [r.prompt for r in found.requests(1)] == ["x", "y"]
    assert [r.meta for r in found.requests(1)] == [(1, 0), (1, 1)]
    assert (found.request.echo, found.request.logprobs, found.request.n) == (True, 2, 2)
    one, two = ask(line("a", prompt=[[1, 2], [3]])).requests(None)
    np.testing.assert_array_equal(one.prompt, [1, 2])
    np.testing.assert_array_equal(two.prompt, [3])
    np.testing.assert_array_equal(request(line("a", prompt=[1, 2])).prompt, [1, 2])
    assert request(line("a", prompt="")).prompt == ""
    assert request(line("a", prompt="x", max_tokens=0)).max_tokens == 0


def test_embeddings() -> None:
    found = ask(line("a", "/v1/embeddings", input=["x", "y"], encoding_format="base64", user="u"))
    assert [(r.prompt, r.kind) for r in found.requests(None)] == [("x", "embed"), ("y", "embed")]
    assert found.base64


def test_response_format() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}
    assert '"\\"a\\""' in str(request(chat("a", "x", response_format=form)).sampling.grammar)
    assert request(chat("a", "x", response_format={"type": "json_object"})).sampling.grammar
    assert request(chat("a", "x", response_format={"type": "text"})).sampling.grammar is None
    assert request(chat("a", "x", grammar='root ::= "a"')).sampling.grammar == 'root ::= "a"'


@pytest.mark.parametrize(
    ("raw", "code", "param"),
    [
        (b"{", "invalid_json", None),
        (b"null", "invalid_parameter", None),
        (b'{"custom_id":"a","body":' + b"[" * 100_000, "invalid_json", None),
        (b'{"custom_id":"\xff"}', "invalid_utf8", None),
        (b'{"custom_id":"a","url":"/v1/completions","body":{"prompt":NaN}}', "invalid_json", None),
        (line("a", "/v1/responses"), "invalid_url", "url"),
        (line("", prompt="x"), "missing_custom_id", "custom_id"),
        (b'{"url":"/v1/completions","body":{"prompt":"x"}}', "missing_custom_id", "custom_id"),
        (b'{"custom_id":3,"url":"/v1/completions","body":{}}', "invalid_parameter", "custom_id"),
        (b'{"custom_id":"a","url":"/v1/completions"}', "missing_parameter", "body"),
        (b'{"custom_id":"a","body":{}}', "missing_parameter", "url"),
        (b'{"custom_id":"a","method":"GET","url":"/v1/completions","body":{}}', "invalid_method", "method"),
        (b'{"custom_id":"a","url":"/v1/completions","body":3}', "invalid_parameter", None),
        (line("a"), "missing_parameter", "prompt"),
        (line("a", prompt="x", frequency=1), "unsupported_parameter", "frequency"),
        (line("a", prompt="x", suffix="y"), "unsupported_parameter", "suffix"),
        (line("a", prompt="x", best_of=3), "unsupported_parameter", "best_of"),
        (line("a", prompt="x", stream=True), "unsupported_parameter", "stream"),
        (line("a", prompt="x", temperature="hot"), "invalid_parameter", "temperature"),
        (line("a", prompt="x", temperature=-1), "invalid_parameter", "temperature"),
        (b'{"custom_id":"a","url":"/v1/completions","body":{"prompt":"x","temperature":1e400}}', "invalid_parameter",
         "temperature"),
        (line("a", prompt="x", top_p=0), "invalid_parameter", "top_p"),
        (line("a", prompt="x", n=0), "invalid_parameter", "n"),
        (line("a", prompt="x", n=10**6), "invalid_parameter", "n"),
        (line("a", prompt="x", max_tokens=-1), "invalid_parameter", "max_tokens"),
        (line("a", prompt="x", max_tokens=1.5), "invalid_parameter", "max_tokens"),
        (line("a", prompt="x", stop=["a", ""]), "invalid_parameter", "stop"),
        (line("a", prompt="x", logit_bias={"x": 1}), "invalid_parameter", "logit_bias"),
        (line("a", prompt="x", logprobs=21), "invalid_parameter", "logprobs"),
        (line("a", prompt=[]), "invalid_parameter", "prompt"),
        (line("a", prompt=[1, "x"]), "invalid_parameter", "prompt"),
        (line("a", prompt=[-1]), "invalid_parameter", "prompt"),
        (line("a", prompt={"x": 1}), "invalid_parameter", "prompt"),
        (chat("a", "x", top_logprobs=3), "invalid_parameter", "top_logprobs"),
        (chat("a", "x", echo=True), "unsupported_parameter", "echo"),
        (chat("a", "x", tools=[{}], tool_choice="required"), "unsupported_parameter", "tool_choice"),
        (chat("a", "x", chat_template_kwargs={"messages": []}), "unsupported_parameter", "chat_template_kwargs"),
        (chat("a", "x", response_format={"type": "xml"}), "invalid_parameter", "response_format.type"),
        (chat("a", "x", response_format={"type": "json_schema"}), "missing_parameter",
         "response_format.json_schema.schema"),
        (chat("a", "x", response_format={"type": "json_schema", "json_schema": {"schema": {"not": {}}}}),
         "unsupported_parameter", "response_format"),
        (b"[", "invalid_json", None),
        (chat("a", "x", response_format={"type": "json_schema", "json_schema": {"schema": 3}}), "invalid_parameter",
         "response_format"),
        (chat("a", "x", response_format={"type": "json_object"}, grammar="x"), "invalid_parameter", "grammar"),
        (line("a", "/v1/chat/completions", messages=[]), "invalid_parameter", "messages"),
        (line("a", "/v1/chat/completions", messages=[{"content": "x"}]), "missing_parameter", "messages[0].role"),
        (line("a", "/v1/chat/completions", messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
         "unsupported_parameter", "messages[0].content"),
        (line("a", "/v1/embeddings", input="x", dimensions=3), "unsupported_parameter", "dimensions"),
        (line("a", "/v1/embeddings", input="x", encoding_format="int8"), "invalid_parameter", "encoding_format"),
    ],
)  # fmt: skip
def test_refused(raw: bytes, code: str, param: str | None) -> None:
    error = refused(raw)
    assert (error.code, error.param, error.line) == (code, param, 7)
    assert str(error).startswith("line 7: ")
    written = json.loads(error_line("k", read_line(raw, 7), error))
    assert written["response"] is None
    assert (written["error"]["code"], written["error"]["param"]) == (code, param)
    assert ("line" in written["error"]) == (written["custom_id"] is None)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"[", "line 1: it is a JSON array; what is wanted is JSON Lines, one object on each line"),
        (b"rubbish", "line 1: it is no JSON: invalid character (byte 0)"),
        (chat("a", "x", response_format={"type": "json_schema", "json_schema": {"schema": {"properties": {"b": {
            "type": "string", "pattern": "x"}}}}}),
         "line 1: JSON schema, at '#/b': the keyword 'pattern' is not supported"),
    ],
)  # fmt: skip
def test_words(raw: bytes, words: str) -> None:
    found = read_line(raw, 1)
    if found.error is not None:
        assert str(found.error) == words
        return
    with pytest.raises(InvalidRequestError) as caught:
        parse(found, Defaults())
    assert str(caught.value) == words


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda t: b'{"custom_id":"a","url":' + t.encode()))
def test_any_bytes_are_a_line(raw: bytes) -> None:
    found = read_line(raw, 1)
    assert found.error is not None
    json.loads(error_line("k", found, found.error))


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_names = st.sampled_from(
    [
        *("messages", "prompt", "input", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "logit_bias"),
        *("logprobs", "response_format", "tools", "echo"),
    ]
)


@given(st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]), st.dictionaries(_names, _json))
def test_any_body_is_a_query_or_an_error(url: str, body: dict[str, Any]) -> None:
    found = read_line(line("a", url, **{"messages": M, **body} if "chat" in url else body), 1)
    if found.error is None:
        with contextlib.suppress(InvalidRequestError):
            assert list(parse(found, Defaults()).requests(None))


def test_a_body_is_the_same_however_it_is_spelt() -> None:
    def digest(body: bytes) -> bytes:
        return read_line(b'{"custom_id":"a","url":"/v1/completions","body":' + body + b"}", 1).digest

    assert digest(b'{"prompt":"x","n":1}') == digest(b'{ "n": 1,"prompt":"\\u0078" }')
    assert digest(b'{"prompt":"x","n":1}') != digest(b'{"prompt":"x","n":2}')
    assert read_line(line("b", prompt="x"), 9).digest == read_line(line("a", prompt="x"), 1).digest
    assert read_line(line("a", "/v1/embeddings", input="x"), 1).digest != read_line(line("a", input="x"), 1).digest


def test_a_byte_order_mark_is_no_part_of_the_first_line() -> None:
    assert read_line(b"\xef\xbb\xbf" + line("a", prompt="x") + b"\r\n", 1).error is None


# --- responses --------------------------------------------------------------------------------------------------------

NAMES = Names("m.gguf", lambda token: bytes([token]))


def answered(raw: bytes, *results: Result) -> dict[str, Any]:
    written = response_line("batch_req_00", ask(raw), results, NAMES)
    assert written.endswith(b"\n")
    found: dict[str, Any] = json.loads(written)
    assert set(found) == {"id", "custom_id", "response", "error"}
    assert (found["custom_id"], found["error"], found["response"]["status_code"]) == ("a", None, 200)
    return found["response"]["body"]


def output(index: int, text: str, reason: Any = "stop", logprobs: Any = None) -> Output:
    return Output(index, text, np.arange(len(text), dtype=np.int32), reason, logprobs)


def test_chat_response() -> None:
    lps = [TokenLogprob(1, b"\xc3", -0.5, ((1, b"\xc3", -0.5), (2, b"b", -math.inf)))]
    result = Result("a", (output(0, "hey", logprobs=lps), output(1, "you", "full")), n_prompt=9, n_cached=4)
    body = answered(chat("a", "x", n=2, logprobs=True, top_logprobs=2), result)
    assert (body["object"], body["model"]) == ("chat.completion", "m.gguf")
    assert body["id"].startswith("chatcmpl-")
    one, two = body["choices"]
    assert one["message"] == {"role": "assistant", "content": "hey"}
    assert (one["index"], one["finish_reason"], two["index"], two["finish_reason"]) == (0, "stop", 1, "length")
    (content,) = one["logprobs"]["content"]
    assert content["bytes"] == [0xC3]
    assert [t["logprob"] for t in content["top_logprobs"]] == [-0.5, -9999.0]
    assert body["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 6,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_completion_response() -> None:
    lps = [TokenLogprob(97, b"ab", -0.5, ((97, b"ab", -0.5),)), TokenLogprob(98, b"c", -1.5)]
    results = [Result("a", (output(0, "abc", logprobs=lps),), n_prompt=1) for _ in range(2)]
    body = answered(line("a", prompt=["x", "y"], logprobs=1), *results)
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["object"] == "text_completion"
    found = body["choices"][0]["logprobs"]
    assert found == {
        "tokens": ["ab", "c"],
        "token_logprobs": [-0.5, -1.5],
        "top_logprobs": [{"ab": -0.5}, {}],
        "text_offset": [0, 2],
    }
    assert body["usage"]["prompt_tokens"] == 2


def test_echoed_logprobs() -> None:
    prompt = np.array([104, 105], np.int32)
    before = [None, TokenLogprob(105, b"i", -2.0)]
    result = Result(
        "a", (output(0, "hia", logprobs=[TokenLogprob(97, b"a", -1.0)]),), n_prompt=2, prompt_tokens=prompt,
        prompt_logprobs=before,
    )  # fmt: skip
    found = answered(line("a", prompt="hi", logprobs=0, echo=True), result)["choices"][0]["logprobs"]
    assert found["tokens"] == ["h", "i", "a"]
    assert found["token_logprobs"] == [None, -2.0, -1.0]
    assert found["text_offset"] == [0, 1, 2]


@pytest.mark.parametrize("form", ["float", "base64"])
def test_embeddings_response(form: str) -> None:
    vectors = [np.array([0.6, 0.8], np.float32), np.array([1, 0], np.float32)]
    results = [Result("a", embedding=v, n_prompt=3) for v in vectors]
    body = answered(line("a", "/v1/embeddings", input=["x", "y"], encoding_format=form), *results)
    for i, (entry, vector) in enumerate(zip(body["data"], vectors, strict=True)):
        found = entry["embedding"]
        found = np.frombuffer(base64.b64decode(found), "<f4") if form == "base64" else np.array(found, np.float32)
        np.testing.assert_array_equal(found, vector)
        assert (entry["index"], entry["object"]) == (i, "embedding")
    assert body["usage"]["total_tokens"] == 6
    assert "completion_tokens" not in body["usage"]


def test_errors_have_words_for_programs() -> None:
    asked = Line(1, "a", "", b"", b"")
    for error, code in ((NotEnoughCellsError("x"), "context_length_exceeded"), (NoKVSlotError("\ud800"), "no_kv_slot")):
        found = json.loads(error_line("k", asked, error))
        assert (found["error"]["code"], found["error"]["type"]) == (code, type(error).__name__)
