"""OpenAI's batch format, read: a line of JSON becomes one request, or several, or an error that says what is wrong.

A line is ``{"custom_id", "method", "url", "body"}``; the body is that of ``/v1/chat/completions``, ``/v1/completions``
or ``/v1/embeddings``, with the extras that vLLM has (``top_k``, ``min_p``, ``repetition_penalty``, ``ignore_eos``,
``chat_template_kwargs``). A parameter that would change the result and cannot be kept is refused, never ignored.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from llamastate.batch.bodies import (
    BODIES,
    Bias,
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    Envelope,
    Loose,
    Message,
    Sampled,
)
from llamastate.batch.request import Request
from llamastate.batch.schema import UnsupportedSchemaError, json_grammar, schema_grammar
from llamastate.errors import InvalidRequestError, LlamaStateError, SamplerError
from llamastate.sampler import SamplingParams
from llamastate.words import brief

__all__ = ["URLS", "Defaults", "Line", "Query", "internal", "parse", "read_line"]

#: Longer lines are refused unread.
MAX_LINE = 64 << 20
#: Seeds of llama.cpp; its largest stands for "any".
_SEEDS = 2**32 - 1

#: What a request can be sent to.
URLS = tuple(BODIES)

_envelope = msgspec.json.Decoder(Envelope)
_loose = msgspec.json.Decoder(Loose)
_bodies = {url: msgspec.json.Decoder(body) for url, body in BODIES.items()}


@dataclass(frozen=True)
class Defaults:
    """What holds for requests that say nothing of it.

    Parameters
    ----------
    seed : int
        A request without a seed gets one that is made of this and its ``custom_id``: the same in every run.
    temperature : float
        1, as in OpenAI's API; 0 is greedy.
    max_tokens : int
        Of a chat. A completion without ``max_tokens`` gets 16, as in OpenAI's API.
    """

    seed: int = 0
    temperature: float = 1.0
    max_tokens: int = 1 << 20


@dataclass(frozen=True, slots=True)
class Line:
    """A line of input.

    Attributes
    ----------
    number : int
        From 1.
    custom_id : str or None
        None if it has none that could be read.
    url : str
    body : bytes
        As it stands there.
    digest : bytes
        16 bytes of BLAKE2b over url and body: equal for bodies that differ in white space or in the order of their
        fields alone. Of a line with an error over the whole line.
    error : InvalidRequestError, optional
        Why it cannot be asked.
    """

    number: int
    custom_id: str | None
    url: str
    body: bytes
    digest: bytes
    error: InvalidRequestError | None = None


def read_line(raw: bytes, number: int) -> Line:
    """Read a line of input, all but its body. Never raises: what is wrong is the line's ``error``.

    Parameters
    ----------
    raw : bytes
        With or without its line end.
    number : int
        From 1, for messages.
    """
    raw = raw.strip()
    if number == 1:
        raw = raw.removeprefix(b"\xef\xbb\xbf")
    custom_id: str | None = None
    try:
        if len(raw) > MAX_LINE:
            raise _invalid("line_too_long", f"{len(raw)} bytes, more than {MAX_LINE}")
        _check_unicode(raw)
        if raw.startswith(b"["):
            raise _invalid("invalid_json", "it is a JSON array; what is wanted is JSON Lines, one object on each line")
        custom_id = _name(raw)
        found = _decode(_envelope, raw)
        if custom_id is None:
            raise _invalid("missing_custom_id", "there is no custom_id", "custom_id")
        if found.method != "POST":
            raise _invalid("invalid_method", f"method is {brief(found.method)}, not 'POST'", "method")
        if found.url not in BODIES:
            raise _invalid("invalid_url", f"url is {brief(found.url)}, not one of {', '.join(URLS)}", "url")
        return Line(number, custom_id, found.url, bytes(found.body), _digest(found.url, bytes(found.body)))
    except InvalidRequestError as error:
        return _wrong(raw, number, custom_id, error)
    except Exception as error:  # whatever it is, no other line is to suffer from it
        return _wrong(raw, number, custom_id, internal(error))


def _wrong(raw: bytes, number: int, custom_id: str | None, error: InvalidRequestError) -> Line:
    digest = hashlib.blake2b(raw, digest_size=16, person=b"line").digest()
    return Line(number, custom_id, "", b"", digest, _located(error, number, custom_id))


def _check_unicode(raw: bytes) -> None:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise _invalid("invalid_utf8", f"byte {error.start} is no valid UTF-8") from None


def _name(raw: bytes) -> str | None:
    try:
        found = _loose.decode(raw).custom_id
    except (msgspec.DecodeError, RecursionError):
        return None  # said better by the decoder of the whole line
    return found if isinstance(found, str) and found else None


def _digest(url: str, body: bytes) -> bytes:
    try:
        canonical = msgspec.json.encode(msgspec.json.decode(body), order="deterministic")
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError):
        canonical = body
    return hashlib.blake2b(url.encode() + b"\0" + canonical, digest_size=16, person=b"body").digest()


def _decode(decoder: msgspec.json.Decoder[Any], raw: bytes) -> Any:
    """Decode, or say what is wrong and in which field."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        words = str(error)
        path = re.search(r"`\$\.([^`]*)`", words)
        if unknown := re.search(r"unknown field `(.*?)`", words):
            name = unknown[1] if path is None else f"{path[1]}.{unknown[1]}"
            raise _invalid("unsupported_parameter", f"there is no parameter {brief(name)} here", name) from None
        if missing := re.search(r"missing required field `(.*?)`", words):
            name = missing[1] if path is None else f"{path[1]}.{missing[1]}"
            raise _invalid("missing_parameter", f"{name} is missing", name) from None
        name = path[1] if path else ""
        raise _invalid("invalid_parameter", words, name or None) from None
    except (msgspec.DecodeError, UnicodeError) as error:
        reason = str(error).removeprefix("JSON is malformed: ")
        raise _invalid("invalid_json", f"it is no JSON: {reason}") from None
    except RecursionError:
        raise _invalid("invalid_json", "it is nested too deeply") from None


