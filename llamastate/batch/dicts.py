"""Rows instead of lines: dicts in, the same with what came of them out.

A row asks by one of the columns ``messages`` (a list of role and content, or JSON), ``prompt`` (text),
``tokenized_prompt`` (token ids) or ``input`` (text to embed). ``sampling_params`` (a struct, or JSON) has the rest, by
the names of OpenAI's and vLLM's APIs; ``custom_id`` is the number of the row where there is no such column (``row 7``
where it is null). The row comes back with these columns added:

=======================  ===========================================================================================
``generated_text``       the first output
``finish_reason``        its end: ``stop`` or ``length``
``num_input_tokens``     of the prompt
``num_cached_tokens``    those of them that were not computed for this row
``num_generated_tokens`` of all outputs
``embedding``            the vector, if one was asked for; of a list of inputs that of the first
``request_id``           of the result, made of what was asked and of the run
``response``             the whole response as JSON: further outputs and vectors, log probabilities. A single vector is
                         not repeated there
``__inference_error__``  None, or what went wrong: "Type: message"
=======================  ===========================================================================================
"""

from __future__ import annotations

import base64
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llamastate.batch.journal import key_of, run_digest
from llamastate.batch.openai import Defaults, Line, parse, read_line
from llamastate.batch.pipeline import Pending, facts_of, names_of
from llamastate.batch.request import Malformed, Request
from llamastate.batch.responses import error_line
from llamastate.errors import InvalidRequestError

__all__ = ["ASKING", "COLUMNS", "columns_of", "row_line", "run_rows"]

#: Columns that ask, the first that is there counts.
ASKING = ("messages", "prompt", "tokenized_prompt", "input")
#: Columns that are added, and their types in a table.
COLUMNS = {
    "generated_text": "string",
    "finish_reason": "string",
    "num_input_tokens": "int64",
    "num_cached_tokens": "int64",
    "num_generated_tokens": "int64",
    "embedding": "floats",
    "request_id": "string",
    "response": "string",
    "__inference_error__": "string",
}


def run_rows(rows: Iterable[Mapping[str, Any]], runner: Any, *, defaults: Defaults | None = None,
             model_name: str | None = None) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Answer rows: no file, no journal.

    Parameters
    ----------
    rows : iterable of mapping
        Read as they are needed.
    runner : BatchRunner
    defaults : Defaults, optional
        For rows that do not say.
    model_name : str, optional
        For the responses.

    Yields
    ------
    dict
        The row with the columns above added, as soon as it is done: in any order.
    """
    defaults, names = defaults or Defaults(), names_of(runner, model_name)
    run = run_digest(facts_of(runner, defaults))

    def requests() -> Iterator[Request | Malformed]:
        for i, row in enumerate(rows):
            raw = row_line(row, i)
            line = raw if isinstance(raw, Line) else read_line(raw, i + 1)
            key = key_of(line, run).id
            try:
                if line.error is not None:
                    raise line.error
                query = parse(line, defaults)
            except InvalidRequestError as error:
                yield Malformed(str(line.custom_id), error, (row, error_line(key, line, error)))
                continue
            yield from query.requests((row, Pending(key, query)))

    for result in runner.run(requests()):
        if isinstance(result.meta[1], bytes):
            yield _joined(*result.meta)
            continue
        (row, pending), i = result.meta
        if pending.put(i, result):
            found = pending.response(names)
            yield _joined(
                row, found if isinstance(found, bytes) else error_line(pending.key, pending.query.line, found)
            )


def row_line(row: Any, i: int) -> bytes | Line:
    """A row as a line, or why it can be none."""
    custom_id = str(i)
    try:
        if not isinstance(row, Mapping):
            raise _unlike(f"a row is {type(row).__name__}, not a mapping")
        if (given := row.get("custom_id")) is not None:
            custom_id = str(given)
        elif "custom_id" in row:
            custom_id = f"row {i}"  # a number alone another row may well have
        return json.dumps(_asked(row, custom_id), default=_plain).encode("utf-8", "surrogatepass")
    except Exception as error:  # a row can hold anything
        wrong = (
            error if isinstance(error, InvalidRequestError) else _unlike(f"{type(error).__name__}: {str(error)[:200]}")
        )
        digest = hashlib.blake2b(f"{custom_id} {wrong}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
        return Line(i + 1, custom_id, "", b"", digest, wrong)


def _unlike(words: str) -> InvalidRequestError:
    return InvalidRequestError(words, code="invalid_row", reason=words)


def _asked(row: Mapping[str, Any], custom_id: str) -> dict[str, Any]:
    body = _decoded(row.get("sampling_params")) or {}
    body = {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body
    asked = [name for name in ASKING if row.get(name) is not None]
    url = "/v1/completions"
    if isinstance(body, dict):
        if "messages" in asked:
            url = "/v1/chat/completions"
            messages = _decoded(row["messages"])
            body["messages"] = _without_nulls(messages) if isinstance(messages, list) else messages
            if isinstance(body.get("logprobs"), int) and not isinstance(body["logprobs"], bool):
                # vLLM's parameters have a number here, OpenAI's chats have two fields
                body["top_logprobs"], body["logprobs"] = body["logprobs"], True
        elif "tokenized_prompt" in asked:
            given = row["tokenized_prompt"]
            body["prompt"] = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else given
        elif "prompt" in asked:
            body["prompt"] = row["prompt"]
        elif "input" in asked:
            url, body["input"] = "/v1/embeddings", row["input"]
    return {"custom_id": custom_id, "url": url, "body": body}


def _plain(value: Any) -> Any:
    """NumPy's arrays and numbers as Python's."""
    if not hasattr(value, "tolist"):
        raise TypeError(f"{type(value).__name__} is nothing that JSON knows")
    return value.tolist()


def _decoded(value: Any) -> Any:
    if not isinstance(value, (str, bytes)):
        return dict(value) if isinstance(value, Mapping) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _without_nulls(messages: list[Any]) -> list[Any]:
    """In a table every message has the fields of all."""
    return [
        {name: value for name, value in message.items() if value is not None or name == "content"}
        if isinstance(message, Mapping)
        else message
        for message in messages
    ]


def columns_of(written: bytes) -> dict[str, Any]:
    """The columns that a line of output stands for."""
    record = json.loads(written)
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row["request_id"] = record["id"]
    if record["error"] is not None:
        row["__inference_error__"] = f"{record['error']['type']}: {record['error']['message']}"
        return row
    body = record["response"]["body"]
    usage = body["usage"]
    row["num_input_tokens"] = usage["prompt_tokens"]
    row["num_cached_tokens"] = usage["prompt_tokens_details"]["cached_tokens"]
    row["num_generated_tokens"] = usage.get("completion_tokens")
    if "data" in body:
        row["embedding"] = _vector(body["data"][0]["embedding"])
        if len(body["data"]) == 1:
            body["data"][0]["embedding"] = None  # as text it would take three times the room
        row["response"] = json.dumps(body, ensure_ascii=False)
        return row
    choice = body["choices"][0]
    row["generated_text"] = choice["text"] if "text" in choice else choice["message"]["content"]
    row["finish_reason"] = choice["finish_reason"]
    row["response"] = json.dumps(body, ensure_ascii=False)
    return row


def _vector(given: Any) -> Any:
    """A vector as the API has it: numbers, or base64 of float32."""
    return array("f", base64.b64decode(given)).tolist() if isinstance(given, str) else given


def _joined(row: Any, written: bytes) -> dict[str, Any]:
    return {**(row if isinstance(row, Mapping) else {"row": row}), **columns_of(written)}
