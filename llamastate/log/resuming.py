"""From a log to a live session: the newest state that still serves, and a decode of what came after it.

A log records items, not tokens: which tokens they are, a chat template decides. So the history is rendered anew, and
what the saved state was decoded from is compared with that. Whatever the template does, the session then holds the
tokens of the rendered history and nothing else; a state only saves decoding what it shares with them.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llamastate.arrays import Int32Array, TokensLike, as_tokens
from llamastate.errors import FingerprintMismatchError, InvalidArgumentError, LlamaStateError
from llamastate.log.folding import RestoredState, StateReference
from llamastate.log.items import item_kind, to_messages
from llamastate.log.memory import moved
from llamastate.log.sessionlog import SessionLog
from llamastate.log.states import put_into, require_stored, saved_to, usable_snapshot
from llamastate.log.store import LogStore
from llamastate.restore import count_room, put_back
from llamastate.session import Session, SyncResult
from llamastate.sessionio import in_thread

if TYPE_CHECKING:
    from llamastate.context import Context
    from llamastate.model import Model
    from llamastate.prefix import PrefixStore
    from llamastate.snapshot import Snapshot

__all__ = ["Resumed", "aresume", "branch", "lock_session", "render", "resume", "resume_log", "sync_text"]

_log = logging.getLogger("llamastate.log")

#: Gives the text of a conversation, or its tokens.
Renderer = Callable[[RestoredState], "str | TokensLike"]


class Resumed(NamedTuple):
    """A session that was brought back, and how.

    Attributes
    ----------
    session : Session
    log : SessionLog
    state : RestoredState
        What the log folds to.
    source : StateReference or None
        The state that was restored; None if everything was decoded.
    sync : SyncResult
        What was reused of it, and what was decoded.
    skipped : tuple of (StateReference, LlamaStateError)
        Newer states that did not serve, and why.
    """

    session: Session
    log: SessionLog
    state: RestoredState
    source: StateReference | None
    sync: SyncResult
    skipped: tuple[tuple[StateReference, LlamaStateError], ...]


def lock_session(
    log: SessionLog,
    session: Session,
    path: str | os.PathLike[str] | None = None,
    *,
    prefix: PrefixStore | None = None,
    locked_prefix_len: int | None = None,
) -> str:
    """Keep a session's state, and record in its log where it is.

    Parameters
    ----------
    log : SessionLog
    session : Session
        That holds the log's history, or the beginning of it.
    path : path-like, optional
        Of a snapshot to be saved. If it is in or below the folder of the store, it is recorded relative to that: they
        can be moved together. A file that an older entry names should not be replaced: its hash is in that entry.
    prefix : PrefixStore, optional
        To put the session into, instead or as well; the chain hash of its last block is recorded.
    locked_prefix_len : int, optional
        Items that are fixed from now on; all, if not given.

    Returns
    -------
    str
        The new head's hash.

    Raises
    ------
    HeadMovedError
        Somebody else has appended to the log; nothing is recorded, and a file that was not there is not.
    SaveError, StoreFullError
        The snapshot cannot be written, the prefix store cannot take it.

    Notes
    -----
    Besides saving, one BLAKE2b over the snapshot: about a second a gigabyte.
    """
    if path is None and prefix is None:
        raise InvalidArgumentError("where to? give path, prefix or both", name="path", value=None)
    found = log.store.head(log.id).hash
    if found != log.head_hash:
        raise moved(log.id, log.head_hash, found)
    n = len(log.restore().history) if locked_prefix_len is None else locked_prefix_len
    was_there = path is None or os.path.lexists(path)
    state: dict[str, Any] = {}
    try:
        if path is not None:
            with session.snapshot() as snapshot:
                state["snapshot"] = saved_to(path, snapshot, log.store)
        if prefix is not None:
            state["prefix"] = put_into(prefix, session)
        return log.save_cache_locked(n, state=state)
    except BaseException:
        if path is not None and not was_there:
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise


def render(model: Model, state: RestoredState, *, add_generation_prompt: bool | None = None, **variables: Any) -> str:
    """Write the history of a session as its model was trained to read it.

    Parameters
    ----------
    model : Model
        With a chat template.
    state : RestoredState
    add_generation_prompt : bool, optional
        End where the model is to begin; if not given, when the last item is not the model's own.
    **variables
        More names for the template (``tools``, ...).

    Returns
    -------
    str
        "" for a session in which nothing is.

    Raises
    ------
    TemplateError
    """
    messages = to_messages(state.history, state.system_prompt)
    if not messages:
        return ""
    if add_generation_prompt is None:
        own = bool(state.history) and item_kind(state.history[-1]) in ("assistant", "reasoning", "tool_call")
        add_generation_prompt = bool(state.history) and not own
    return model.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, **variables)


def sync_text(session: Session, text: str) -> SyncResult:
    """Make a session hold a rendered conversation, decoding only what is new.

    Where the session's tokens spell the beginning of the text they stay, also if the tokenizer would cut that text
    otherwise now: a model can spell an answer in other tokens than the tokenizer would.

    Parameters
    ----------
    session : Session
    text : str
        Control tokens written out, BOS too if there is to be one: what chat templates give.

    Raises
    ------
    NoKVSlotError, DecodeError, TokenizeError
        The session is as it was.
    """
    return session.sync(_spell(session.ctx.model, session.tokens, text))


def resume(store: LogStore, session_id: str, ctx: Context, **options: Any) -> Session:
    """Bring a session back from its log.

    Parameters
    ----------
    store : LogStore
    session_id : str
    ctx : Context
    **options
        As for :func:`resume_log`.

    Returns
    -------
    Session
        Live, and in step with the history. :func:`resume_log` also tells how.

    Raises
    ------
    SessionNotFoundError, LogTamperedError
        There is no such log, or it does not hold.
    FingerprintMismatchError
        All states that there are belong to another model or other settings; the sequence is as it was.
    """
    return resume_log(SessionLog.open(store, session_id), ctx, **options).session


async def aresume(store: LogStore, session_id: str, ctx: Context, **options: Any) -> Session:
    """:func:`resume` for asyncio. A task that is cancelled waits for what is under way."""
    return await in_thread(lambda stopped: resume(store, session_id, ctx, **options))


def resume_log(
    log: SessionLog,
    ctx: Context,
    *,
    seq_id: int = 0,
    render: Renderer | None = None,  # the function of that name is what it is otherwise
    on_mismatch: str = "raise",
    state: bool = True,
    prefix: PrefixStore | None = None,
    variables: Mapping[str, Any] | None = None,
    **options: Any,
) -> Resumed:
    """Fold a log, restore the newest state that serves, decode the rest.

    Parameters
    ----------
    log : SessionLog
    ctx : Context
    seq_id : int
        The sequence to use. What it held is replaced.
    render : callable, optional
        Gets the :class:`RestoredState`; gives the conversation's text, or its tokens. The model's chat template, if not
        given.
    on_mismatch : {"raise", "decode"}
        When there are states, but all of another model or other settings: say so, or decode everything with this one.
    state : bool
        Whether saved states are to be used; else everything is decoded.
    prefix : PrefixStore, optional
        Where states are that were locked into one. If none serves, what it has of these tokens is used all the same.
    variables : mapping, optional
        More names for the chat template.
    **options
        As for :class:`Session`.

    Returns
    -------
    Resumed

    Raises
    ------
    LogTamperedError
        The log does not hold.
    FingerprintMismatchError
        As said; ``field`` names what differs from the newest state.
    TemplateError, TokenizeError, NoKVSlotError, DecodeError
        The history cannot be rendered, or does not fit. In all cases the sequence is as it was.

    Notes
    -----
    A state serves if it is there, has the hash that the log has on record, and was made by this model with these
    settings. Reads it; decodes O(new tokens).
    """
    if on_mismatch not in ("raise", "decode"):
        raise InvalidArgumentError(
            f"on_mismatch is {on_mismatch!r}, not 'raise' or 'decode'", name="on_mismatch", value=on_mismatch
        )
    folded = log.restore()
    model = ctx.model
    wanted = _default_render(model, folded, variables) if render is None else render(folded)
    if not isinstance(wanted, str):
        wanted = as_tokens(wanted, model.n_vocab)
    spelt = _spell(model, np.empty(0, np.int32), wanted) if isinstance(wanted, str) else wanted
    skipped: list[tuple[StateReference, LlamaStateError]] = []
    with ctx._handle, contextlib.ExitStack() as stack:
        source, snapshot = _newest(log.store, folded.states if state else [], ctx, prefix, spelt, skipped, stack)
        if source is None and on_mismatch == "raise":
            for _, problem in skipped:
                if isinstance(problem, FingerprintMismatchError):
                    raise problem
        if snapshot is not None and isinstance(wanted, str):
            spelt = _spell(model, snapshot.tokens, wanted)
        old = ctx.state_seq_get_data(seq_id) if ctx.seq_pos_max(seq_id) >= 0 else None
        changes = ctx._handle.changes.count(seq_id)
        # a copy of its own may find no room where the cells were shared
        room = count_room(ctx, seq_id) if old is not None and seq_id in ctx._handle.shared else None
        try:
            if snapshot is not None:
                session = Session.from_snapshot(ctx, snapshot, seq_id=seq_id, **options)
            else:
                session = _from_prefix(ctx, seq_id, spelt, prefix if state else None, options)
            sync = session.sync(spelt)
        except BaseException:
            ctx.seq_rm(seq_id)
            if room is not None and room.blob is not None:
                put_back(ctx, seq_id, room)
            elif old is not None:
                ctx.state_seq_set_data(old, seq_id)
            ctx._handle.changes.set_back(seq_id, changes)  # a session that was there can go on
            raise
    for reference, problem in skipped:
        _log.info("session %s: the state at item %d does not serve: %s", log.id, reference.history_len, problem)
    return Resumed(session, log, folded, source, sync, tuple(skipped))


def branch(
    log: SessionLog, session: Session, dest_seq_id: int, *, session_id: str | None = None
) -> tuple[SessionLog, Session]:
    """Continue a conversation in two ways: :meth:`Session.branch` and :meth:`SessionLog.fork`, both or neither.

    Parameters
    ----------
    log : SessionLog
    session : Session
    dest_seq_id : int
        An empty sequence of the same context.
    session_id : str, optional
        As for :meth:`SessionLog.create`.

    Returns
    -------
    tuple of SessionLog and Session
        Of the branch.
    """
    other = session.branch(dest_seq_id)
    try:
        return log.fork(session_id=session_id), other
    except BaseException:
        session.ctx.seq_rm(dest_seq_id)
        raise


# --- the newest state that serves -------------------------------------------------------------------------------------


def _newest(
    store: LogStore,
    states: list[StateReference],
    ctx: Context,
    prefix: PrefixStore | None,
    tokens: Int32Array,
    skipped: list[tuple[StateReference, LlamaStateError]],
    stack: contextlib.ExitStack,
) -> tuple[StateReference | None, Snapshot | None]:
    """The state, and its snapshot if it is not in the prefix store."""
    for reference in reversed(states):
        # members of other names are not ours to judge
        if isinstance(recorded := reference.state.get("prefix"), dict):
            try:
                require_stored(prefix, recorded, ctx, tokens)
                return reference, None
            except LlamaStateError as problem:
                skipped.append((reference, problem))
        if isinstance(recorded := reference.state.get("snapshot"), dict):
            try:
                return reference, stack.enter_context(usable_snapshot(store, recorded, ctx))
            except LlamaStateError as problem:
                skipped.append((reference, problem))
    return None, None


def _from_prefix(
    ctx: Context, seq_id: int, tokens: Int32Array, prefix: PrefixStore | None, options: dict[str, Any]
) -> Session:
    """A session with as much of the tokens as the prefix store has."""
    n, logits = 0, None
    if prefix is None:
        ctx.seq_rm(seq_id)
    else:
        n, logits = prefix.load_with_logits(ctx, seq_id, tokens)
    session = Session(ctx, seq_id, tokens=tokens[:n], **options)
    if logits is not None:
        session._logits, session._has_logits = logits, True
    return session


# --- from text to tokens ----------------------------------------------------------------------------------------------


def _default_render(model: Model, state: RestoredState, variables: Mapping[str, Any] | None) -> str:
    return render(model, state, **(variables or {}))


def _spell(model: Model, held: Int32Array, text: str) -> Int32Array:
    """Tokens of a text; those that are held first, if they spell its beginning."""
    if not text:
        return np.empty(0, np.int32)
    if len(held):
        spelt = model.detokenize(held, unparse_special=True)
        if text.startswith(spelt):
            rest = model.tokenize(text[len(spelt) :], add_special=False, parse_special=True)
            both = np.concatenate([held, rest])
            # what stands alone can be tokenised as a beginning, with a space before it
            if model.detokenize(both, unparse_special=True) == text:
                return both
    return model.tokenize(text, add_special=False, parse_special=True)
