"""Ray Data's rows: into requests, and results into columns.

A row is read as OpenAI's batch format is (:mod:`llamastate.batch.openai`), with the names that vLLM's sampling
parameters have: whatever would change the result and cannot be kept is refused, never ignored.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa

from llamastate.arrays import Int32Array, as_tokens
from llamastate.batch.openai import Defaults, Line, parse
from llamastate.batch.request import Malformed, Request, Result, TokenLogprob
from llamastate.errors import InvalidRequestError, LlamaStateError
from llamastate.sampler import SamplingParams
from llamastate.words import brief

if TYPE_CHECKING:
    from llamastate.model import Model

__all__ = ["ERROR", "Answered", "Reader", "answer", "append", "pack", "schema"]

#: Why a row failed; null if it did not.
ERROR = "__inference_error__"
#: What is read of a row as it is.
_PLAIN = ("prompt", "tokenized_prompt", ERROR)
#: What has fields of its own, and goes from block to batch as bytes.
_NESTED = ("messages", "sampling_params", "tools", "chat_template_kwargs")
_PACKED = "__llamastate_row__"

#: Parameters of vLLM that mean nothing here, as long as they have these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "detokenize": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "include_stop_str_in_output": (False,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "n": (1,),
    "output_kind": (0, 2),
}


def schema(*, embed: bool, logprobs: bool) -> pa.Schema:
    """The columns that a row gets, in this order. They are the same for rows that failed."""
    tokens = pa.list_(pa.int32())
    metrics = [
        ("finish_reason", pa.string()),
        ("num_cached_tokens", pa.int64()),
        ("queued_seconds", pa.float64()),
        ("first_token_seconds", pa.float64()),
        ("preemptions", pa.int64()),
    ]
    columns = [
        ("prompt", pa.string()),
        ("prompt_token_ids", tokens),
        ("num_input_tokens", pa.int64()),
        ("generated_tokens", tokens),
        ("generated_text", pa.string()),
        ("num_generated_tokens", pa.int64()),
        ("metrics", pa.struct(metrics)),
        ("request_id", pa.int64()),
        ("time_taken_llm", pa.float64()),
        ("params", pa.string()),
        (ERROR, pa.string()),
    ]
    if embed:
        columns.append(("embeddings", pa.list_(pa.float32())))
    if logprobs:
        each = [("token", pa.int32()), ("logprob", pa.float32())]
        columns.append(("logprobs", pa.list_(pa.struct([*each, ("top", pa.list_(pa.struct(each)))]))))
    return pa.schema(columns)


def pack(table: pa.Table) -> pa.Table:
    """The table with a column of all that has fields of its own, as bytes.

    For each block by itself, before Ray joins blocks to batches: there, a struct that is null becomes one of zeros if
    the other block has more fields, and ``max_tokens`` would be 0.
    """
    found = table.select([name for name in _NESTED if name in table.column_names]).to_pylist()
    packed = [msgspec.msgpack.encode(_without_none(row), enc_hook=_plain) for row in found]
    return table.append_column(_PACKED, pa.array(packed, pa.binary(), size=table.num_rows))


def append(table: pa.Table, answers: list[dict[str, Any]], columns: pa.Schema) -> pa.Table:
    """The table with these columns in place of any of the same names, without a copy of the others."""
    table = table.drop_columns([name for name in table.column_names if name in (*columns.names, _PACKED)])
    for column in columns:
        values = pa.array((answer.get(column.name) for answer in answers), column.type, size=len(answers))
        table = table.append_column(column, values)
    return table


# --- rows to requests -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """What a row's answer has to know of its question."""

    owner: Any
    index: int
    number: int
    prompt: str | None
    params: str


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """A row that had failed before it came here."""

    index: int
    facts: dict[str, Any]


