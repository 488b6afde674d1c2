"""Borrowing the context of a ``llama_cpp.Llama``.

The object belongs to llama-cpp-python, which knows nothing of locks. As long as an attachment lives, the methods
through which a ``Llama`` reaches its context take the attachment's lock; and what they do to the context is noted, so
that nobody reads logits or takes states that it has made invalid. llama-cpp-python itself is never imported here.

Each of those methods is one turn; a ``Llama.eval`` and the sampling that reads its logits are several. Whoever has
threads puts them into ``with ctx.lock():``. What reads only the model (tokenising, samplers over a row of their own)
takes no turn, for the model does not change; but a ``Llama`` that is closed meanwhile frees it under them, so that is
the one thing not to do while other threads use it.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import sys
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from llamastate import _native
from llamastate._native import handles, memory
from llamastate.errors import ClosedError, NativeVersionError
from llamastate.params import ROPE_FLOATS

if TYPE_CHECKING:
    from llamastate._native.handles import ContextHandle

__all__ = ["OwnAdapter", "borrow", "let_go", "note_adapters", "own_adapters", "traces"]

_NOTE = "_llamastate_adapters"
_LENT = "_llamastate_lent"

#: One handle, and so one lock, for each borrowed context; the key is the id of the owner's inner object.
_borrowed: weakref.WeakValueDictionary[int, ContextHandle] = weakref.WeakValueDictionary()

#: Methods of llama_cpp._internals.LlamaContext that touch the native context, and what they leave to be known.
_GUARDED = {
    "decode": "decodes",
    "encode": "decodes",
    "kv_cache_clear": "",
    "kv_cache_seq_rm": "cuts",
    "kv_cache_seq_cp": "replaces part",
    "kv_cache_seq_keep": "",
    "kv_cache_seq_shift": "shifts",
    "get_state_size": "reads",
    "set_n_threads": "reads",
    "close": "reads",
}
#: The same of llama_cpp.Llama, where it goes past that.
_GUARDED_LLAMA = {"load_state": "replaces", "save_state": "reads", "reset": "", "close": "reads"}
#: These change sequences that are as long as before.
_HIDDEN = ("shifts", "replaces", "replaces part")
#: After these no shift of positions is pending any more.
_UPDATES = ("decodes", "replaces")


def borrow(llm: Any, *, raise_if_busy: bool) -> tuple[ContextHandle, dict[str, Any]]:
    """Borrow the context of ``llm``.

    Parameters
    ----------
    llm : llama_cpp.Llama
    raise_if_busy : bool

    Returns
    -------
    handle : ContextHandle
        The same for every attachment to one ``Llama``.
    params : dict
        What the context was made with, as for ``create_context``.

    Raises
    ------
    ClosedError
        The ``Llama`` is closed.
    NativeVersionError
        Its library is another file than ours.
    TypeError
        It is no ``Llama``.
    """
    inner = getattr(llm, "_ctx", None)
    if inner is None or not hasattr(inner, "ctx") or not hasattr(llm, "context_params"):
        raise TypeError(f"{type(llm).__name__} is no llama_cpp.Llama")
    if inner.ctx is None:
        raise ClosedError("the Llama is closed", what="context")
    _check_library()
    handle = _borrowed.get(id(inner))
    if handle is None or handle.closed:
        address = ctypes.cast(inner.ctx, ctypes.c_void_p).value or 0
        handle = handles.borrow_context(
            address,
            llm,
            lambda: inner.ctx is not None,
            lambda: inner.model.model is not None,
            raise_if_busy=raise_if_busy,
            embeddings=bool(llm.context_params.embeddings),
        )
        _borrowed[id(inner)] = handle
        setattr(inner, _LENT, getattr(inner, _LENT, 0) + 1)
        _guard(llm)
    params = _params_of(llm.context_params)
    overrides = getattr(llm, "kv_overrides", None)
    if overrides:
        # metadata of the model that its file does not tell; states of the model without them do not fit
        params["overrides"] = json.dumps(overrides, sort_keys=True, default=str)
    return handle, params


def traces(llm: Any) -> tuple[int, int]:
    """What differs from an earlier answer if attachments may have changed the context meanwhile.

    How often it was lent, and the epoch of the handle that is alive, or -1. Who makes changes of his own compares what
    was before them, and remembers what is after them. ``llm`` may be the inner object as well.
    """
    inner = getattr(llm, "_ctx", llm)
    handle = _borrowed.get(id(inner))
    return getattr(inner, _LENT, 0), -1 if handle is None else handle.epoch


class OwnAdapter(NamedTuple):
    """A LoRA that is in effect in a borrowed context: all that may be kept of it without keeping the ``Llama``."""

    path: str
    digest: str
    scale: float
    address: int


def own_adapters(llm: Any) -> tuple[OwnAdapter, ...]:
    """The LoRAs in effect: those that were set through an attachment, or else the one the ``Llama`` was made with."""
    noted: tuple[OwnAdapter, ...] | None = vars(llm._ctx).get(_NOTE)
    if noted is not None:
        return noted
    path, pointer = getattr(llm, "lora_path", None), getattr(llm, "_lora_adapter", None)
    if not path or not pointer or not llm.lora_scale:
        return ()
    address = ctypes.cast(pointer, ctypes.c_void_p).value or 0
    return (OwnAdapter(os.fsdecode(path), "", float(llm.lora_scale), address),)


def note_adapters(llm: Any, adapters: tuple[OwnAdapter, ...]) -> None:
    """Remember with the ``Llama`` what an attachment has set: the next one may come after this one has gone."""
    setattr(llm._ctx, _NOTE, adapters)


def _params_of(native: Any) -> dict[str, Any]:
    integers = ("type_k", "type_v", "flash_attn_type", "pooling_type", "rope_scaling_type", "yarn_orig_ctx")
    booleans = ("offload_kqv", "op_offload", "embeddings", "swa_full", "kv_unified")
    return {
        **{n: int(getattr(native, n)) for n in integers},
        **{n: bool(getattr(native, n)) for n in booleans},
        **{n: float(getattr(native, n)) for n in ROPE_FLOATS},
    }


def _check_library() -> None:
    # Two copies of llama.cpp in one process have each their own types, backends and registries: a pointer from one
    # means nothing to the other, even where the code is the same.
    theirs = getattr(getattr(sys.modules.get("llama_cpp.llama_cpp"), "_lib", None), "_name", None)
    ours = _native.library
    if theirs and not os.path.samefile(theirs, ours):
        raise NativeVersionError(
            f"llama_cpp runs on {theirs}, llamastate on {ours}",
            expected=str(ours),
            found=theirs,
            library=theirs,
            command="unset LLAMASTATE_LLAMA_CPP LLAMA_CPP_LIB_PATH",
        )


def let_go(handle: ContextHandle) -> ContextHandle:
    """Give up a share of a borrowed handle, after the operation that is running; a closed one to keep instead."""
    if handle.closed:
        handle.close()  # its owner has freed it: for everybody
        return handle
    with handle:
        return handles.closed_copy(handle)


def _guard(llm: Any) -> None:
    """Make the owner's own calls take turns with ours.

    Its object and the one inside become objects of a subclass each. Functions put onto the objects themselves would
    have to refer to them, and so keep them alive, or else fail when the garbage collector ends them.
    """
    for obj, effects in ((llm, _GUARDED_LLAMA), (llm._ctx, _GUARDED)):
        cls: Any = type(obj)
        if "_llamastate_guarded" not in vars(cls):
            obj.__class__ = _guarded_class(cls, tuple(effects.items()))


@functools.cache
def _guarded_class(cls: Any, effects: tuple[tuple[str, str], ...]) -> Any:
    def reduce(self: Any, protocol: Any) -> Any:
        # (copyreg.__newobj__, (class, ...), state, ...): whoever unpickles it is to get an ordinary one
        _, (_, *arguments), *rest = cls.__reduce_ex__(self, protocol)
        return _ordinary, (cls, *arguments), *rest

    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    methods = {name: _guarded(getattr(cls, name), effect) for name, effect in effects if hasattr(cls, name)}
    return type(cls.__name__, (cls,), {**names, **methods, "__reduce_ex__": reduce, "_llamastate_guarded": True})


def _ordinary(cls: type[Any], *arguments: Any) -> Any:
    return cls.__new__(cls, *arguments)


def _spans(handle: ContextHandle) -> list[tuple[int, int]]:
    return [(memory.seq_pos_min(handle, seq), memory.seq_pos_max(handle, seq)) for seq in range(handle.n_seq_max)]


def _guarded(function: Any, effect: str) -> Any:
    @functools.wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = _borrowed.get(id(getattr(self, "_ctx", self)))
        if handle is None or handle.closed:
            return function(self, *args, **kwargs)
        with handle:
            before = [] if effect == "reads" else _spans(handle)
            handle.lock_model()
            try:
                result = function(self, *args, **kwargs)
            finally:
                handle.unlock_model()
                if effect != "reads":
                    # Positions tell which sequences it was, but where it is a hole, a copy or a state that was loaded
                    hidden = effect in _HIDDEN or (effect == "cuts" and any(p > 0 for p in args[2:]))
                    after = _spans(handle)
                    handle.changes.note_all(s for s, span in enumerate(after) if hidden or span != before[s])
            if effect != "reads":
                handle.forget_outputs()
                # of which sequences, and which cells they share now, nobody tells
                every = frozenset(range(handle.n_seq_max))
                if effect in _UPDATES:
                    handle.shifted = frozenset()
                elif effect == "shifts" or handle.shifted:
                    handle.shifted = every
                handle.shared = every
            return result

    return call
