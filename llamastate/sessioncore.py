"""What a session does to its sequence: going on, going back, and putting back what a failure has undone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from llamastate._native import decode as native_decode
from llamastate._native import memory
from llamastate._native.changes import Witness
from llamastate.arrays import Int32Array, TokensLike, as_index, as_tokens
from llamastate.errors import (
    ClosedError,
    ContextBusyError,
    InvalidArgumentError,
    InvalidSequenceError,
    LlamaStateError,
    LogitsUnavailableError,
    NoKVSlotError,
    SequenceChangedError,
)
from llamastate.exactness import can_trim
from llamastate.flags import SeqFlags
from llamastate.history import Checkpoint, History, Plan
from llamastate.lifetimes import Closing
from llamastate.restore import Room, cells_of_others, count_room, put_back, put_own
from llamastate.state import StateAPI

if TYPE_CHECKING:
    from llamastate.context import Context

__all__ = ["SessionCore", "check_label", "common_prefix", "count"]


class Kept(NamedTuple):
    """All that a failed operation needs to be undone; no state of an empty sequence."""

    tokens: Int32Array
    state: npt.NDArray[np.uint8] | None
    logits: npt.NDArray[np.float32] | None


class SessionCore(Closing):
    """Tokens, checkpoints and logits of one sequence, and the steps that change them. Not made directly."""

    _instead = "branch() continues in another sequence, and what snapshot() gives can be pickled"

    def __init__(
        self,
        ctx: Context,
        seq_id: int,
        tokens: TokensLike = (),
        *,
        checkpoint_every: int = 512,
        max_checkpoints: int = 32,
        max_checkpoint_bytes: int = 256 << 20,
    ) -> None:
        check_context(ctx)
        self.ctx = ctx
        self.seq_id = as_index(seq_id, "seq_id", InvalidSequenceError)
        self._witness = Witness(ctx._handle.changes, self.seq_id)
        self._every = count("checkpoint_every", checkpoint_every)
        self._lock = threading.RLock()
        #: What else ends with the session; may be called twice.
        self._at_close: list[Callable[[], object]] = []
        self._closed = False
        self._tokens = as_tokens(tokens, ctx.model.n_vocab)
        self._logits = np.empty(ctx.model.n_vocab, np.float32)
        self._has_logits = False
        # What undo has taken back, the last one last: all tokens of that moment.
        self._redo: list[Int32Array] = []
        self._adapters = ctx._handle.adapters
        self._history = History(
            ctx.model.memory_kind,
            ctx.model.n_swa,
            max_checkpoints=count("max_checkpoints", max_checkpoints),
            max_bytes=count("max_checkpoint_bytes", max_checkpoint_bytes),
        )

    @property
    def n_past(self) -> int:
        """How many tokens the sequence holds: the position of the next."""
        return len(self._tokens)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other thread in the session."""
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def _enter(self) -> None:
        """Keep other threads out of the session.

        Whoever has the context locked does not wait: the thread that is in the session may be waiting for the context.
        """
        if not self._lock.acquire(blocking=self.ctx._locked_by != threading.get_ident()):
            raise ContextBusyError(
                "another thread is using this session, and cannot go on while this one has the context locked",
                operation="session",
            )
        self._witness.enter()

    def _leave(self) -> None:
        self._witness.leave()
        self._lock.release()

    def _turn(self) -> _Turn:
        """One operation at a time.

        Where a busy context refuses, it is asked once, before anything has changed: a refusal in the middle could
        not even be undone. Where it waits, others get their turn between the decodes.
        """
        return _Turn(self)

    @contextlib.contextmanager
    def _long_turn(self) -> Iterator[None]:
        """The same, with nobody else in the context meanwhile."""
        with self._alone(), self.ctx._handle:
            self._check_open()
            yield

    @property
    def closed(self) -> bool:
        """Whether the sequence has been given back."""
        return self._closed

    def close(self) -> None:
        """Empty the sequence, so that it is free for others, and let the checkpoints go. Idempotent.

        A sequence that somebody else has begun to use is left alone. The context stays open. Ctrl-C is raised when all
        is done; a second one may leave something to another call of this.
        """
        with self._alone():
            try:
                self._close()
            except Exception:
                raise
            except BaseException:
                self._close()  # whoever leaves a with block will not come back for the rest
                raise

    def _close(self) -> None:
        """Each step finds out for itself whether it has been done: Ctrl-C may come anywhere."""
        with contextlib.suppress(ClosedError), self.ctx._handle as handle:
            held = memory.seq_pos_max(handle, self.seq_id) + 1
            if held and held == self.n_past and self._witness.intact:
                self.ctx.seq_rm(self.seq_id)
        self._closed = True
        self._tokens, self._has_logits = self._tokens[:0], False
        self._redo.clear()
        self._history.replace([])
        while self._at_close:
            self._at_close[-1]()
            self._at_close.pop()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the session is closed", what="session")

    def _hint(self) -> str:
        """What to do about a sequence in use, for whoever begins a session there."""
        if self.n_past:
            return ""
        return f"; give tokens=, another seq_id, or ctx.seq_rm({self.seq_id}) first"

    def _check_step(self) -> None:
        """Make sure that nobody else has touched the sequence."""
        handle = self.ctx._handle
        adapters = handle.adapters
        if adapters is not self._adapters:
            # They change while sequences are empty, but a way forth from there may lead over states of before.
            self._history.forget_states()
            self._has_logits = False
            self._adapters = adapters
        found = memory.seq_pos_max(handle, self.seq_id) + 1
        if found != len(self._tokens):
            raise SequenceChangedError(
                f"sequence {self.seq_id} holds {found} tokens, the session {self.n_past}{self._hint()}",
                seq_id=self.seq_id,
                expected=self.n_past,
                found=found,
            )
        if not found:
            self._witness.accept()  # whoever it was: nothing is left of it
        elif not self._witness.intact:
            raise SequenceChangedError(
                f"sequence {self.seq_id} holds {found} tokens, as the session does, but somebody else has changed it",
                seq_id=self.seq_id,
                expected=found,
                found=found,
            )

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Keep checkpoints and the redo list as they are if the block fails."""
        points, redo = list(self._history), list(self._redo)
        try:
            yield
        except BaseException:
            self._history.replace(points)
            self._redo = redo
            raise

    def _ids(self, text_or_tokens: str | bytes | TokensLike, parse_special: bool) -> Int32Array:
        if isinstance(text_or_tokens, (str, bytes)):
            return self.ctx.model.tokenize(text_or_tokens, add_special=not self.n_past, parse_special=parse_special)
        return as_tokens(text_or_tokens, self.ctx.model.n_vocab)

    # --- going on -----------------------------------------------------------------------------------------------------

    def _advance(self, ids: Int32Array) -> None:
        """Decode tokens after what is there. Fails without a trace."""
        start = self.n_past
        if start + len(ids) > self.ctx.n_ctx_seq and self.ctx.model.memory_kind != "recurrent":
            n_ctx = self.ctx.n_ctx_seq
            if start >= n_ctx:
                problem = f"the context is full: {start} of n_ctx = {n_ctx} cells are used"
            else:
                problem = f"{len(ids)} tokens after {start} do not fit {n_ctx} cells"
            raise NoKVSlotError(f"{problem}; roll back or use a larger n_ctx", code=1, n_tokens=len(ids))
        parts = self._parts(start, len(ids))
        # Several decodes cannot be taken back together where a tail cannot be trimmed.
        anchor = None
        if len(parts) > 1 and start and self._history.needs_states:
            anchor = self.ctx.state_seq_get_data(self.seq_id, SeqFlags.PARTIAL_ONLY)
        before = (self._tokens, self._logits.copy() if self._has_logits else None)
        try:
            with self._all_or_nothing():
                for a, b in parts:
                    self._decode(ids[a:b], last=b == len(ids))
                    if b < len(ids) or not (start + b) % max(self._every, 1):
                        self._anchor()
        except BaseException:
            self._take_back(*before, anchor)
            raise

    def _parts(self, start: int, n: int) -> list[tuple[int, int]]:
        """Cut ``n`` tokens into decodes: at most a batch each, ending where automatic checkpoints are due."""
        ends = set(range(self.ctx.n_batch, n, self.ctx.n_batch)) | {n}
        if self._every and self._history.needs_states:
            ends |= set(range(self._every - start % self._every, n, self._every))
        cuts = sorted({0} | ends)
        return list(pairwise(cuts))

    def _decode(self, ids: Int32Array, *, last: bool) -> None:
        # under the context's lock: another session's decode in between would leave its own logits there
        with self.ctx._handle as handle:
            self.ctx.decode(ids, seq_id=self.seq_id, logits="last" if last else None)
            self._has_logits = False
            if last:
                native_decode.logits_into(handle, -1, self._logits)
                self._has_logits = True
        self._tokens = np.concatenate([self._tokens, ids])

    def _take_back(
        self, tokens: Int32Array, logits: npt.NDArray[np.float32] | None, anchor: npt.NDArray[np.uint8] | None
    ) -> None:
        """Return to these tokens after an operation that failed, or that Ctrl-C has ended half-way.

        What the sequence holds begins with them, or they begin with it.
        """
        n = len(tokens)
        held = self.ctx.seq_pos_max(self.seq_id) + 1
        if held > n and not self.ctx.seq_rm(self.seq_id, n, -1):
            if anchor is not None:
                self.ctx.state_seq_set_data(anchor, self.seq_id, SeqFlags.PARTIAL_ONLY)
            else:
                # one decode, that was done when something else failed: rare enough to pay for it then
                self.ctx.seq_rm(self.seq_id)
                held = 0
        if held < n:
            # trimmed already, or a fatal error in mid-computation: the context had to drop the sequence
            self._rebuild(tokens, held)
        self._tokens = tokens
        self._has_logits = logits is not None
        if logits is not None:
            self._logits[:] = logits

    def _rebuild(self, tokens: Int32Array, held: int) -> None:
        """Decode again what comes after the first ``held``, or after a later checkpoint that holds a whole state."""
        self._tokens, self._has_logits = tokens[:held], False  # should this fail as well, the session is in step
        point = self._history.last_whole(len(tokens))
        if point is not None and point.n_tokens > held:
            self.ctx.state_seq_set_data(point.state, self.seq_id)
            self._tokens = tokens[: point.n_tokens]
        while (at := self.n_past) < len(tokens):
            part = tokens[at : at + self.ctx.n_batch]
            self.ctx.decode(part, seq_id=self.seq_id, logits=None)
            self._tokens = tokens[: at + len(part)]

    def _need_logits(self) -> int:
        """Have the logits after the last token; how many tokens had to be decoded again for it."""
        if self._has_logits:
            return 0
        n = self.n_past
        if not n:
            raise LogitsUnavailableError("the session is empty: there are no logits", index=-1, n_outputs=0)
        point = self._history.at(n)
        if point is not None and point.logits is not None:
            self._logits[:] = point.logits
            self._has_logits = True
            return 0
        last = self._tokens[n - 1 :]
        # nobody may take the cell that is given back for a moment
        with self.ctx._handle, self._or_as_it_was(n - 1, n):
            replayed = self._go_back(n - 1)
            self._advance(last)
        return replayed + 1

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _anchor(self) -> Checkpoint | None:
        """Make an automatic checkpoint here, if the way back would need one."""
        if not (self._every and self._history.needs_states and self.n_past) or self._history.at(self.n_past):
            return None
        point = Checkpoint(self.n_past, automatic=True)
        self._keep_state(point)
        self._history.add(point, n_past=self.n_past)
        return point

    def _keep_state(self, point: Checkpoint, *, full: bool = False) -> None:
        if not self.n_past or not (full or self._history.needs_states):
            return  # to an empty sequence there is always a way back
        flags = SeqFlags.NONE if full else SeqFlags.PARTIAL_ONLY
        point.state = point.sound = self.ctx.state_seq_get_data(self.seq_id, flags)
        point.state.flags.writeable = False
        point.kind = "full" if full else "partial"
        # The last token can be trimmed and decoded again to get its logits, but not out of a recurrent state.
        recurrent = self.ctx.model.is_recurrent or self.ctx.model.is_hybrid
        if recurrent and self._has_logits:
            point.logits = self._logits.copy()

    def _forget_future(self, n_tokens: int | None = None) -> None:
        """Other tokens take the place of what was undone: neither redo nor checkpoints lead there any more."""
        self._redo.clear()
        self._history.drop_after(self.n_past if n_tokens is None else n_tokens)

    # --- going back ---------------------------------------------------------------------------------------------------

    def _can_trim(self, n: int) -> bool:
        model = self.ctx.model
        return can_trim(model.memory_kind, model.n_swa, self.ctx.seq_pos_min(self.seq_id), self.n_past - 1, n)

    def _go_back(self, n: int) -> int:
        """Make the sequence hold the first ``n`` of its tokens; how many were decoded again. Fails without a trace."""
        with self.ctx._handle:
            plan = self._plan_back(n)
            if not plan.replay:
                # before another sequence's decode takes window cells that are only needed to go back
                return self._carry_out(plan, self._tokens[:n])
        return self._carry_out(plan, self._tokens[:n])

    def _plan_back(self, n: int) -> Plan:
        low = memory.seq_pos_min(self.ctx._handle, self.seq_id)
        return self._history.plan_back(n, n_past=len(self._tokens), pos_min=low)

    def _carry_out(self, plan: Plan, tokens: Int32Array) -> int:
        if plan.replay:
            with self._or_as_it_was(None, len(tokens)):
                self._step_back(plan, tokens)
                self._advance(tokens[plan.base :])
        elif plan.way != "nothing":
            # not copied: whoever has other logits without decoding puts another array in the place of this
            before = (self._tokens, self._logits if self._has_logits else None)
            try:
                self._step_back(plan, tokens)
            except BaseException:
                self._take_back(*before, None)
                raise
        return plan.replay

    def _step_back(self, plan: Plan, tokens: Int32Array) -> None:
        """All of a plan but decoding."""
        point = plan.checkpoint
        if plan.way == "trim":
            # exact, as the plan found; since then :meth:`_go_back` has let nobody into the context
            handle = self.ctx._handle
            handle.forget_outputs(self.seq_id)
            if not memory.seq_rm(handle, self.seq_id, plan.base or -1, -1):
                raise SequenceChangedError(f"sequence {self.seq_id} cannot be trimmed to {plan.base} any more")
        elif plan.way == "scratch":
            self.ctx.seq_rm(self.seq_id)
        elif point is not None:
            self._set_state(point)
        if plan.way != "nothing":
            self._tokens = tokens[: plan.base]
            self._has_logits = False
        if point is not None and point.logits is not None and point.n_tokens == len(tokens):
            self._logits = point.logits.copy()
            self._has_logits = True

    def _set_state(self, point: Checkpoint) -> None:
        if point.kind == "full":
            self.ctx.state_seq_set_data(point.state, self.seq_id)
        elif point.sound is not point.state or not put_own(self.ctx, point.state, self.seq_id, point.n_tokens):
            self.ctx.state_seq_set_data(point.state, self.seq_id, SeqFlags.PARTIAL_ONLY)

    # --- coming back after a failure ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _or_as_it_was(self, common: int | None, n: int) -> Iterator[None]:
        """Let the block make the sequence hold up to ``n`` tokens; should it fail, put back what there was.

        Where the block leaves the first ``common`` tokens alone, and the rest can be trimmed, nothing is copied
        beforehand: what is gone is decoded again then.
        """
        old = self._tokens
        with contextlib.ExitStack() as stack:
            room, logits = self._scarce_room(n, stack), None
            if room is not None and self._has_logits:
                logits = self._logits.copy()
            trims = common is not None and self._can_trim(common)
            kept = None if trims or room is not None else self._keep()
            try:
                yield
            except BaseException:
                if room is not None:
                    # A copy of its own would not fit; that of the whole context tells which cells are shared.
                    put_back(self.ctx, self.seq_id, room)
                    self._take_back(old, logits, None)
                elif kept is not None:
                    self._put_back(kept)
                else:
                    if not self.ctx.seq_rm(self.seq_id, common or 0, -1):
                        self.ctx.seq_rm(self.seq_id)
                    self._take_back(old, None, None)
                raise

    def _scarce_room(self, n: int, stack: contextlib.ExitStack) -> Room | None:
        """What :func:`put_back` takes, if what the sequence holds would find no room in cells of its own."""
        if not self._is_in_doubt(n):
            return None
        stack.enter_context(self.ctx._handle)  # what is counted stays true
        room = count_room(self.ctx, self.seq_id)
        return None if room.blob is None or room.takes(self.n_past, self.ctx.limits) else room

    def _is_in_doubt(self, n: int) -> bool:
        """Whether ``n`` tokens, or those it has, might find no room: others keep the cells that it shares with them."""
        ctx, kind = self.ctx, self.ctx.model.memory_kind
        shares = ctx._params.get("kv_unified") and self.seq_id in ctx._handle.shared
        if not self.n_past or kind == "recurrent" or not shares:
            return False
        if ctx.schema.m_rope or ctx._handle.moved_cells:
            return True  # cells cannot be counted by tokens there
        return cells_of_others(ctx, self.seq_id) + max(n, self.n_past) > ctx.limits.base_cells

    def _keep(self) -> Kept:
        return Kept(
            self._tokens,
            self.ctx.state_seq_get_data(self.seq_id) if self.n_past else None,
            self._logits.copy() if self._has_logits else None,
        )

    def _put_back(self, kept: Kept) -> None:
        try:
            if kept.state is None:
                self.ctx.seq_rm(self.seq_id)
            else:
                self.ctx.state_seq_set_data(kept.state, self.seq_id)
        except LlamaStateError:
            # Somebody else took the cells meanwhile, and the tokens are all that is left: an empty session is in step.
            self.ctx.seq_rm(self.seq_id)
            self._tokens, self._has_logits = kept.tokens[:0], False
            return
        self._tokens = kept.tokens
        self._has_logits = kept.logits is not None
        if kept.logits is not None:
            self._logits[:] = kept.logits


class _Turn:
    """:meth:`SessionCore._turn`; a class of its own, for a generator costs a fifth of an undo."""

    __slots__ = ("_handle", "_session")

    def __init__(self, session: SessionCore) -> None:
        self._session = session
        handle = session.ctx._handle
        self._handle = handle if handle.raise_if_busy else None

    def __enter__(self) -> None:
        session = self._session
        session._enter()
        try:
            if self._handle is not None:
                self._handle.__enter__()
            try:
                session._check_open()
            except BaseException:
                if self._handle is not None:
                    self._handle.__exit__(None, None, None)
                raise
        except BaseException:
            session._leave()
            raise

    def __exit__(self, *exc: object) -> None:
        try:
            if self._handle is not None:
                self._handle.__exit__(None, None, None)
        finally:
            session = self._session
            session._witness.leave()
            session._lock.release()


def check_context(ctx: object) -> None:
    """Refuse what is no context."""
    # by what it has: the class itself is made of modules that come after this one
    if not isinstance(ctx, StateAPI):
        raise InvalidArgumentError(f"ctx is {type(ctx).__name__}, not a Context", name="ctx", value=ctx)


def count(name: str, value: object) -> int:
    """Turn an argument into a number that is not negative, or raise :class:`InvalidArgumentError`."""
    number = as_index(value, name, InvalidArgumentError)
    if number < 0:
        raise InvalidArgumentError(f"{name} = {number} is negative", name=name, value=number, limit=0)
    return number


def check_label(label: object) -> None:
    """Refuse what no file could keep: it would only show when the session is saved."""
    try:
        if label is None or (isinstance(label, str) and label.encode() is not None):
            return
    except UnicodeEncodeError:  # lone surrogates
        pass
    problem = "not valid Unicode" if isinstance(label, str) else f"{type(label).__name__}, not str"
    raise InvalidArgumentError(f"label is {problem}", name="label", value=label)


def common_prefix(a: Int32Array, b: Int32Array) -> int:
    """How many elements two arrays share from the beginning."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n