class Reader:
    """Turns rows into requests, and their results into answers.

    Parameters
    ----------
    model : Model
        Its template writes messages.
    embed : bool
        Embeddings, not text.
    logprobs : bool
        Whether rows may ask for them.
    sampling_params : mapping
        For what a row's own do not say.
    seed : int
        A row without a seed gets one that is made of this, of what it asks, and of how often that was asked in its
        batch before: the same in every run.
    """

    def __init__(
        self,
        model: Model,
        *,
        embed: bool = False,
        logprobs: bool = False,
        sampling_params: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self._model = model
        self._kind = "embed" if embed else "generate"
        self._logprobs = logprobs
        self._given = _without_none(dict(sampling_params or {}))
        self._defaults = Defaults(seed=seed, max_tokens=16)
        self._n_rows = 0

    def read(self, table: pa.Table, owner: Any) -> Iterable[Request | Malformed | Answered]:
        """A request for each row, as it is asked for; ``owner`` is in the ``meta`` of each."""
        found = table.select([name for name in (*_PLAIN, _PACKED) if name in table.column_names])
        asked: Counter[bytes] = Counter()
        for index, row in enumerate(found.to_pylist()):
            row.update(msgspec.msgpack.decode(row.pop(_PACKED)))
            number, self._n_rows = self._n_rows, self._n_rows + 1
            if row.get(ERROR):
                text = row.get("prompt")
                yield Answered(index, _unanswered(number, text if isinstance(text, str) else None, row[ERROR]))
            else:
                text = row.get("prompt")
                meta = _Asked(owner, index, number, text if isinstance(text, str) else None, "")
                yield self._request(row, meta, asked)

    def _request(self, row: Mapping[str, Any], meta: _Asked, asked: Counter[bytes]) -> Request | Malformed:
        number = meta.number
        try:
            chosen, prompt, text = self._prompt(row)
            meta = replace(meta, prompt=text)
            if self._kind == "embed":
                return Request(str(number), prompt, "embed", meta=meta)
            request = self._parse(row, chosen, prompt, asked)
            return replace(request, id=str(number), prompt=prompt, meta=replace(meta, params=_described(request)))
        except LlamaStateError as error:
            return Malformed(str(number), _of_row(error), meta)
        except Exception as error:  # a row can hold anything
            reason = f"{type(error).__name__}: {error}"
            return Malformed(str(number), InvalidRequestError(reason, code="invalid_row", reason=reason), meta)

    def _prompt(self, row: Mapping[str, Any]) -> tuple[str, Any, str | None]:
        """Which column is the prompt, what it is for the runner, and its text."""
        text = row.get("prompt")
        tokens = row.get("tokenized_prompt")
        if tokens is not None:
            return "tokenized_prompt", as_tokens(tokens, self._model.n_vocab), text if isinstance(text, str) else None
        messages = row.get("messages")
        if messages is not None:
            return ("messages", *self._chat(messages, row))
        if text is None:
            raise _bad("missing_parameter", "prompt", "there is no prompt, messages or tokenized_prompt")
        if not isinstance(text, str):
            raise _bad("invalid_parameter", "prompt", f"prompt is {type(text).__name__}, not text")
        return "prompt", text, text

    def _chat(self, messages: Any, row: Mapping[str, Any]) -> tuple[Int32Array, str]:
        body: dict[str, Any] = {"messages": messages, "temperature": 0}
        body |= {name: row[name] for name in ("tools", "chat_template_kwargs") if name in row}
        query = parse(_line("/v1/chat/completions", body, "row"), self._defaults)
        text = self._model.apply_chat_template(query.prompts[0], **query.request.template)
        return self._model.tokenize(text, add_special=False, parse_special=True), text

    def _parse(self, row: Mapping[str, Any], chosen: str, prompt: Any, asked: Counter[bytes]) -> Request:
        params = self._params(row.get("sampling_params"))
        body = {**params, "prompt": ""}
        name = ""
        if "seed" not in params:
            what = hashlib.blake2b(msgspec.json.encode(params, enc_hook=_plain, order="deterministic"), digest_size=16)
            what.update(prompt.encode("utf-8", "surrogatepass") if chosen == "prompt" else prompt.tobytes())
            asked[what.digest()] += 1
            name = f"{what.hexdigest()} {asked[what.digest()]}"
        return parse(_line("/v1/completions", body, name or "row"), self._defaults).request

    def _params(self, given: Any) -> dict[str, Any]:
        if given is None:
            given = {}
        if not isinstance(given, Mapping):
            raise _bad("invalid_parameter", "sampling_params", f"sampling_params is {type(given).__name__}")
        params = {**self._given, **given}
        for name, values in _NEUTRAL.items():
            if name in params:
                value = params.pop(name)
                if value not in values:
                    raise _bad("unsupported_parameter", name, f"{name} can only be {values[0]}")
        if "logprobs" in params and not self._logprobs:
            raise _bad("unsupported_parameter", "logprobs", "logprobs have no column unless the processor has logprobs")
        if "echo" in params or "prompt" in params:
            raise _bad("unsupported_parameter", "echo", "the prompt has a column of its own")
        for name in ("structured_outputs", "guided_decoding"):
            if name in params:
                params.update(_structured(params.pop(name), name))
        return params


def _structured(given: Any, name: str) -> dict[str, Any]:
    """Constraints as vLLM has them in OpenAI's words. A schema may be given as text, which Arrow leaves as it is."""
    if not isinstance(given, Mapping) or len(given) != 1:
        raise _bad("invalid_parameter", name, f"{name} needs one of json, json_object, grammar")
    ((kind, value),) = given.items()
    if kind == "grammar":
        return {"grammar": value}
    if kind == "json_object":
        return {"response_format": {"type": "json_object"}} if value else {}
    if kind == "json":
        shape = msgspec.json.decode(value) if isinstance(value, str) else value
        return {"response_format": {"type": "json_schema", "json_schema": {"schema": shape}}}
    raise _bad("unsupported_parameter", name, f"{name}: only json, json_object and grammar, not {brief(kind)}")


def _line(url: str, body: Mapping[str, Any], name: str) -> Line:
    return Line(1, name, url, msgspec.json.encode(body, enc_hook=_plain), b"")


def _plain(value: Any) -> Any:
    """What NumPy made of JSON."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is nothing that JSON knows")


def _without_none(value: Any) -> Any:
    # Arrow gives each row the fields of all others, and nothing in them
    if isinstance(value, Mapping):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_without_none(item) for item in value]
    return value


def _described(request: Request) -> str:
    """What held, as JSON: what is not said was as by default."""
    usual = SamplingParams()
    facts: dict[str, Any] = {"max_tokens": request.max_tokens}
    for one in fields(SamplingParams):
        value = getattr(request.sampling, one.name)
        if value != getattr(usual, one.name) and one.name != "penalty_last_n":
            facts[one.name] = value if one.name != "logit_bias" else {str(token): bias for token, bias in value.items()}
    if request.sampling.is_greedy:
        facts.pop("seed", None)
        facts["temperature"] = 0.0
    if request.stop:
        facts["stop"] = request.stop
    if request.ignore_eos:
        facts["ignore_eos"] = True
    return msgspec.json.encode(facts).decode()


def _bad(code: str, param: str, words: str) -> InvalidRequestError:
    return InvalidRequestError(words, code=code, param=param, reason=words)


def _of_row(error: LlamaStateError) -> LlamaStateError:
    """The error without the line that rows do not have."""
    if not isinstance(error, InvalidRequestError) or error.line is None:
        return error
    words = str(error).removeprefix(f"line {error.line}: ")
    return InvalidRequestError(words, code=error.code, param=error.param, reason=error.reason)


# --- results to rows --------------------------------------------------------------------------------------------------


def answer(result: Result) -> tuple[int, dict[str, Any]]:
    """Which row it is of, and its columns."""
    asked: _Asked = result.meta
    error = result.error
    facts = _unanswered(asked.number, asked.prompt, None if error is None else f"{type(error).__name__}: {error}")
    facts["prompt_token_ids"] = result.prompt_tokens
    facts["num_input_tokens"] = len(result.prompt_tokens)
    facts["time_taken_llm"] = result.times.total
    facts["params"] = asked.params
    if error is not None:
        return asked.index, facts
    facts["embeddings"] = result.embedding
    metrics: dict[str, Any] = {
        "finish_reason": None,
        "num_cached_tokens": result.n_cached,
        "queued_seconds": result.times.queued,
        "first_token_seconds": result.times.first_token,
        "preemptions": result.preemptions,
    }
    facts["metrics"] = metrics
    if result.outputs:
        output = result.outputs[0]
        metrics["finish_reason"] = output.finish_reason
        facts["generated_tokens"] = output.tokens
        facts["generated_text"] = output.text
        facts["num_generated_tokens"] = len(output.tokens)
        if output.logprobs is not None:
            facts["logprobs"] = [_scored(one) for one in output.logprobs]
    return asked.index, facts


def _unanswered(number: int, prompt: str | None, error: str | None) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "prompt_token_ids": [],
        "num_input_tokens": 0,
        "generated_tokens": [],
        "generated_text": "",
        "num_generated_tokens": 0,
        "request_id": number,
        "time_taken_llm": 0.0,
        "params": "",
        ERROR: error,
    }


def _scored(one: TokenLogprob) -> dict[str, Any]:
    top = [{"token": token, "logprob": logprob} for token, _, logprob in one.top]
    return {"token": one.token, "logprob": one.logprob, "top": top}
