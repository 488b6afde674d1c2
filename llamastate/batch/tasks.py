"""Requests under way: what was asked for, checked, and what has come of it so far."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llamastate._native import consts
from llamastate.arrays import Int32Array, as_index, as_tokens
from llamastate.batch.jobs import Job
from llamastate.batch.request import FinishReason, Output, Request, Result, Times, TokenLogprob
from llamastate.errors import InvalidArgumentError, LlamaStateError, TokenizeError
from llamastate.sampler import Sampler, SamplingParams
from llamastate.textstream import TextStream
from llamastate.words import brief

if TYPE_CHECKING:
    from llamastate.model import Model

__all__ = ["MAX_OUTPUTS", "Pieces", "Task", "Ticket", "token_logprob"]

#: Of one request.
MAX_OUTPUTS = 1024
#: Grammars that need no second look; a file with a new one in each line is not to fill the memory.
MAX_KNOWN_GRAMMARS = 1000


class Pieces:
    """What tokens are written as, looked up once each."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._known: dict[int, tuple[bytes, bool]] = {}
        self._enders: dict[int, float] | None = None
        self._sound: set[tuple[str | None, str]] = set()

    def __call__(self, token: int) -> tuple[bytes, bool]:
        """Bytes of a token, and whether it ends generation."""
        found = self._known.get(token)
        if found is None:
            if self._model.has_vocab:
                found = self._model.token_to_piece(token), self._model.is_eog(token)
            else:
                found = b"", False
            self._known[token] = found
        return found

    def name(self, token: int) -> bytes:
        """Bytes of a token; a control token's name."""
        return self._model.token_to_piece(token, special=True) if self._model.has_vocab else b""

    def check(self, params: SamplingParams) -> None:
        """Refuse what no sampler can be made of, before a prompt is computed for it. Raises :class:`SamplerError`."""
        grammar = params.grammar, params.grammar_root
        if is_plain(params) or (grammar in self._sound and not params.logit_bias):
            return
        Sampler(self._model, params).close()
        if len(self._sound) < MAX_KNOWN_GRAMMARS:
            self._sound.add(grammar)

    @property
    def enders(self) -> dict[int, float]:
        """A bias that forbids every token that ends generation."""
        if self._enders is None:
            model = self._model
            ids = range(model.n_vocab) if model.has_vocab else ()
            self._enders = {token: -np.inf for token in ids if model.is_eog(token)}
        return self._enders


class Ticket:
    """A request under way.

    Parameters
    ----------
    request : Request
    model : Model
    pieces : Pieces
    since : float
        When it was read, as ``time.perf_counter`` tells.

    Raises
    ------
    LlamaStateError
        Something is wrong with the request.
    """

    def __init__(self, request: Request, model: Model, pieces: Pieces, since: float) -> None:
        self.request = request
        self.since = since
        self.queued: float | None = None
        self.first: float | None = None
        self.n_cached = 0
        #: Logits after the prompt, for the twins.
        self.logits: npt.NDArray[np.float32] | None = None
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.tokens = np.empty(0, np.int32)
        self.tasks: list[Task] = []
        self._outputs: dict[int, Output] = {}
        _check(request, model)
        self.tokens = prompt_tokens(request, model)
        if request.kind == "embed":
            return
        pieces.check(request.sampling)
        scores_prompt = request.echo and request.logprobs is not None
        if scores_prompt:
            self.prompt_logprobs = [None]
        first: Task | None = None
        for index in range(request.n if request.max_tokens else 1):
            task = Task(self, index, first, share=not scores_prompt)
            first = first or task
            self.tasks.append(task)
        self._pieces = pieces
        self._prefix = ""
        if request.echo:
            text = request.prompt
            self._prefix = text if isinstance(text, str) else _written(model, self.tokens)

    @property
    def preemptions(self) -> int:
        """How often its tasks were parked."""
        return sum(task.preemptions for task in self.tasks)

    def put(self, task: Task, reason: FinishReason) -> bool:
        """One output is done; whether all are."""
        rest = task.stream.finish() if task.stream is not None else ""
        text = self._prefix + "".join(task.text) + rest
        output = Output(task.index, text, np.array(task.chosen, np.int32), reason, task.logprobs)
        self._outputs[task.index] = output
        if not self.request.max_tokens:
            for index in range(1, self.request.n):
                self._outputs[index] = replace(output, index=index)
        return len(self._outputs) == self.request.n

    def result(
        self, *, embedding: npt.NDArray[np.float32] | None = None, error: LlamaStateError | None = None
    ) -> Result:
        """What is handed back."""
        outputs = () if error is not None else tuple(self._outputs[i] for i in sorted(self._outputs))
        return Result(
            self.request.id,
            outputs,
            embedding,
            len(self.tokens),
            self.n_cached if error is None else 0,
            self.tokens,
            self.prompt_logprobs if error is None else None,
            error,
            self.request.meta,
            Times(self.queued, self.first, time.perf_counter() - self.since),
            self.preemptions,
        )