# --- what is asked for ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """A line's requests, and what its response has to know of them.

    Attributes
    ----------
    line : Line
    prompts : sequence
        A request for each of them.
    request : Request
        What they have in common.
    logprobs : int or None
        As the response has them.
    base64 : bool
        Embeddings as text.
    """

    line: Line
    prompts: Sequence[Any]
    request: Request
    logprobs: int | None = None
    base64: bool = False

    def __len__(self) -> int:
        return len(self.prompts)

    def requests(self, meta: Any) -> Iterator[Request]:
        """The requests, one at a time; ``meta`` and its number goes with each."""
        r = self.request
        for i, prompt in enumerate(self.prompts):
            yield Request(
                r.id, prompt, r.kind, r.max_tokens, r.sampling, r.stop, r.n, r.logprobs, r.echo, r.ignore_eos,
                r.priority, r.template, (meta, i),
            )  # fmt: skip


def parse(line: Line, defaults: Defaults) -> Query:
    """Turn a line into what the runner takes.

    Parameters
    ----------
    line : Line
        Without an error.
    defaults : Defaults

    Raises
    ------
    InvalidRequestError
        ``code`` and ``param`` say what is wrong.
    """
    try:
        body = _decode(_bodies[line.url], line.body)
        if isinstance(body, EmbeddingBody):
            return _embedding(line, body)
        if isinstance(body, ChatBody):
            return _chat(line, body, defaults)
        return _completion(line, body, defaults)
    except InvalidRequestError as error:
        raise _located(error, line.number, line.custom_id) from None
    except SamplerError as error:
        code = "unsupported_parameter" if isinstance(error, UnsupportedSchemaError) else "invalid_parameter"
        wrong = _invalid(code, str(error), error.parameter, error.reason or str(error))
        raise _located(wrong, line.number, line.custom_id) from None
    except Exception as error:  # one request's, whatever it is: the others go on
        raise _located(internal(error), line.number, line.custom_id) from None


def _embedding(line: Line, body: EmbeddingBody) -> Query:
    if body.dimensions is not None:
        raise _unsupported("dimensions", "embeddings have as many dimensions as the model's")
    prompts = _prompts(body.input, "input")
    request = Request(str(line.custom_id), "", "embed")
    return Query(line, prompts, request, base64=body.encoding_format == "base64")


def _completion(line: Line, body: CompletionBody, defaults: Defaults) -> Query:
    if body.suffix:
        raise _unsupported("suffix", "nothing can be written before a given end")
    n = body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise _unsupported("best_of", "all n outputs are given back: best_of can only be n")
    prompts = _prompts(body.prompt, "prompt")
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    request = _request(line, body, defaults, "", max_tokens, body.logprobs, echo=body.echo)
    return Query(line, prompts, request, body.logprobs)


def _chat(line: Line, body: ChatBody, defaults: Defaults) -> Query:
    if body.top_logprobs is not None and not body.logprobs:
        raise _invalid("invalid_parameter", "top_logprobs needs logprobs = true", "top_logprobs")
    given = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    max_tokens = defaults.max_tokens if given is None else given
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    template = dict(body.chat_template_kwargs or {})
    for reserved in ("messages", "add_generation_prompt", "bos_token", "eos_token", "template"):
        if reserved in template:
            raise _unsupported("chat_template_kwargs", f"{reserved} is set already")
    if body.reasoning_effort is not None:
        template["reasoning_effort"] = body.reasoning_effort
    if body.tools and body.tool_choice != "none":
        template["tools"] = body.tools
        if body.tool_choice not in (None, "auto"):
            raise _unsupported("tool_choice", "the model cannot be made to call a tool: only 'auto' and 'none'")
    request = _request(line, body, defaults, "", max_tokens, logprobs, template=template)
    return Query(line, [[_message(m, i) for i, m in enumerate(body.messages)]], request, logprobs)


def _request(
    line: Line,
    body: Sampled,
    defaults: Defaults,
    prompt: Any,
    max_tokens: int,
    logprobs: int | None,
    *,
    echo: bool = False,
    template: Mapping[str, Any] | None = None,
) -> Request:
    if body.stream:
        raise _unsupported("stream", "a batch has nobody to stream to")
    max_tokens = min(max_tokens, 2**31 - 1)
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if "" in stop:
        raise _invalid("invalid_parameter", "an empty string cannot stop anything", "stop")
    sampling = SamplingParams(
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        typical_p=1.0 if body.typical_p is None else body.typical_p,
        repeat_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        # penalties are for all of the output, not for its end alone
        penalty_last_n=min(max(max_tokens, 64), 8192),
        seed=_seed(defaults.seed, line.custom_id) if body.seed is None else body.seed % _SEEDS,
        grammar=_grammar(body),
        logit_bias=_bias(body.logit_bias),
    )
    return Request(
        str(line.custom_id), prompt, "generate", max_tokens, sampling, stop, body.n or 1, logprobs, echo,
        body.ignore_eos, body.priority, template or {},
    )  # fmt: skip


def _prompts(given: str | list[Any], name: str) -> list[Any]:
    """Each prompt by itself: text, or token ids."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise _invalid("invalid_parameter", f"{name} is an empty list", name)
    kinds = {type(item) for item in given}
    if kinds == {int}:
        return [_tokens(given, name)]
    if kinds == {str}:
        return given
    if kinds == {list}:
        return [_tokens(item, name) for item in given]
    raise _invalid("invalid_parameter", f"{name} mixes text and tokens", name)


