"""The methods of a ``llama_cpp.Llama`` in which we take part.

As for an attachment (``llamastate.attach``), the object and the one inside become objects of a subclass each. The
subclass stays; what it does differently depends on the watch, so that it can be switched off.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from llamastate.context import Context
from llamastate.interop import states
from llamastate.interop.watch import NOTE, Watch, keeps_exactly, watch_of

__all__ = ["ServingCache", "follow"]


class ServingCache:
    """What a cache of ours is asked by a ``Llama`` that it serves."""

    def _pending(self, llm: Any) -> Any:
        """What ``save_state`` gives, without copying anything, if it is asked for nobody but this cache; else None."""
        raise NotImplementedError

    def _step(self, llm: Any, watch: Watch, n_left: int) -> int:
        """How many of the tokens that are still to be evaluated go into the next decode."""
        raise NotImplementedError

    def _reached(self, llm: Any) -> None:
        """Part of a prompt has been evaluated, and its end is a place to return to."""
        raise NotImplementedError

    def _load(self, llm: Any, watch: Watch, hit: Any) -> bool:
        """Bring what ``__getitem__`` has found into the context; False if ``hit`` is a state like any other."""
        raise NotImplementedError


def follow(llm: Any) -> Watch:
    """Watch a ``Llama`` from now on.

    Raises
    ------
    ClosedError, NativeVersionError, TypeError
        As for :meth:`llamastate.Context.attach`.
    UnsupportedLayoutError
        Its states cannot be understood.
    """
    watch = watch_of(llm)
    if watch is not None:
        return watch
    with Context.attach(llm) as ctx:
        watch = Watch(ctx)
    taken: tuple[Any, Any] = type(llm), type(llm._ctx)
    llm.__class__ = _llama_class(taken[0])
    llm._ctx.__class__ = _inner_class(taken[1])
    setattr(llm._ctx, NOTE, watch)
    watch.seen(llm)
    return watch


def _names(cls: Any) -> dict[str, Any]:
    # as attach does: it looks as before, and is not guarded again
    return {**{n: getattr(cls, n) for n in ("__module__", "__qualname__", "__doc__")}, "_llamastate_guarded": True}


def _cache_of(llm: Any) -> ServingCache | None:
    cache = getattr(llm, "cache", None)
    return cache if isinstance(cache, ServingCache) else None


@functools.cache
def _llama_class(cls: Any) -> Any:
    plain_eval, plain_save, plain_load = cls.eval, cls.save_state, cls.load_state

    def get_n_tokens(self: Any) -> int:
        n: int = vars(self)["n_tokens"]
        return n

    def set_n_tokens(self: Any, n: int) -> None:
        # going back forgets; going on, other than by eval, adds nothing that is known
        watch = watch_of(self)
        if watch is not None:
            watch.n_known = min(watch.n_known, n)
        vars(self)["n_tokens"] = n

    @functools.wraps(plain_eval)
    def eval(self: Any, tokens: Sequence[int]) -> None:  # noqa: A001
        watch, cache = watch_of(self), _cache_of(self)
        if watch is None or not len(tokens):
            plain_eval(self, tokens)
            return
        watch.cached = cache is not None
        prompt = len(tokens) > 1 and self.draft_model is None  # drafts come several at a time as well
        at = 0
        while at < len(tokens):
            n = len(tokens) - at
            if cache is not None and prompt:
                n = cache._step(self, watch, n)
            _eval_known(self, watch, tokens[at : at + n], plain_eval)
            at += n
            if cache is not None and prompt:
                cache._reached(self)

    @functools.wraps(plain_save)
    def save_state(self: Any) -> Any:
        watch, cache = watch_of(self), _cache_of(self)
        if watch is None or not (watch.accelerated or cache is not None):
            return plain_save(self)
        pending = None if cache is None else cache._pending(self)
        return states.take(self, watch) if pending is None else pending

    @functools.wraps(plain_load)
    def load_state(self: Any, state: Any) -> None:
        watch, cache = watch_of(self), _cache_of(self)
        if watch is not None and cache is not None and cache._load(self, watch, state):
            return
        if watch is not None and (watch.accelerated or cache is not None):
            states.put(self, watch, state)
            return
        plain_load(self, state)
        if watch is not None:
            watch.n_known = 0

    methods = {"eval": eval, "save_state": save_state, "load_state": load_state}
    return type(cls.__name__, (cls,), {**_names(cls), **methods, "n_tokens": property(get_n_tokens, set_n_tokens)})


def _eval_known(llm: Any, watch: Watch, tokens: Sequence[int], plain_eval: Any) -> None:
    start = llm.n_tokens
    if start:
        watch.look(llm)
    follows = start <= watch.n_known
    watch.n_known = min(watch.n_known, start)
    watch.evaluating = True
    try:
        plain_eval(llm, tokens)
    finally:
        watch.evaluating = False
        watch.seen(llm)
    if follows:
        watch.n_known = llm.n_tokens


#: Methods of the inner context after which nothing is known of sequence 0, unless eval has called them.
_CHANGING = ("decode", "encode", "kv_cache_clear", "kv_cache_seq_cp", "kv_cache_seq_keep", "kv_cache_seq_shift")


@functools.cache
def _inner_class(cls: Any) -> Any:
    plain_rm = cls.kv_cache_seq_rm

    @functools.wraps(plain_rm)
    def kv_cache_seq_rm(self: Any, seq_id: int, p0: int, p1: int) -> bool:
        watch = watch_of(self)
        if watch is None or seq_id > 0:  # a negative one counts as the first
            return bool(plain_rm(self, seq_id, p0, p1))
        if watch.active and p1 < 0 and not keeps_exactly(self, watch, p0):
            return False  # generate() evaluates the whole prompt then
        watch.look(self)
        watch.n_known = min(watch.n_known, max(p0, 0))
        done = bool(plain_rm(self, seq_id, p0, p1))
        watch.seen(self)
        return done

    methods = {name: _forgetting(getattr(cls, name)) for name in _CHANGING if hasattr(cls, name)}
    return type(cls.__name__, (cls,), {**_names(cls), **methods, "kv_cache_seq_rm": kv_cache_seq_rm})


def _forgetting(plain: Any) -> Any:
    @functools.wraps(plain)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch = watch_of(self)
        if watch is not None and not watch.evaluating:
            watch.n_known = 0
        return plain(self, *args, **kwargs)

    return call