class Task(Job):
    """One output of a request: the scheduler's job, and the text that comes of it."""

    __slots__ = ("chosen", "index", "logprobs", "sampler", "state", "stored", "stream", "text", "ticket")

    def __init__(self, ticket: Ticket, index: int, first: Task | None, *, share: bool) -> None:
        request = ticket.request
        super().__init__(ticket.tokens, request.max_tokens, priority=request.priority, share=share, twin_of=first)
        self.ticket = ticket
        self.index = index
        #: Made when the task begins; None for plain greedy sampling.
        self.sampler: Sampler | None = None
        stop: Any = request.stop
        self.stream: TextStream | None = TextStream((stop,) if isinstance(stop, str) else stop)
        self.text: list[str] = []
        self.chosen: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if request.logprobs is None else []
        #: Where its state is while it is parked.
        self.state: Any = None
        #: What the store had of it, and when that was asked.
        self.stored = (-1, 0)

    def begin(self, model: Model, pieces: Pieces) -> None:
        """Make the sampler. Raises :class:`SamplerError`."""
        params = self.ticket.request.sampling
        if self.ticket.request.ignore_eos and pieces.enders:
            params = replace(params, logit_bias={**params.logit_bias, **pieces.enders})
        if is_plain(params):
            return
        if self.index and params.seed is not None:
            params = replace(params, seed=(params.seed + self.index) % (consts.DEFAULT_SEED - 1))
        self.sampler = Sampler(model, params)

    def end(self) -> None:
        """Let go what it has."""
        if self.sampler is not None:
            self.sampler.close()
        self.sampler = None
        self.state = None

    @property
    def in_context(self) -> Int32Array:
        """The tokens that its sequence holds, or held when it was parked."""
        n = self.held or self.preserved
        if n <= self.n_prompt:
            return self.tokens[:n]
        return np.concatenate([self.tokens, np.array(self.chosen[: n - self.n_prompt], np.int32)])


def is_plain(params: SamplingParams) -> bool:
    """Whether the choice is nothing but the largest logit."""
    return (
        params.is_greedy
        and params.grammar is None
        and not params.logit_bias
        and (params.repeat_penalty, params.frequency_penalty, params.presence_penalty) == (1, 0, 0)
    )


def token_logprob(row: npt.NDArray[np.float32], token: int, n_top: int, pieces: Pieces) -> TokenLogprob:
    """How likely a row of logits finds a token, and the most likely ones."""
    peak = row.max()
    norm = float(peak) + float(np.log(np.exp(row - peak).sum(dtype=np.float64)))
    top: tuple[tuple[int, bytes, float], ...] = ()
    if n_top:
        best = np.argpartition(row, -n_top)[-n_top:]
        best = best[np.lexsort((best, -row[best]))]
        top = tuple((int(t), pieces.name(int(t)), float(row[t]) - norm) for t in best)
    return TokenLogprob(token, pieces.name(token), float(row[token]) - norm, top)


def prompt_tokens(request: Request, model: Model) -> Int32Array:
    """The tokens of a prompt of any kind."""
    prompt: Any = request.prompt
    if isinstance(prompt, (str, bytes)):
        special = bool(request.parse_special)
        tokens = np.empty(0, np.int32)
        if prompt:
            tokens = model.tokenize(prompt, add_special=not special, parse_special=special)
    elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        text = model.apply_chat_template(prompt, **request.template)
        tokens = model.tokenize(text, add_special=False, parse_special=True)
    else:
        try:
            tokens = as_tokens(prompt, model.n_vocab)
        except TokenizeError:
            if (what := _no_prompt(prompt)) is None:
                raise
            raise InvalidArgumentError(
                f"prompt is {what}: text, token ids, or a list of chat messages",
                name="prompt",
                value=prompt,
                limit="text, token ids, or a list of chat messages",
            ) from None
    if not len(tokens):
        raise InvalidArgumentError("the prompt is empty", name="prompt", value=prompt, limit="at least one token")
    return tokens


def _no_prompt(prompt: Any) -> str | None:
    """What something is that is no kind of prompt; None for token ids that are wrong."""
    if isinstance(prompt, Mapping):
        return "one mapping"
    if isinstance(prompt, np.ndarray):
        return None if np.issubdtype(prompt.dtype, np.integer) else f"an array of {prompt.dtype}"
    if not isinstance(prompt, Sequence):
        return None if hasattr(prompt, "__array__") else type(prompt).__name__
    other = {type(item).__name__ for item in prompt if not hasattr(item, "__index__")}
    return f"a {type(prompt).__name__} of {' and '.join(sorted(other))}" if other else None


def _check(request: Request, model: Model) -> None:
    """Refuse what cannot be done."""
    if request.kind not in ("generate", "embed"):
        raise _bad("kind", request.kind, "generate or embed")
    if as_index(request.max_tokens, "max_tokens", InvalidArgumentError) < 0:
        raise _bad("max_tokens", request.max_tokens, "0 or more")
    if not 1 <= as_index(request.n, "n", InvalidArgumentError) <= MAX_OUTPUTS:
        raise _bad("n", request.n, f"in [1, {MAX_OUTPUTS}]")
    n_top = 0 if request.logprobs is None else as_index(request.logprobs, "logprobs", InvalidArgumentError)
    if not 0 <= n_top <= model.n_vocab:
        raise _bad("logprobs", request.logprobs, f"in [0, {model.n_vocab}]")
    as_index(request.priority, "priority", InvalidArgumentError)
    given: Any = request.sampling
    if not isinstance(given, SamplingParams):
        raise _bad("sampling", given, "SamplingParams")
    stop: Any = request.stop
    if not isinstance(stop, Sequence) or isinstance(stop, bytes):
        raise _bad("stop", stop, "a str or a tuple of str")
    if not isinstance(request.template, Mapping):
        raise _bad("template", request.template, "a mapping")
    if request.kind == "generate" and model.memory_kind == "none":
        raise _bad("kind", request.kind, "embed: this model generates nothing")


def _bad(name: str, value: object, limit: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{name} = {brief(value)} is not {limit}", name=name, value=value, limit=limit)


def _written(model: Model, tokens: Int32Array) -> str:
    return model.detokenize(tokens) if model.has_vocab else ""
