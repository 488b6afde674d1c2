"""What lines of OpenAI's batch format may hold, as types: a name that is not here is refused by the decoder."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

__all__ = [
    "BODIES",
    "Bias",
    "ChatBody",
    "CompletionBody",
    "EmbeddingBody",
    "Envelope",
    "Loose",
    "Message",
    "Sampled",
]

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Positive = Annotated[int, msgspec.Meta(ge=1)]
_Some = Annotated[int, msgspec.Meta(ge=1, le=128)]
Bias = dict[str, float]


class Envelope(msgspec.Struct):
    """A line."""

    url: str
    body: msgspec.Raw
    method: str = "POST"
    custom_id: str | None = None


class Loose(msgspec.Struct):
    """Of a line that is wrong somewhere: its name, for the error."""

    custom_id: Any = None


class Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What all bodies may have and nothing comes of."""

    model: str | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class Part(msgspec.Struct):
    type: str
    text: str | None = None


class Function(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any] = "{}"


class Call(msgspec.Struct, kw_only=True):
    function: Function
    type: Literal["function"] = "function"
    id: str | None = None


class Message(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """One of a chat."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None


class Format(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class Sampled(Body, kw_only=True):
    """What both kinds of completion have."""

    max_tokens: _Count | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    n: _Some | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Bias | None = None
    response_format: Format | None = None
    stream: bool | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    typical_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0)] | None = None
    ignore_eos: bool = False
    grammar: str | None = None
    priority: int = 0


class ChatBody(Sampled, kw_only=True):
    """Of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(Sampled, kw_only=True):
    """Of ``/v1/completions``."""

    prompt: str | list[str | int | list[int]]
    echo: bool = False
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    best_of: _Positive | None = None
    suffix: str | None = None


class EmbeddingBody(Body, kw_only=True):
    """Of ``/v1/embeddings``."""

    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


#: By the address that they are sent to.
BODIES: dict[str, type[ChatBody | CompletionBody | EmbeddingBody]] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/embeddings": EmbeddingBody,
}