def _tokens(ids: list[int], name: str) -> Any:
    if not all(0 <= token < 2**31 for token in ids):
        bad = next(token for token in ids if not 0 <= token < 2**31)
        raise _invalid("invalid_parameter", f"{name}: {brief(bad)} is no token id", name)
    return np.array(ids, np.int32)


def _message(message: Message, i: int) -> dict[str, Any]:
    """A message as templates know it."""
    facts: dict[str, Any] = msgspec.to_builtins(message)
    at = f"messages[{i}]"
    if message.role == "developer":
        facts["role"] = "system"  # OpenAI's new name for it
    if isinstance(message.content, list):
        for part in message.content:
            if part.type not in ("text", "input_text", "output_text") or part.text is None:
                raise _unsupported(f"{at}.content", f"content of type {brief(part.type)}: only text")
        facts["content"] = "\n".join(str(part.text) for part in message.content)
    facts.setdefault("content", "")
    for call in facts.get("tool_calls", ()):
        arguments = call["function"].setdefault("arguments", {})
        if isinstance(arguments, str):
            try:  # OpenAI sends JSON as text, templates write it out themselves
                call["function"]["arguments"] = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise _invalid(
                    "invalid_parameter", "arguments of a tool call are no JSON", f"{at}.tool_calls"
                ) from None
    return facts


def _grammar(body: Sampled) -> str | None:
    form = body.response_format
    if body.grammar is not None:
        if form is not None and form.type != "text":
            raise _invalid("invalid_parameter", "grammar and response_format cannot both hold", "grammar")
        return body.grammar
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return json_grammar()
    if form.json_schema is None or "schema" not in form.json_schema:
        raise _invalid("missing_parameter", "there is no schema", "response_format.json_schema.schema")
    return schema_grammar(form.json_schema["schema"])


def _bias(given: Bias | None) -> dict[int, float]:
    bias = {}
    for token, value in (given or {}).items():
        if not re.fullmatch(r"[0-9]{1,10}", token, re.ASCII):
            raise _invalid("invalid_parameter", f"logit_bias: {brief(token)} is no token id", "logit_bias")
        bias[int(token)] = value
    return bias


def _seed(seed: int, custom_id: str | None) -> int:
    text = f"{seed} {custom_id}".encode("utf-8", "surrogatepass")
    # below 2**31: there is room above it for the outputs of one request
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little") >> 1


# --- errors -----------------------------------------------------------------------------------------------------------


def _invalid(code: str, words: str, param: str | None = None, reason: str | None = None) -> InvalidRequestError:
    return InvalidRequestError(words, code=code, param=param, reason=reason or words)


def _unsupported(param: str, words: str) -> InvalidRequestError:
    return _invalid("unsupported_parameter", f"{param}: {words}", param)


def internal(error: Exception) -> InvalidRequestError:
    """What nobody has foreseen, as the error of the request that it came of."""
    name = type(error).__name__
    return _invalid("internal", f"{name}: {str(error)[:200]}", reason=name)


def _located(error: LlamaStateError, number: int, custom_id: str | None) -> InvalidRequestError:
    facts = {name: getattr(error, name, None) for name in ("code", "param", "reason")}
    return InvalidRequestError(f"line {number}: {error}", line=number, custom_id=custom_id, **facts)
