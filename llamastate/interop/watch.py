"""What is known of the sequence of a ``llama_cpp.Llama``.

A ``Llama`` has two fields for it, ``n_tokens`` and ``input_ids``. Anybody may set them, and they do not say what was
decoded: the embeddings of an image move ``n_tokens`` on over ids that belong to nothing, an attachment changes cells
behind its back. That is no matter for the ``Llama``, which goes on from whatever there is. It is for a store, which
hands the rows to everybody who asks for those ids. So we count ourselves how many tokens from the first on are there
because we saw ``Llama.eval`` decode them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import llama_cpp

from llamastate.attach import traces
from llamastate.context import Context
from llamastate.exactness import can_trim
from llamastate.layout import Schema

__all__ = ["Watch", "keeps_exactly", "turn", "watch_of"]

NOTE = "_llamastate_watch"


class Watch:
    """What we know of one ``Llama``. It lies with the inner context and refers to neither, so it keeps nobody alive.

    Parameters
    ----------
    ctx : Context
        Attached to it.

    Attributes
    ----------
    n_known : int
        So many of its ``input_ids`` are what its sequence 0 was decoded from.
    accelerated : bool
        :func:`~llamastate.interop.llama_cpp.accelerate` is in effect.
    cached : bool
        A :class:`~llamastate.interop.llama_cpp.LlamaStateCache` serves it.
    evaluating : bool
        What its inner context does now, ``Llama.eval`` asked for.
    """

    def __init__(self, ctx: Context) -> None:
        self.schema: Schema = ctx.schema
        self.kind = ctx.model.memory_kind
        self.n_swa = ctx.model.n_swa
        self.n_known = 0
        self.accelerated = False
        self.cached = False
        self.evaluating = False
        self._seen = (0, 0)

    @property
    def active(self) -> bool:
        """Whether what the ``Llama`` does with states is ours to do."""
        return self.accelerated or self.cached

    def look(self, llm: Any) -> None:
        """Know nothing any more if somebody else may have changed the context."""
        if self._seen != traces(llm):
            self.n_known = 0

    def seen(self, llm: Any) -> None:
        """What has changed up to now we know of."""
        self._seen = traces(llm)


def watch_of(llm: Any) -> Watch | None:
    """The watch over a ``Llama`` (or over its inner context), if there is one."""
    watch: Watch | None = getattr(getattr(llm, "_ctx", llm), NOTE, None)
    return watch


@contextlib.contextmanager
def turn(llm: Any, watch: Watch) -> Iterator[Context]:
    """Borrow the context for one operation, alone.

    Attached anew each time (0.2 ms): an attachment keeps the ``Llama``, so none may lie with it.
    """
    watch.look(llm)
    ctx = Context.attach(llm)
    try:
        with ctx._handle:
            ctx._schema_cache = watch.schema
            yield ctx
    finally:
        ctx.close()
        watch.seen(llm)


def keeps_exactly(inner: Any, watch: Watch, n_tokens: int) -> bool:
    """Whether the sequence can be cut down to its first ``n_tokens`` tokens, and be as if it had never gone on.

    llama.cpp says yes for a sliding window that no longer reaches back far enough.
    """
    if inner.memory is None:
        return True  # an encoder's: there is nothing to cut
    low = llama_cpp.llama_memory_seq_pos_min(inner.memory, 0)
    high = llama_cpp.llama_memory_seq_pos_max(inner.memory, 0)
    return can_trim(watch.kind, watch.n_swa, low, high, n_tokens)
