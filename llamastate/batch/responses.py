"""OpenAI's batch format, written: what became of a line, as one line of JSON."""

from __future__ import annotations

import base64
import itertools
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from llamastate.batch.openai import Line, Query
from llamastate.batch.request import Output, Result, TokenLogprob
from llamastate.errors import (
    InvalidArgumentError,
    InvalidRequestError,
    LlamaStateError,
    NotEnoughCellsError,
    SamplerError,
    TemplateError,
)

__all__ = ["Names", "error_code", "error_line", "response_line"]

_encoder = msgspec.json.Encoder()


class Names(msgspec.Struct, frozen=True):
    """What responses are told by.

    Parameters
    ----------
    model : str
        The model that answered, whatever the request called it.
    piece : callable
        From a token id to its bytes, control tokens written out.
    """

    model: str
    piece: Callable[[int], bytes]


def response_line(key: str, query: Query, results: Sequence[Result], names: Names) -> bytes:
    """The line of a query whose requests have all succeeded.

    Parameters
    ----------
    key : str
        The line's ``id``.
    query : Query
    results : sequence of Result
        In the order of its prompts.
    names : Names
    """
    if query.request.kind == "embed":
        body = _embeddings(query, results, names)
    else:
        body = _completion(key, query, results, names)
    response = {"status_code": 200, "request_id": key, "body": body}
    return _encoder.encode(
        {"id": key, "custom_id": query.line.custom_id, "response": response, "error": None}
    ) + b"\n"  # fmt: skip


def error_line(key: str, line: Line, error: LlamaStateError) -> bytes:
    """The line of a request that failed."""
    facts: dict[str, Any] = {
        "code": error_code(error),
        "message": _clean(str(error)),
        "type": type(error).__name__,
        "param": next(
            (p for n in ("param", "parameter", "name") if isinstance(p := getattr(error, n, None), str)), None
        ),
    }
    if line.custom_id is None:
        facts["line"] = line.number
    return _encoder.encode({"id": key, "custom_id": line.custom_id, "response": None, "error": facts}) + b"\n"


def error_code(error: LlamaStateError) -> str:
    """The word for programs."""
    if isinstance(error, InvalidRequestError):
        return error.code or "invalid_request"
    if isinstance(error, InvalidArgumentError):
        # of a prompt too long the value is its length
        return "context_length_exceeded" if error.name == "prompt" and type(error.value) is int else "invalid_parameter"
    if isinstance(error, NotEnoughCellsError):
        return "context_length_exceeded"
    if isinstance(error, TemplateError):
        return "invalid_messages"
    if isinstance(error, SamplerError):
        return "invalid_parameter"
    # the class in words: NoKVSlotError is no_kv_slot
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(error).__name__).lower()
    return name.removesuffix("_error")


def _clean(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _usage(results: Sequence[Result], *, generated: bool) -> dict[str, Any]:
    prompt = sum(result.n_prompt for result in results)
    usage: dict[str, Any] = {"prompt_tokens": prompt}
    if generated:
        usage["completion_tokens"] = sum(result.n_generated for result in results)
    usage["total_tokens"] = prompt + usage.get("completion_tokens", 0)
    usage["prompt_tokens_details"] = {"cached_tokens": sum(result.n_cached for result in results)}
    return usage


def _embeddings(query: Query, results: Sequence[Result], names: Names) -> dict[str, Any]:
    data = []
    for i, result in enumerate(results):
        vector: Any = np.ascontiguousarray(result.embedding, dtype="<f4")
        data.append({
            "object": "embedding",
            "index": i,
            "embedding": base64.b64encode(vector).decode() if query.base64 else vector.tolist(),
        })  # fmt: skip
    return {"object": "list", "data": data, "model": names.model, "usage": _usage(results, generated=False)}


def _completion(key: str, query: Query, results: Sequence[Result], names: Names) -> dict[str, Any]:
    chat = query.line.url.endswith("/chat/completions")
    choices: list[dict[str, Any]] = []
    for result in results:
        for output in result.outputs:
            choice: dict[str, Any] = {"index": len(choices)}
            if chat:
                choice["message"] = {"role": "assistant", "content": output.text}
                choice["logprobs"] = _chat_logprobs(output) if query.logprobs is not None else None
            else:
                choice["text"] = output.text
                choice["logprobs"] = _logprobs(query, result, output, names) if query.logprobs is not None else None
            choice["finish_reason"] = output.finish_reason
            if output.finish_reason == "full":
                # OpenAI has no word for a full context; the field is vLLM's. Resuming looks for it (journal.Record)
                choice.update(finish_reason="length", stop_reason="full")
            choices.append(choice)
    return {
        "id": ("chatcmpl-" if chat else "cmpl-") + key.rpartition("_")[2],
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": names.model,
        "choices": choices,
        "usage": _usage(results, generated=True),
    }


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")


def _finite(logprob: float) -> float:
    # JSON has no infinity; OpenAI says -9999 for it
    return float(logprob) if logprob > -9999 else -9999.0


def _chat_logprobs(output: Output) -> dict[str, Any]:
    def facts(piece: bytes, logprob: float) -> dict[str, Any]:
        return {"token": _text(piece), "logprob": _finite(logprob), "bytes": list(piece)}

    content = [
        {**facts(t.piece, t.logprob), "top_logprobs": [facts(piece, logprob) for _, piece, logprob in t.top]}
        for t in output.logprobs or ()
    ]
    return {"content": content, "refusal": None}


def _logprobs(query: Query, result: Result, output: Output, names: Names) -> dict[str, Any]:
    tokens: list[TokenLogprob | None] = list(output.logprobs or ())
    pieces = [t.piece for t in output.logprobs or ()]
    if query.request.echo:
        pieces = [names.piece(int(token)) for token in result.prompt_tokens] + pieces
        tokens = list(result.prompt_logprobs or [None] * len(result.prompt_tokens)) + tokens
    texts = [_text(piece) for piece in pieces]
    tops = [
        None if t is None or not query.logprobs else {_text(piece): _finite(lp) for _, piece, lp in t.top}
        for t in tokens
    ]
    return {
        "tokens": texts,
        "token_logprobs": [None if t is None else _finite(t.logprob) for t in tokens],
        "top_logprobs": tops if query.logprobs else None,
        "text_offset": list(itertools.accumulate(map(len, texts[:-1]), initial=0)) if texts else [],
    }
