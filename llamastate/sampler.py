"""Choosing the next token: llama.cpp's own samplers behind one set of parameters."""

from __future__ import annotations

import dataclasses
import math
import numbers
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llamastate._native import consts, sampling
from llamastate.arrays import as_index
from llamastate.errors import SamplerError
from llamastate.grammar import check_grammar
from llamastate.lifetimes import Closing
from llamastate.words import brief

if TYPE_CHECKING:
    from typing_extensions import Self

    from llamastate.context import Context
    from llamastate.model import Model

__all__ = ["Sampler", "SamplingParams"]


#: llama.cpp reserves room for so many tokens at once.
MAX_PENALTY_LAST_N = 1 << 20


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a token. The defaults are greedy: always the most likely one.

    Parameters
    ----------
    temperature : float
        0 is greedy; 1 samples from the model's own distribution.
    top_k : int
        Keep the ``k`` most likely; 0 keeps all.
    top_p : float
        Keep the smallest set whose probability reaches ``p``, in (0, 1]; 1 keeps all.
    min_p : float
        Drop what is less likely than ``min_p`` times the most likely, in [0, 1]; 0 drops none.
    typical_p : float
        Locally typical sampling, in (0, 1]; 1 is off.
    repeat_penalty : float
        Divides the logits of tokens seen lately, > 0; 1 is off.
    frequency_penalty, presence_penalty : float
        As in OpenAI's API; 0 is off.
    penalty_last_n : int
        How many tokens back penalties look, at most 2**20; 0 turns them off.
    seed : int or None
        Of the random numbers, in [0, 2**32 - 1). ``None`` draws one, which :attr:`Sampler.seed` tells.
    grammar : str or None
        GBNF that the output has to follow.
    grammar_root : str
        Its start symbol.
    logit_bias : mapping of int to float
        Added to the logits of these tokens; ``-inf`` forbids one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    seed: int | None = None
    grammar: str | None = None
    grammar_root: str = "root"
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, math.inf)
        _within("top_k", self.top_k, 0, 2**31 - 1, whole=True)
        _within("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("typical_p", self.typical_p, 0.0, 1.0, open_low=True)
        _within("repeat_penalty", self.repeat_penalty, 0.0, math.inf, open_low=True)
        _within("frequency_penalty", self.frequency_penalty, -math.inf, math.inf)
        _within("presence_penalty", self.presence_penalty, -math.inf, math.inf)
        _within("penalty_last_n", self.penalty_last_n, 0, MAX_PENALTY_LAST_N, whole=True)
        if self.seed is not None:
            _within("seed", self.seed, 0, consts.DEFAULT_SEED - 1, whole=True)

    @property
    def is_greedy(self) -> bool:
        """Whether there is no chance in the choice."""
        return self.temperature == 0


def _within(name: str, value: Any, low: float, high: float, *, open_low: bool = False, whole: bool = False) -> None:
    """Refuse a parameter outside ``[low, high]`` (``(low, high]``); infinities are never numbers to compute with."""
    kind: Any = numbers.Integral if whole else numbers.Real
    try:
        inside = isinstance(value, kind) and math.isfinite(value) and low <= value <= high
    except OverflowError:  # an integer that no float can hold
        inside = False
    if not inside or (open_low and value == low):
        bracket = "(" if open_low or low == -math.inf else "["
        raise SamplerError(
            f"{name} = {brief(value)} is not in {bracket}{low}, {high}{')' if high == math.inf else ']'}",
            parameter=name,
            value=value,
        )


class Sampler(Closing):
    """A chain of llama.cpp's samplers, with its memory: random numbers, penalties, grammar.

    Parameters
    ----------
    model : Model
        Whose vocabulary it chooses from.
    params : SamplingParams, optional
        Or its fields as keywords.

    Raises
    ------
    SamplerError
        A parameter out of range, a grammar that does not parse, a biased token that does not exist.

    Notes
    -----
    The order is llama.cpp's usual one: bias, grammar, penalties, top-k, typical, top-p, min-p, temperature, choice.

    Examples
    --------
    >>> sampler = Sampler(model, temperature=0.7, top_p=0.9, seed=1)  # doctest: +SKIP
    >>> token = sampler.sample(ctx)  # doctest: +SKIP
    """

    _instead = "clone() makes another; state can be pickled, and from_state() goes on from it"

    def __init__(self, model: Model, params: SamplingParams | None = None, **fields: object) -> None:
        if params is None:
            try:
                params = SamplingParams(**fields)  # type: ignore[arg-type]  # checked by the dataclass itself
            except TypeError as error:
                raise SamplerError(str(error), reason=str(error)) from None
        elif fields:
            raise SamplerError("give params or keywords, not both", reason="both given")
        #: What was asked for.
        self.params = params
        #: The seed in use, also when none was given.
        self.seed = params.seed if params.seed is not None else secrets.randbelow(consts.DEFAULT_SEED)
        self._handle = sampling.SamplerHandle(model._handle)
        self._build(model.n_vocab)

    def _build(self, n_vocab: int) -> None:
        p, chain = self.params, self._handle
        if p.logit_bias:
            tokens, bias = _bias_arrays(p.logit_bias, n_vocab)
            chain.add_logit_bias(tokens, bias)
        if p.grammar is not None:
            grammar, root = _as_text("grammar", p.grammar), _as_text("grammar_root", p.grammar_root)
            check_grammar(p.grammar)
            chain.add_grammar(grammar, root)
        penalised = p.repeat_penalty != 1 or p.frequency_penalty != 0 or p.presence_penalty != 0
        if penalised and p.penalty_last_n:
            chain.add_penalties(p.penalty_last_n, p.repeat_penalty, p.frequency_penalty, p.presence_penalty)
        if p.is_greedy:
            chain.add_greedy()
            return
        if p.top_k:
            chain.add_top_k(p.top_k)
        if p.typical_p < 1:
            chain.add_typical(p.typical_p, 1)
        if p.top_p < 1:
            chain.add_top_p(p.top_p, 1)
        if p.min_p > 0:
            chain.add_min_p(p.min_p, 1)
        chain.add_temp(p.temperature)
        chain.end_random(self.seed)

    def sample(self, ctx: Context, i: int = -1, *, accept: bool = True) -> int:
        """Choose from the logits of the last decode.

        Parameters
        ----------
        ctx : Context
        i : int
            Which output, as in :meth:`Context.logits`.
        accept : bool
            Whether the choice counts: for penalties and for the grammar.

        Raises
        ------
        LogitsUnavailableError
            No logits for that index.
        SamplerError
            No candidate is left (a grammar that has ended, a bias that forbids all), or a logit is not a number.
        """
        return self._handle.sample(ctx._handle, ctx._output_index(i), accept)

    def sample_logits(self, logits: npt.ArrayLike, *, accept: bool = True) -> int:
        """Choose from a row of logits, float32[n_vocab], such as one that was kept with a snapshot."""
        try:
            row = np.asarray(logits, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise SamplerError(f"logits are no array: {error}", parameter="logits", reason=str(error)) from None
        if row.ndim != 1:
            raise SamplerError(f"logits have {row.ndim} dimensions, not 1", parameter="logits", value=row.shape)
        return self._handle.sample_logits(np.ascontiguousarray(row), accept)

    def accept(self, token: int) -> None:
        """Tell the chain of a token that was chosen elsewhere."""
        self._handle.accept(as_index(token, "token", SamplerError))

    @property
    def state(self) -> dict[str, Any]:
        """All that makes the next choice what it will be, as plain JSON types: for :meth:`from_state`."""
        params = dataclasses.asdict(self.params)
        # JSON has no infinities, and its keys are text
        bias = self.params.logit_bias.items()
        params["logit_bias"] = [[int(t), float(b) if math.isfinite(b) else "-inf"] for t, b in bias]
        return {
            "params": params,
            "seed": self.seed,
            "n_draws": self._handle.n_draws,
            "accepted": self._handle.accepted,
        }

    @classmethod
    def from_state(cls, model: Model, state: Mapping[str, Any]) -> Self:
        """Make a sampler that chooses as the one would have whose :attr:`state` this is.

        Raises
        ------
        SamplerError
            The state is not one, or does not fit this model.
        """
        try:
            params = dict(state["params"])
            params["logit_bias"] = {int(t): float(b) for t, b in params.get("logit_bias", ())}
            params["seed"] = int(state["seed"])
            self = cls(model, SamplingParams(**params))
            for token in state["accepted"]:
                self.accept(token)
            self._handle.n_draws = int(state["n_draws"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, SamplerError):
                raise
            raise SamplerError(f"not the state of a sampler: {error}", reason=str(error)) from None
        return self

    def reset(self) -> None:
        """Forget everything accepted, and begin the random numbers anew."""
        self._handle.reset()

    def clone(self) -> Self:
        """Make an independent sampler in the same state, random numbers included."""
        other = type(self).__new__(type(self))
        other.params, other.seed, other._handle = self.params, self.seed, self._handle.clone()
        return other

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` has been called."""
        return self._handle.closed

    def close(self) -> None:
        """Free the chain. Idempotent."""
        self._handle.close()


def _as_text(name: str, text: Any) -> bytes:
    if not isinstance(text, str):
        raise SamplerError(f"{name} is {type(text).__name__}, not str", parameter=name, value=text)
    try:
        data = text.encode()
    except UnicodeEncodeError as error:  # lone surrogates
        raise SamplerError(f"{name} is not valid Unicode: {error}", parameter=name, value=text) from None
    if b"\0" in data:
        raise SamplerError(f"{name} contains a NUL", parameter=name, value=text)
    return data


def _bias_arrays(bias: Mapping[int, float], n_vocab: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    for token, value in bias.items():
        if not 0 <= as_index(token, "logit_bias token", SamplerError) < n_vocab:
            raise SamplerError(
                f"logit_bias: token id {token} is not in [0, {n_vocab})", parameter="logit_bias", value=token
            )
        number: Any = value
        try:
            wrong = not isinstance(number, numbers.Real) or math.isnan(number) or number == math.inf
        except OverflowError:
            wrong = True
        if wrong:
            raise SamplerError(f"logit_bias: {brief(value)} for token {token}", parameter="logit_bias", value=value)
    return np.fromiter(bias.keys(), np.int32, len(bias)), np.fromiter(bias.values(), np.float32, len(bias))
