"""One conversation: its tokens and the sequence that holds their state, always in step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import numpy as np
import numpy.typing as npt

from llamastate.arrays import Int32Array, TokensLike, as_index, as_tokens
from llamastate.errors import HistoryError, InvalidSequenceError
from llamastate.history import Checkpoint, History
from llamastate.sessioncore import check_label, common_prefix
from llamastate.sessiongen import Completion, SessionGeneration
from llamastate.sessionio import in_thread
from llamastate.sessionstore import Prefixes
from llamastate.words import brief

if TYPE_CHECKING:
    from llamastate.context import Context

__all__ = ["Completion", "Session", "SyncResult"]


class SyncResult(NamedTuple):
    """What it took to make a sequence hold given tokens.

    Attributes
    ----------
    reused : int
        Tokens whose state was there.
    replayed : int
        Of those, how many had to be decoded again, because the state could not be trimmed to them.
    decoded : int
        New tokens.
    loaded : int
        How many tokens, from the first on, a store of prefixes has given. Those count as reused.
    """

    reused: int
    replayed: int
    decoded: int
    loaded: int = 0


class Session(SessionGeneration):
    """One conversation in one sequence of a context.

    Parameters
    ----------
    ctx : Context
    seq_id : int
        The sequence, which is the session's alone from now on.
    tokens : array-like of int
        What the sequence holds already. It has to be empty otherwise.
    checkpoint_every : int
        Automatic checkpoints every so many tokens, where going back needs them (sliding windows, recurrent and hybrid
        models); it bounds what :meth:`rollback` decodes again. 0 for none.
    max_checkpoints, max_checkpoint_bytes : int
        How many states checkpoints may keep, and how many bytes. Past that old ones get sparser.
    store : PrefixStore, optional
        Where to look for what would have to be decoded, and to keep what was: in every call that decodes.

    Raises
    ------
    SequenceChangedError
        The sequence does not hold as many tokens as were given.

    Notes
    -----
    After every call the sequence holds exactly :attr:`tokens`, also after a call that failed. Threads take turns. If
    somebody else has changed the sequence, by whatever call of the context, the next call says so, also where it is as
    long as before (:class:`SequenceChangedError`).

    :meth:`close`, or the end of a ``with`` block, empties the sequence. A session that is only forgotten leaves it as
    it is.

    A store that fails costs time only: the error is logged (``llamastate.session``) and kept in ``store_error``.

    Examples
    --------
    >>> session = Session(ctx)  # doctest: +SKIP
    >>> session.feed("Once upon a time")  # doctest: +SKIP
    4
    >>> before = session.checkpoint()  # doctest: +SKIP
    >>> session.generate(16)  # doctest: +SKIP
    ', there was a king ...'
    >>> session.undo()  # doctest: +SKIP
    """

    def __init__(
        self,
        ctx: Context,
        seq_id: int = 0,
        *,
        tokens: TokensLike = (),
        checkpoint_every: int = 512,
        max_checkpoints: int = 32,
        max_checkpoint_bytes: int = 256 << 20,
        store: Prefixes | None = None,
    ) -> None:
        super().__init__(
            ctx,
            seq_id,
            tokens,
            checkpoint_every=checkpoint_every,
            max_checkpoints=max_checkpoints,
            max_checkpoint_bytes=max_checkpoint_bytes,
            store=store,
        )
        self._check_step()

    # --- facts --------------------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> Int32Array:
        """Everything that the sequence holds, int32[n]. Read-only."""
        self._tokens.flags.writeable = False  # else the view could be made writable again
        return self._tokens[:]

    @property
    def text(self) -> str:
        """The tokens as text, control tokens written out."""
        return self.ctx.model.detokenize(self._tokens, unparse_special=True)

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The checkpoints that the caller made, oldest first."""
        return self._history.named()

    @property
    def history(self) -> History:
        """All checkpoints, the automatic ones too, and what they take."""
        return self._history

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """Logits after the last token, float32[n_vocab], a copy.

        Raises
        ------
        LogitsUnavailableError
            The session is empty.
        NoKVSlotError
            A full cache that is shared has no room to decode the last token again.

        Notes
        -----
        A restore or a trim leaves none behind; the last token is decoded again then.
        """
        with self._turn():
            self._check_step()
            self._need_logits()
            return self._logits.copy()

    def __repr__(self) -> str:
        return f"<llamastate.Session seq_id={self.seq_id}, {self.n_past} tokens, {len(self.checkpoints)} checkpoints>"

    # --- going on -----------------------------------------------------------------------------------------------------

    def feed(
        self,
        text_or_tokens: str | bytes | TokensLike,
        *,
        parse_special: bool = False,
        store: Prefixes | None = None,
    ) -> int:
        """Append text or tokens.

        Parameters
        ----------
        text_or_tokens : str, bytes or array-like of int
            Text (UTF-8 if bytes) gets a BOS token where the model wants one, if the session is empty.
        parse_special : bool
            Read ``<|im_start|>`` and the like in text as control tokens.
        store : PrefixStore, optional
            Used for this call in place of the session's own: what it has of the tokens is loaded instead of decoded,
            what it has not is put into it.

        Returns
        -------
        int
            How many tokens were appended.

        Raises
        ------
        NoKVSlotError, DecodeError, TokenizeError
            The session is as it was.
        """
        with self._turn():
            ids = self._ids(text_or_tokens, parse_special)
            if not len(ids):
                return 0
            self._check_step()
            store = self._which(store)
            if store is None:
                self._append(ids)
            else:
                start = self.n_past
                whole = np.concatenate([self._tokens, ids])
                if not (self._is_worth_it(store, whole, start) and self._follow_store(store, whole, start, start)):
                    self._append(ids)
                self._put_prefix(store)
            return len(ids)

    def _append(self, ids: Int32Array) -> None:
        with self._all_or_nothing():
            self._forget_future()
            self._advance(ids)

    def sync(self, tokens: TokensLike, *, store: Prefixes | None = None) -> SyncResult:
        """Make the sequence hold exactly these tokens, reusing what it shares with them from the beginning on.

        Parameters
        ----------
        tokens : array-like of int
        store : PrefixStore, optional
            As for :meth:`feed`.

        Returns
        -------
        SyncResult

        Raises
        ------
        NoKVSlotError, DecodeError, TokenizeError
            The session is as it was.
        """
        with self._turn():
            ids = as_tokens(tokens, self.ctx.model.n_vocab)
            store = self._which(store)
            self._check_step()
            shared = common_prefix(self._tokens, ids)
            loaded = 0
            if store is not None:
                base = self._plan_back(shared).base
                if self._is_worth_it(store, ids, base):
                    loaded = self._follow_store(store, ids, shared, base)
            replayed = max(0, shared - loaded) if loaded else self._follow(ids, shared)
            self._put_prefix(store)
            known = max(shared, loaded)
            return SyncResult(known, replayed, len(ids) - known, loaded)

    def _follow(self, ids: Int32Array, shared: int) -> int:
        """Make the sequence hold ``ids``, of which it has the first ``shared``; how many of these are decoded again."""
        with self._or_as_it_was(shared, len(ids)):
            replayed = self._go_back(shared)
            with self._all_or_nothing():
                self._forget_future()
                if shared < len(ids):
                    self._advance(ids[shared:])
        return replayed

    # --- asyncio ------------------------------------------------------------------------------------------------------

    async def afeed(self, text_or_tokens: Any, *, parse_special: bool = False, store: Prefixes | None = None) -> int:
        """:meth:`feed` for asyncio."""
        return await in_thread(lambda stopped: self.feed(text_or_tokens, parse_special=parse_special, store=store))

    async def async_(self, tokens: TokensLike, *, store: Prefixes | None = None) -> SyncResult:
        """:meth:`sync` for asyncio; ``async`` itself is a word of the language."""
        return await in_thread(lambda stopped: self.sync(tokens, store=store))

    # --- going back ---------------------------------------------------------------------------------------------------

    def checkpoint(self, label: str | None = None, *, full: bool = False) -> Checkpoint:
        """Remember this point.

        Parameters
        ----------
        label : str, optional
        full : bool
            Keep the whole state, so that the way back and forth never decodes anything, at the price of its bytes.

        Returns
        -------
        Checkpoint

        Notes
        -----
        With full attention it is a number. With a sliding window, a recurrent state or both it copies what cannot be
        trimmed, and the logits.
        """
        check_label(label)
        with self._turn():
            self._check_step()
            point = Checkpoint(self.n_past, label)
            self._keep_state(point, full=full)
            self._history.add(point, n_past=self.n_past)
            return point

    def undo(self, n: int = 1) -> int:
        """Go back ``n`` checkpoints.

        Returns
        -------
        int
            How many tokens had to be decoded again (``replayed``).

        Raises
        ------
        HistoryError
            There are fewer; nothing has changed.
        """
        with self._turn():
            self._check_step()
            steps = as_index(n, "n", HistoryError)
            if steps < 1:
                raise HistoryError(
                    f"cannot undo {brief(steps)} steps: at least one", asked=steps, available=len(self.checkpoints)
                )
            targets = self._history.undo_targets(steps, len(self._tokens))
            undone = [self._tokens, *[self._tokens[: t.n_tokens] for t in targets[:-1]]]
            replayed = self._go_back(targets[-1].n_tokens)
            self._redo.extend(undone)
            return replayed

    def redo(self, n: int = 1) -> int:
        """Take ``n`` undone steps back. Feeding or generating ends that possibility.

        Returns
        -------
        int
            How many tokens had to be decoded again (``replayed``).

        Raises
        ------
        HistoryError
            There are fewer; nothing has changed.
        """
        with self._turn():
            self._check_step()
            steps = as_index(n, "n", HistoryError)
            if not 1 <= steps <= len(self._redo):
                raise HistoryError(
                    f"cannot redo {steps} steps: there are {len(self._redo)}", asked=steps, available=len(self._redo)
                )
            tokens = self._redo[-steps]
            replayed = self._carry_out(self._history.plan_forward(len(tokens), n_past=self.n_past), tokens)
            del self._redo[-steps:]
            return replayed

    def rollback(self, target: Checkpoint | int | str) -> int:
        """Go back to a checkpoint, or to a number of tokens.

        Parameters
        ----------
        target : Checkpoint, int or str
            Not past the present. Of the checkpoints that bear a label it is the last one that is not.

        Returns
        -------
        int
            How many tokens had to be decoded again (``replayed``).

        Raises
        ------
        HistoryError
            There is no such point; nothing has changed.
        """
        with self._turn():
            self._check_step()
            if isinstance(target, Checkpoint):
                if target not in list(self._history):
                    raise HistoryError(
                        "no checkpoint of this session: it is another's, or it was dropped when other tokens took its "
                        "place",
                        asked=target,
                        available=len(self.checkpoints),
                    )
                n_tokens = target.n_tokens
            elif isinstance(target, str):
                n_tokens = self._labelled(target).n_tokens
            elif not isinstance(target, SupportsIndex):
                raise HistoryError(
                    f"target is {type(target).__name__}, neither a Checkpoint, a label nor a number of tokens",
                    asked=target,
                    available=len(self.checkpoints),
                )
            else:
                n_tokens = as_index(target, "target", HistoryError)
            if not 0 <= n_tokens <= self.n_past:
                raise HistoryError(
                    f"cannot go back to {n_tokens} tokens: there are {self.n_past}",
                    asked=n_tokens,
                    available=self.n_past,
                )
            replayed = self._go_back(n_tokens)
            self._forget_future()
            return replayed

    def _labelled(self, label: str) -> Checkpoint:
        points = self.checkpoints
        for point in reversed(points):
            if point.label == label and point.n_tokens <= self.n_past:
                return point
        raise HistoryError(f"no checkpoint is labelled {brief(label)}", asked=label, available=len(points))

    def branch(self, dest_seq_id: int) -> Session:
        """Continue in another sequence as well, from here.

        Parameters
        ----------
        dest_seq_id : int
            An empty sequence of the same context.

        Returns
        -------
        Session
            With the same tokens and checkpoints. In a unified cache both share the cells; neither disturbs the other.

        Raises
        ------
        InvalidSequenceError
            It is not empty, or does not exist.
        """
        with self._long_turn():
            self._check_step()
            if self.ctx.seq_pos_max(dest_seq_id) >= 0:
                raise InvalidSequenceError(
                    f"sequence {dest_seq_id} is not empty", seq_id=dest_seq_id, n_seq_max=self.ctx.n_seq_max
                )
            self.ctx.seq_cp(self.seq_id, dest_seq_id)
            other = self._twin(dest_seq_id)
            other._tokens = self._tokens
            other._history = self._history.copy()
            other._logits, other._has_logits = self._logits.copy(), self._has_logits
            other._check_step()
            return other

    def _twin(self, seq_id: int) -> Session:
        return Session(
            self.ctx,
            seq_id,
            tokens=self._tokens,
            checkpoint_every=self._every,
            max_checkpoints=self._history._max_checkpoints,
            max_checkpoint_bytes=self._history._max_bytes,
            store=self._store,
        )
