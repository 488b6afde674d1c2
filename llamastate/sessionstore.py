"""A session and a store of prefixes: what somebody has decoded before need not be decoded again.

The store only ever saves time. Whatever goes wrong with it (no room, a disk that fails, closed meanwhile) is logged and
kept in :attr:`SessionStore.store_error`, and the session decodes as if there were none.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from llamastate.arrays import Int32Array, TokensLike
from llamastate.errors import InvalidArgumentError, LoadError
from llamastate.exactness import can_trim
from llamastate.history import Plan
from llamastate.sessioncore import Kept, SessionCore

if TYPE_CHECKING:
    from typing_extensions import Self

    from llamastate.context import Context

__all__ = ["Prefixes", "SessionStore"]

_log = logging.getLogger("llamastate.session")

#: A prefix is loaded whole. It has to spare decoding one token for so many that are copied.
_COPIES_PER_DECODE = 64
_NEEDED = ("lookup", "load_with_logits", "put")


class Prefixes(Protocol):
    """What a session asks of a store; :class:`llamastate.prefix.PrefixStore` is one."""

    def lookup(self, tokens: Int32Array, *, ctx: Context) -> int:
        """How many tokens, from the first on, could be restored."""

    def load_with_logits(
        self, ctx: Context, seq_id: int, tokens: Int32Array, *, max_tokens: int | None = None
    ) -> tuple[int, npt.NDArray[np.float32] | None]:
        """Make a sequence hold the longest prefix there is; its length, and the logits after it if they are known."""

    def put(self, source: Any) -> int:
        """Keep what is new of a session."""


class SessionStore(SessionCore):
    """How a session uses a store. Not made directly."""

    #: What the store failed with last, if it ever did.
    store_error: Exception | None

    def __init__(
        self, ctx: Context, seq_id: int, tokens: TokensLike = (), *, store: Prefixes | None = None, **options: Any
    ) -> None:
        super().__init__(ctx, seq_id, tokens, **options)
        self._store = self._checked_store(store)
        self.store_error = None

    @classmethod
    def _unchecked(cls, ctx: Context, seq_id: int, **options: Any) -> Self:
        """Make a session over a sequence that holds anything, which is about to be replaced."""
        if "tokens" in options:
            raise InvalidArgumentError(
                "tokens is not for a session that is brought back: it says itself which they are",
                name="tokens",
                value=options["tokens"],
            )
        self = cls.__new__(cls)
        SessionStore.__init__(self, ctx, seq_id, **options)
        return self

    # --- choosing -----------------------------------------------------------------------------------------------------

    @staticmethod
    def _checked_store(store: Prefixes | None) -> Prefixes | None:
        if store is not None and not all(callable(getattr(store, name, None)) for name in _NEEDED):
            raise InvalidArgumentError(f"store is {type(store).__name__}, not a PrefixStore", name="store", value=store)
        return store

    def _which(self, store: Prefixes | None) -> Prefixes | None:
        return self._store if store is None else self._checked_store(store)

    def _is_worth_it(self, store: Prefixes, ids: Int32Array, base: int) -> bool:
        """Whether a prefix in the store beats going on from the ``base`` tokens that are had without decoding."""
        if base >= len(ids):
            return False
        # what the sequence holds might not be put back: a window that is shared takes more cells once it is not
        window = self.n_past and self.ctx.model.n_swa and self.seq_id in self.ctx._handle.shared
        if window or self._is_in_doubt(len(ids)):
            return False
        if not self.n_past:
            return True  # nothing is lost by trying
        try:
            found = store.lookup(ids, ctx=self.ctx)
        except Exception as error:
            self._complain("look up", error)
            return False
        return found - base > found // _COPIES_PER_DECODE

    # --- loading ------------------------------------------------------------------------------------------------------

    def _follow_store(self, store: Prefixes, ids: Int32Array, shared: int, base: int) -> int:
        """Make the sequence hold ``ids`` with what the store has of them; how many tokens that was. Or leave it be.

        The first ``shared`` of them are the sequence's own. Fails without a trace.
        """
        with self._all_or_nothing():
            n, kept = self._load_prefix(store, ids, base)
            if n and kept is not None:
                try:
                    self._forget_future(shared)
                    self._anchor()
                    self._advance(ids[n:])
                except BaseException:
                    self._put_back(kept)
                    raise
        return n

    def _carry_out(self, plan: Plan, tokens: Int32Array) -> int:
        store = self._store
        if store is not None and plan.replay and self._is_worth_it(store, tokens, plan.base):
            with self._all_or_nothing():
                n, kept = self._load_prefix(store, tokens, plan.base)
                if n and kept is not None:
                    try:
                        self._anchor()
                        self._advance(tokens[n:])
                    except BaseException:
                        self._put_back(kept)
                        raise
                    return len(tokens) - n
        return super()._carry_out(plan, tokens)

    def _load_prefix(self, store: Prefixes, ids: Int32Array, base: int) -> tuple[int, Kept | None]:
        """Put the longest stored prefix into the sequence; its length, and what was there before.

        0 if there was none of more than ``base`` tokens, or something went wrong: the sequence is as it was then.
        """
        with self.ctx._handle:  # nobody may take the cells that are given back for a moment
            try:
                kept = self._keep()
            except Exception as error:  # a state that cannot be taken now: then it cannot be replaced either
                self._complain("keep what there was", error)
                return 0, None
            try:
                n = self._try_load(store, ids, base)
            except BaseException:
                self._put_back(kept)
                raise
            if not n:
                self._put_back(kept)
            return n, kept

    def _try_load(self, store: Prefixes, ids: Int32Array, base: int) -> int:
        ctx, seq_id = self.ctx, self.seq_id
        try:
            n, row = store.load_with_logits(ctx, seq_id, ids)
            if n == len(ids) and row is None and not self._can_lose_one(n):
                # nothing would tell what follows: leave some to decode
                n, row = store.load_with_logits(ctx, seq_id, ids, max_tokens=n - 1)
            if n <= base:
                return 0
            if ctx.seq_pos_max(seq_id) + 1 != n or n > len(ids):
                raise LoadError(f"the store gave {ctx.seq_pos_max(seq_id) + 1} tokens, not {n}", reason="positions")
            if row is not None and np.shape(row) != self._logits.shape:
                raise LoadError(f"the store gave logits of shape {np.shape(row)}", reason="logits")
        except Exception as error:
            self._complain("load", error)
            return 0
        self._tokens = ids[:n]
        self._has_logits = row is not None
        if row is not None:
            self._logits = np.array(row, np.float32)
        return n

    def _can_lose_one(self, n: int) -> bool:
        """Whether the last of ``n`` tokens can be decoded again for its logits."""
        model = self.ctx.model
        return can_trim(model.memory_kind, model.n_swa, self.ctx.seq_pos_min(self.seq_id), n - 1, n - 1)

    # --- keeping ------------------------------------------------------------------------------------------------------

    def _put_prefix(self, store: Prefixes | None) -> None:
        """Let the store have what is new."""
        if store is None:
            return
        try:
            store.put(self)
        except Exception as error:
            self._complain("put", error)

    def _complain(self, what: str, error: Exception) -> None:
        # a store that is gone fails at every turn: once is enough
        known = self.store_error is not None and type(self.store_error) is type(error)
        self.store_error = error
        _log.log(logging.DEBUG if known else logging.WARNING, "the prefix store failed (%s): %s", what, error)
