"""llama-cpp-python: its context borrowed, its states without copies, and a cache for its completions.

Nothing of the package is patched: what is taken over is taken over object by object.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp.llama_cache import BaseLlamaCache

from llamastate.arrays import Int32Array, as_index, as_int32
from llamastate.context import Context
from llamastate.errors import (
    ClosedError,
    ContextBusyError,
    InvalidArgumentError,
    InvalidBatchError,
    LlamaStateError,
)
from llamastate.interop import states
from llamastate.interop.takeover import ServingCache, follow
from llamastate.interop.watch import Watch, keeps_exactly, turn, watch_of
from llamastate.prefix.stats import PrefixStats
from llamastate.prefix.store import PrefixStore

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Acceleration", "LlamaStateCache", "accelerate", "attach"]


def attach(llm: llama_cpp.Llama, *, on_busy: str = "wait") -> Context:
    """Work on the context of a live ``llama_cpp.Llama``: :meth:`llamastate.Context.attach`."""
    return Context.attach(llm, on_busy=on_busy)


# --- states -----------------------------------------------------------------------------------------------------------


class Acceleration:
    """What :func:`accelerate` did to a ``Llama``; a context manager that undoes it."""

    def __init__(self, llm: llama_cpp.Llama) -> None:
        self._watch = follow(llm)
        self._watch.accelerated = True

    @property
    def active(self) -> bool:
        """Whether it is in effect."""
        return self._watch.accelerated

    def undo(self) -> None:
        """Give ``save_state`` and ``load_state`` back to llama-cpp-python. Idempotent."""
        self._watch.accelerated = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<llamastate acceleration, {'active' if self.active else 'undone'}>"


def accelerate(llm: llama_cpp.Llama) -> Acceleration:
    """Let ``llm.save_state()`` and ``llm.load_state(state)`` move each byte once.

    Parameters
    ----------
    llm : llama_cpp.Llama
        This object only. Called again it changes nothing.

    Returns
    -------
    Acceleration
        Its ``undo()``, or the end of its ``with`` block, takes it back; otherwise it lasts as long as ``llm``.

    Raises
    ------
    ClosedError, NativeVersionError, TypeError
        As for :meth:`llamastate.Context.attach`.

    Notes
    -----
    The states are ``llama_cpp.LlamaState`` objects as before: they pickle, a ``Llama`` without this loads them, and
    states that one has saved load here. In addition:

    - Loading checks every byte that decides a position or a size, and that the tokens are there; the state of another
      model is refused if it was saved with this. A load that fails changes nothing.
    - ``scores`` are one row of zeros unless ``llm`` was made with ``logits_all=True``: llama-cpp-python never writes
      them then, and copies up to ``n_batch`` rows of leftovers.
    - ``generate()`` evaluates the whole prompt where a sliding window can no longer be cut back to the part that is
      shared, which llama.cpp says it can.

    Cost: one copy of the state in use.

    Examples
    --------
    >>> with accelerate(llm):  # doctest: +SKIP
    ...     state = llm.save_state()
    ...     llm.load_state(state)
    """
    return Acceleration(llm)


# --- the cache --------------------------------------------------------------------------------------------------------


class Pending(llama_cpp.LlamaState):
    """Stands for what a ``Llama`` holds, on the way from its ``save_state`` into its cache."""

    def __init__(self, llm: Any) -> None:
        self.llm = weakref.ref(llm)
        self.n_tokens = llm.n_tokens
        self.input_ids = llm._input_ids


class Hit(llama_cpp.LlamaState):
    """Stands for a stored prefix, on the way from a cache into a ``Llama``."""

    def __init__(self, store: PrefixStore, ids: Int32Array) -> None:
        self._store = store
        self.input_ids = ids
        self.n_tokens = len(ids)

    def __getattr__(self, name: str) -> Any:
        if name in ("scores", "seed", "llama_state", "llama_state_size"):
            raise InvalidArgumentError(
                f"what a LlamaStateCache gives has no {name}: it stands for blocks in a store. Load it into a Llama "
                "that the cache is set in",
                name=name,
                value=None,
            )
        raise AttributeError(name)

    def __reduce__(self) -> Any:
        raise InvalidArgumentError(
            "what a LlamaStateCache gives cannot be pickled: its blocks are in the store", name="state", value=None
        )


class LlamaStateCache(BaseLlamaCache, ServingCache):
    """A cache for completions: ``llm.set_cache(LlamaStateCache("folder"))``.

    In the place of ``LlamaRAMCache`` and ``LlamaDiskCache``. What prompts have in common is stored once, in blocks,
    and outlives the process; nothing is copied that is there already.

    Parameters
    ----------
    path : path-like or PrefixStore or None
        A folder, which any number of processes and of ``Llama`` objects may share, of different models too; or a store
        that is there already, which the cache then does not close. None keeps everything in memory.
    capacity_bytes : int
        What the cache may hold: on disk, or in memory if ``path`` is None.
    ram_bytes : int, optional
        What it may hold in memory beside the disk, also of what is still on its way there: what has no room to wait is
        not stored. As much as on disk, but at most 1 GiB.
    disk_bytes : int, optional
        The same as ``capacity_bytes`` for a cache on disk, and goes before it.
    block_tokens : int
        Tokens of a block. Of models with full attention whole blocks are restored, and the rest of what is shared
        evaluated again.
    anchor_tokens : int, optional
        For models with a sliding window or a recurrent state: where a prompt can be picked up again, other than at its
        end. Its evaluation is cut at multiples of this; by default as llama-cpp-python cuts it, every ``n_batch``.
    **options
        Others of :class:`~llamastate.prefix.PrefixStore`: ``anchor_share``, ``remote``, ``write_behind``, ``durable``.

    Attributes
    ----------
    store : PrefixStore

    Raises
    ------
    InvalidArgumentError
        A size or a number out of range.

    Notes
    -----
    Exact or a miss. After a hit the ``Llama`` holds what evaluating those tokens would have left; at most all but the
    last token of a prompt are restored, so that there is one to evaluate for its logits. What is stored for one model
    or one kind of KV cache is a miss for every other. What cannot be stored or loaded is a miss too, and said once, as
    a ``RuntimeWarning``. Tokens that the ``Llama`` did not evaluate itself (images, an attachment's doing) are not
    stored, nor what comes after them.

    The seed of a ``Llama`` stays as it is at a hit; llama-cpp-python's own caches set it to what it was when the state
    was saved. With ``logits_all`` the ``scores`` of what was restored are NaN, and a completion with ``echo`` and
    ``logprobs``, which needs them, evaluates its whole prompt.

    A ``Llama`` that has met the cache is accelerated (:func:`accelerate`) as long as it is set. Its completions, as
    without a cache, are for one thread at a time (:meth:`llamastate.Context.lock`); the cache may serve several.

    Cost: one copy of what is new for each completion; a hit moves each byte twice, from the store into one piece and
    from there to llama.cpp.

    Examples
    --------
    >>> llm = llama_cpp.Llama("model.gguf")  # doctest: +SKIP
    >>> llm.set_cache(LlamaStateCache("cache", capacity_bytes=10 << 30))  # doctest: +SKIP
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | PrefixStore | None = None,
        *,
        capacity_bytes: int = 2 << 30,
        ram_bytes: int | None = None,
        disk_bytes: int | None = None,
        block_tokens: int = 64,
        anchor_tokens: int | None = None,
        **options: Any,
    ) -> None:
        if anchor_tokens is not None and as_index(anchor_tokens, "anchor_tokens", InvalidArgumentError) < 1:
            raise InvalidArgumentError(
                f"anchor_tokens = {anchor_tokens} is below 1", name="anchor_tokens", value=anchor_tokens, limit=1
            )
        self._owns = not isinstance(path, PrefixStore)
        if isinstance(path, PrefixStore):
            self.store = path
        else:
            capacity = as_index(capacity_bytes, "capacity_bytes", InvalidArgumentError)
            if path is None:
                ram_bytes = capacity if ram_bytes is None else ram_bytes
            else:
                disk_bytes = capacity if disk_bytes is None else disk_bytes
                ram_bytes = min(disk_bytes, 1 << 30) if ram_bytes is None else ram_bytes
            self.store = PrefixStore(
                path, ram_bytes=ram_bytes, disk_bytes=disk_bytes, block_tokens=block_tokens, **options
            )
            capacity_bytes = ram_bytes if disk_bytes is None else disk_bytes
        super().__init__(capacity_bytes)
        self.anchor_tokens = anchor_tokens
        self._warned = False

    # --- as llama-cpp-python calls it ---------------------------------------------------------------------------------

    @property
    def cache_size(self) -> int:
        """Bytes that it holds: on disk, once what is on its way there has arrived; or in memory."""
        self.store.flush()
        stats = self.store.stats()
        return stats.ram_bytes if stats.disk is None else stats.disk.bytes

    def __contains__(self, key: Sequence[int]) -> bool:
        """Whether anything is stored of how these tokens begin."""
        return self.store.lookup(_ids(key)) > 0

    def __getitem__(self, key: Sequence[int]) -> llama_cpp.LlamaState:
        """The longest stored prefix of ``key``, for ``load_state``.

        Raises
        ------
        KeyError
            Nothing is stored of how it begins; or, for a completion, nothing that would serve it better than what its
            ``Llama`` holds.
        """
        ids = _ids(key)
        asker = _asker(self)
        try:
            n = self.store.lookup(ids[:-1]) if asker is None else self._look(asker, ids)
        except LlamaStateError as error:
            self._fail(error)
            n = 0
        if not n:
            raise KeyError("Key not found")
        return Hit(self.store, ids[:n])

    def __setitem__(self, key: Sequence[int], value: llama_cpp.LlamaState) -> None:
        """Store what is new of a state. The tokens are the state's own, whatever ``key`` says.

        Raises
        ------
        InvalidArgumentError
            ``value`` was not saved by a ``Llama`` that is accelerated or has this cache set: nothing says what model it
            is of.
        """
        asker = _asker(self)
        llm = asker["self"] if asker is not None else value.llm() if isinstance(value, Pending) else None
        if llm is not None:
            self._keep(llm)
            return
        _ids(key)
        self._keep_saved(value)

    # --- what it does for the Llama that it serves --------------------------------------------------------------------

    def _look(self, asker: Mapping[str, Any], ids: Int32Array) -> int:
        """How many tokens to restore for a completion; 0 if the ``Llama`` goes on from what it holds."""
        llm = asker["self"]
        watch = follow(llm)
        watch.cached = True
        watch.look(llm)
        if llm._logits_all and asker.get("echo") and asker.get("logprobs") is not None:
            llm.n_tokens = 0
            return 0
        live = _shared(llm._input_ids, ids)
        if live == len(ids) == llm.n_tokens and not llm._requires_eval:
            return 0
        # what generate() would go on from: the last token of a prompt is evaluated in any case
        usable = live - 1 if live == len(ids) else live
        if live > watch.n_known or not keeps_exactly(llm._ctx, watch, usable):
            usable = 0
            # It cannot go on from there, or nobody knows what that is. Without this what the store has would be held
            # against it, and lose.
            llm.n_tokens = 0
        if usable >= len(ids) - 1:
            return 0
        with turn(llm, watch) as ctx:
            n = self.store.lookup(ids[:-1], ctx=ctx)
        return n if n > usable else 0

    def _load(self, llm: Any, watch: Watch, hit: Any) -> bool:
        if not isinstance(hit, Hit):
            return False
        llm.n_tokens = 0
        llm._requires_eval = True
        try:
            with turn(llm, watch) as ctx:
                ctx.seq_rm(0)
                n = hit._store.load(ctx, 0, hit.input_ids)
        except LlamaStateError as error:
            self._fail(error)
            return True
        llm.input_ids[:n] = hit.input_ids[:n]
        if llm._logits_all:
            llm.scores[:n] = np.nan
        llm.n_tokens = n
        watch.n_known = n
        return True

    def _pending(self, llm: Any) -> Any:
        asker = _asker(llm)
        return Pending(llm) if asker is not None and asker["self"] is llm else None

    def _step(self, llm: Any, watch: Watch, n_left: int) -> int:
        if watch.schema.kind == "attention":
            return n_left
        n = int(llm.n_batch)
        if self.anchor_tokens is not None:
            n = min(n, self.anchor_tokens - llm.n_tokens % self.anchor_tokens)
        return min(n, n_left)

    def _reached(self, llm: Any) -> None:
        watch = watch_of(llm)
        if watch is not None and watch.schema.kind != "attention":
            self._keep(llm)

    def _keep(self, llm: Any) -> None:
        """Store what is new of what a ``Llama`` holds."""
        try:
            watch = follow(llm)
            with turn(llm, watch) as ctx:
                n = min(watch.n_known, llm.n_tokens)
                if not n:
                    return
                # of a borrowed context nobody knows; of these tokens we do
                moved, ctx._handle.moved_cells = ctx._handle.moved_cells, False
                try:
                    self.store.put(ctx, 0, llm.input_ids[:n])
                finally:
                    ctx._handle.moved_cells = moved
        except LlamaStateError as error:
            self._fail(error)

    def _keep_saved(self, state: Any) -> None:
        llm = states.saved_by(state)
        if llm is None:
            raise InvalidArgumentError(
                "a state can be put into a LlamaStateCache if it was saved in this process, by a Llama that lives and "
                "is accelerated (llamastate.interop.llama_cpp.accelerate) or has the cache set",
                name="value",
                value=type(state).__name__,
            )
        watch = follow(llm)
        now = states.take(llm, watch)
        states.put(llm, watch, state)
        try:
            self._keep(llm)
        finally:
            states.put(llm, watch, now)

    def _fail(self, error: LlamaStateError) -> None:
        """Go on without: a completion does not need its cache. Only what is closed or busy, its user has to know."""
        if isinstance(error, ClosedError) and error.what == "store":
            raise ClosedError("the cache is closed: llm.set_cache(None) goes on without", what="cache") from error
        if isinstance(error, (ClosedError, ContextBusyError)):
            raise error
        if not self._warned:
            self._warned = True
            warnings.warn(f"the cache goes without: {error}", RuntimeWarning, stacklevel=4)

    # --- the rest -----------------------------------------------------------------------------------------------------

    def stats(self) -> PrefixStats:
        """What the store holds and what it did in this process."""
        return self.store.stats()

    def flush(self) -> None:
        """Wait until everything is written."""
        self.store.flush()

    def close(self) -> None:
        """Write what is waiting, and close the store if it is the cache's own. Idempotent."""
        if self._owns:
            self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<llamastate.interop.llama_cpp.LlamaStateCache over {self.store!r}>"


