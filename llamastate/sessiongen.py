"""How a session lets the model go on: at once, piece by piece, and the same for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from llamastate.errors import InvalidArgumentError, NoKVSlotError
from llamastate.sampler import Sampler, SamplingParams
from llamastate.sessioncore import count
from llamastate.sessionio import SessionIO, in_thread
from llamastate.textstream import TextStream

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Completion", "SessionGeneration"]


class Completion(str):
    """Generated text, and how it came to be.

    Attributes
    ----------
    tokens : tuple of int
        What was generated and is now in the session. The text can be shorter: it ends before a stop string.
    finish_reason : {"length", "stop", "eog", "full"}
        The limit was reached, a stop string was met, the model ended, or the context had no room for another token.
    """

    __slots__ = ("finish_reason", "tokens")
    tokens: tuple[int, ...]
    finish_reason: str

    def __new__(cls, text: str, tokens: Sequence[int] = (), finish_reason: str = "length") -> Self:
        """Make one from its parts."""
        self = super().__new__(cls, text)
        self.tokens = tuple(tokens)
        self.finish_reason = finish_reason
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Completion, (str(self), self.tokens, self.finish_reason)


class SessionGeneration(SessionIO):
    """How a :class:`~llamastate.Session` generates. Not made directly."""

    @overload
    def generate(
        self,
        max_tokens: int,
        *,
        sampler: Sampler | SamplingParams | None = None,
        stop: str | Sequence[str] = (),
        stream: Literal[False] = False,
    ) -> Completion: ...
    @overload
    def generate(
        self,
        max_tokens: int,
        *,
        sampler: Sampler | SamplingParams | None = None,
        stop: str | Sequence[str] = (),
        stream: Literal[True],
    ) -> Iterator[str]: ...
    def generate(
        self,
        max_tokens: int,
        *,
        sampler: Sampler | SamplingParams | None = None,
        stop: str | Sequence[str] = (),
        stream: bool = False,
    ) -> Completion | Iterator[str]:
        """Let the model go on.

        Parameters
        ----------
        max_tokens : int
            At most.
        sampler : Sampler or SamplingParams, optional
            How to choose; greedily if not given. Of parameters a sampler is made for this call.
        stop : str or sequence of str
            The text ends before the first of these, also where it straddles tokens. The tokens that spelt it stay in
            the session.
        stream : bool
            Give an iterator of pieces of text, each of whole characters, instead of all at the end. An iterator that is
            given up leaves a session that is in step.

        Returns
        -------
        Completion or iterator of str

        Raises
        ------
        LogitsUnavailableError
            The session is empty: there is nothing to go on from.
        NoKVSlotError
            The context has no room for even one token. One that fills up later ends the text, with what has been
            generated until then and ``finish_reason`` "full".
        SamplerError
            No token is left to choose.
        """
        if stream:
            limit = count("max_tokens", max_tokens)
            return self._pieces(limit, self._sampler(sampler), _text_stream(stop), [], _never)
        return self._generate(max_tokens, sampler, stop, _never)

    def _generate(
        self,
        max_tokens: int,
        sampler: Sampler | SamplingParams | None,
        stop: str | Sequence[str],
        stopped: Callable[[], bool],
    ) -> Completion:
        limit = count("max_tokens", max_tokens)
        text = _text_stream(stop)
        made: list[int] = []
        ended: list[str] = []
        whole = "".join(self._pieces(limit, self._sampler(sampler), text, made, stopped, ended))
        reason = "stop" if text.stopped is not None else "length" if len(made) == limit else "eog"
        return Completion(whole, made, ended[0] if ended else reason)

    def _sampler(self, given: Any) -> Sampler | None:
        if isinstance(given, SamplingParams):
            return Sampler(self.ctx.model, given)
        if given is not None and not isinstance(given, Sampler):
            raise InvalidArgumentError(
                f"sampler is {type(given).__name__}, neither a Sampler nor SamplingParams", name="sampler", value=given
            )
        return given

    def _pieces(
        self,
        limit: int,
        sampler: Sampler | None,
        text: TextStream,
        made: list[int],
        stopped: Callable[[], bool],
        ended: list[str] | None = None,
    ) -> Iterator[str]:
        model = self.ctx.model
        with self._turn():
            self._check_step()
            if limit:
                self._need_logits()
                self._anchor()  # for another answer to the same prompt
        while len(made) < limit and text.stopped is None and not stopped():
            with self._turn():
                self._check_step()
                self._need_logits()
                if sampler is None:
                    token = int(self._logits.argmax())
                else:
                    token = sampler.sample_logits(self._logits, accept=False)
                if model.is_eog(token):
                    break
                try:
                    with self._all_or_nothing():
                        self._forget_future()
                        self._advance(np.array([token], np.int32))
                except NoKVSlotError:
                    if not made:
                        raise
                    if ended is not None:
                        ended.append("full")
                    break
                if sampler is not None:
                    sampler.accept(token)  # what the session does not hold it is not told
                made.append(token)
            if model.has_vocab and (piece := text.push(model.token_to_piece(token))):
                yield piece
        if rest := text.finish():
            yield rest
        with self._turn():
            self._anchor()
            self._put_prefix(self._store)

    # --- asyncio ------------------------------------------------------------------------------------------------------

    async def agenerate(
        self, max_tokens: int, *, sampler: Sampler | SamplingParams | None = None, stop: str | Sequence[str] = ()
    ) -> Completion:
        """:meth:`generate` for asyncio: computes in a thread, the loop goes on. Cancelling ends it after a token."""
        return await in_thread(lambda stopped: self._generate(max_tokens, sampler, stop, stopped))

    async def astream(
        self, max_tokens: int, *, sampler: Sampler | SamplingParams | None = None, stop: str | Sequence[str] = ()
    ) -> AsyncIterator[str]:
        """:meth:`generate` with ``stream=True`` for asyncio; each piece is computed in a thread."""
        pieces: Iterator[str] = self.generate(max_tokens, sampler=sampler, stop=stop, stream=True)
        while (piece := await in_thread(lambda stopped: next(pieces, None))) is not None:
            yield piece


def _text_stream(stop: str | Sequence[str]) -> TextStream:
    try:
        return TextStream((stop,) if isinstance(stop, str) and stop else tuple(stop))
    except TypeError:
        raise InvalidArgumentError(f"stop is {type(stop).__name__}", name="stop", value=stop) from None


def _never() -> bool:
    return False
