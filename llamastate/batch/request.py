"""The words of a batch: what is asked for, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from llamastate.arrays import Int32Array, TokensLike
from llamastate.errors import LlamaStateError
from llamastate.sampler import SamplingParams

__all__ = ["Embedding", "Malformed", "Output", "Prompt", "Request", "Result", "Times", "TokenLogprob"]

#: Text, token ids, or the messages of a chat.
Prompt: TypeAlias = str | TokensLike | Sequence[Mapping[str, Any]]
#: One vector of Euclidean length 1, float32[n_embd_out].
Embedding: TypeAlias = npt.NDArray[np.float32]

FinishReason: TypeAlias = Literal["stop", "length", "full"]


@dataclass(frozen=True, slots=True, eq=False)  # arrays inside: equal is who is the same
class Request:
    """One prompt, and what is to become of it.

    Nothing is checked here: whatever is wrong with a request becomes the ``error`` of its :class:`Result`.

    Parameters
    ----------
    id : str
        The caller's name for it. It need not be unique; results are told apart by it and by ``meta`` alone.
    prompt : str, array-like of int, or sequence of mapping
        Text (tokenised with BOS where the model wants one, control tokens read as plain text), token ids as they are,
        or chat messages, written by the model's own template up to where the assistant begins. Messages are the way to
        chat: what :meth:`~llamastate.Model.apply_chat_template` has written is full of control tokens, and as mere text
        it means nothing to the model. Give it with ``parse_special``, if it has to be text.
    kind : {"generate", "embed"}
        Go on with the prompt, or turn it into one vector.
    max_tokens : int
        At most so many tokens for each output; 0 only processes the prompt.
    sampling : SamplingParams
        How to choose a token; greedy by default, also with a ``seed`` or ``top_p``: chance begins with a
        ``temperature`` above 0. Output ``i`` of ``n`` draws with ``seed + i``.
    stop : tuple of str, or str
        An output ends before the first of these.
    n : int
        How many outputs, all from one prompt that is processed once.
    logprobs : int, optional
        Keep for every token its log probability and those of so many most likely ones (0: only its own). They are the
        model's own: before bias, grammar, penalties and temperature.
    echo : bool
        The text of every output begins with the prompt's. With ``logprobs``, those of the prompt's tokens come along
        as :attr:`Result.prompt_logprobs`; nothing of the prompt is shared then, as all of it has to be computed.
    ignore_eos : bool
        Never end by an end-of-generation token: none is chosen.
    priority : int
        Higher goes first, among what has been read.
    template : mapping
        More names for the chat template (``tools``, ``enable_thinking``, ...).
    meta : object
        Handed back untouched.
    parse_special : bool
        Control tokens in a text are what their names say, and nothing is put before it: it is read as messages are once
        the template has written them. Not for text that others may have written.
    """

    id: str
    prompt: Prompt
    kind: Literal["generate", "embed"] = "generate"
    max_tokens: int = 16
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] | str = ()
    n: int = 1
    logprobs: int | None = None
    echo: bool = False
    ignore_eos: bool = False
    priority: int = 0
    template: Mapping[str, Any] = field(default_factory=dict)
    meta: Any = None
    parse_special: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Malformed:
    """What could not even be read as a request: it takes its place in the queue, and comes back as a failed result."""

    id: str
    error: LlamaStateError
    meta: Any = None


class TokenLogprob(NamedTuple):
    """How likely the model found a token.

    ``top`` holds the most likely ones, the best first, each as (token, piece, logprob). ``piece`` are the token's
    bytes, which need not be whole characters; of a control token they are its name.
    """

    token: int
    piece: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """One continuation of a prompt.

    Parameters
    ----------
    index : int
        Which of the ``n``.
    text : str
        Without the stop string, and without what came after it.
    tokens : int32[k]
        All that were chosen and kept, the one that completed a stop string too; an end-of-generation token is none of
        them.
    finish_reason : {"stop", "length", "full"}
        A stop string or an end-of-generation token; ``max_tokens``; no room in the context for more.
    logprobs : list of TokenLogprob, optional
        One for each of ``tokens``, if they were asked for.
    """

    index: int
    text: str
    tokens: Int32Array
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None


class Times(NamedTuple):
    """Seconds since the runner has read the request. ``None`` for what never came."""

    queued: float | None = None
    first_token: float | None = None
    total: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """What became of a request.

    Parameters
    ----------
    id, meta
        The request's.
    outputs : tuple of Output
        ``n`` of them in order, or none if the request failed or asked for an embedding.
    embedding : float32[n_embd_out], optional
    n_prompt : int
        Tokens of the prompt.
    n_cached : int
        How many of them were not computed for this request: shared with others, or from the store.
    prompt_tokens : int32[n_prompt]
    prompt_logprobs : list, optional
        One for each token of the prompt, None for the first, if ``echo`` and ``logprobs`` asked for them.
    error : LlamaStateError, optional
        Why there are no outputs.
    times : Times
    preemptions : int
        How often it had to make room for others. That changes nothing in its outputs.
    """

    id: str
    outputs: tuple[Output, ...] = ()
    embedding: Embedding | None = None
    n_prompt: int = 0
    n_cached: int = 0
    prompt_tokens: Int32Array = field(default_factory=lambda: np.empty(0, np.int32))
    prompt_logprobs: list[TokenLogprob | None] | None = None
    error: LlamaStateError | None = None
    meta: Any = None
    times: Times = field(default_factory=Times)
    preemptions: int = 0

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return self.error is None

    @property
    def n_generated(self) -> int:
        """Tokens of all outputs."""
        return sum(len(output.tokens) for output in self.outputs)