@functools.cache
def _completion_code() -> Any:
    return llama_cpp.Llama._create_completion.__code__


def _asker(asked: object) -> Mapping[str, Any] | None:
    """The variables of the completion that called the caller, a method of ``asked``, if it was one that did.

    llama-cpp-python does not tell a cache whom it serves. The frame does, and tells a completion, which passes what it
    gets straight on, from anybody else, who may keep it. Where it does not (somebody's own completion), what a cache
    does costs more, and is right all the same.
    """
    frame: Any = sys._getframe(2)
    while frame is not None:
        variables: Mapping[str, Any] = frame.f_locals
        if frame.f_code is _completion_code():
            return variables
        if variables.get("self") is not asked:
            break  # a method that a subclass has put before is passed over, nothing else
        frame = frame.f_back
    return None


def _ids(key: Any) -> npt.NDArray[np.int32]:
    try:
        return as_int32(key, "key")
    except InvalidBatchError as error:
        raise InvalidArgumentError(f"a key is token ids: {error.reason or error}", name="key", value=key) from None


def _shared(ours: npt.NDArray[np.intc], theirs: Int32Array) -> int:
    """How many tokens two sequences begin with together."""
    n = min(len(ours), len(theirs))
    differ = np.flatnonzero(ours[:n] != theirs[:n])
    return int(differ[0]) if len(differ) else n
