"""``LlamaState``: the whole context's state and the Python fields beside it, with one copy of each byte.

The objects are llama-cpp-python's own, with bytes of the same format, so that its ``load_state`` takes ours and ours
takes its. What is added (one attribute, of plain types) says which model the state is of, and survives pickling in
programs that know nothing of it.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from llamastate import layout
from llamastate.arrays import as_bytes_view, as_index
from llamastate.errors import InvalidArgumentError, TokensMismatchError
from llamastate.fingerprint import Fingerprint, require_same
from llamastate.interop.watch import Watch, turn

__all__ = ["put", "saved_by", "take"]

_NOTE = "llamastate"

# A bytes object may be written to as long as nobody else has seen it: C's way of making one without a copy.
_new_bytes = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_char_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)
_address = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(("PyBytes_AsString", ctypes.pythonapi))


def take(llm: Any, watch: Watch) -> Any:
    """What ``Llama.save_state`` gives.

    Returns
    -------
    llama_cpp.LlamaState
        Its ``scores`` are one row of zeros if the ``Llama`` was not made with ``logits_all``: nothing writes them then.
    """
    with turn(llm, watch) as ctx:
        size = ctx.state_get_size()
        data = _new_bytes(None, size)
        written = ctx.state_get_data_into((ctypes.c_uint8 * size).from_address(_address(data)))
        scores = llm._scores.copy() if llm._logits_all else np.zeros((1, llm._n_vocab), np.float32)
        state = llama_cpp.LlamaState(
            input_ids=llm.input_ids.copy(),
            scores=scores,
            n_tokens=llm.n_tokens,
            llama_state=data if written == size else data[:written],
            llama_state_size=written,
            seed=llm._seed,
        )
        note = {"fingerprint": ctx.fingerprint.to_dict(), "n_known": watch.n_known, "scores": bool(llm._logits_all)}
        setattr(state, _NOTE, note)
        _origins[state] = weakref.ref(llm)
        return state


#: Which Llama saved a state, for as long as both live.
_origins: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def saved_by(state: Any) -> Any:
    """The ``Llama`` that :func:`take` took a state from; None if it was not taken here, or the ``Llama`` is gone."""
    try:
        origin = _origins.get(state)
    except TypeError:  # not even an object that could be referred to
        return None
    return None if origin is None else origin()


def put(llm: Any, watch: Watch, state: Any) -> None:
    """What ``Llama.load_state`` does.

    Raises
    ------
    InvalidArgumentError
        No ``LlamaState``, or one whose fields do not fit this ``Llama``.
    FingerprintMismatchError
        It is of another model, or of another kind of cache.
    TokensMismatchError
        Its tokens are more than its cells.
    LoadError
        Its bytes are not a state of this context. In all four cases nothing has changed.
    """
    note = _note(state)
    try:
        n_tokens = as_index(state.n_tokens, "n_tokens", InvalidArgumentError)
        ids, seed, blob, size = state.input_ids, state.seed, state.llama_state, state.llama_state_size
    except AttributeError as error:
        raise _bad("state", type(state).__name__, f"it is no LlamaState: {error}") from None
    ids = _as_ids(ids)
    if not 0 <= n_tokens <= min(len(ids), len(llm.input_ids)):
        raise _bad("n_tokens", n_tokens, f"there are {len(ids)} input_ids, and room for {len(llm.input_ids)}")
    scores = _scores_of(llm, state, n_tokens, note) if llm._logits_all else None
    with as_bytes_view(blob) as whole, turn(llm, watch) as ctx:
        size = as_index(size, "llama_state_size", InvalidArgumentError)
        if not 0 <= size <= whole.nbytes:
            raise _bad("llama_state_size", size, f"llama_state has {whole.nbytes} bytes")
        if note is not None:
            require_same(Fingerprint.from_dict(note["fingerprint"]), ctx.fingerprint)
        with whole[:size] as view:
            info = layout.validate_context(view, ctx.schema, ctx.limits)
            low, high = info.sequences.get(0, (-1, -1))
            if high + 1 < n_tokens:
                raise TokensMismatchError(
                    f"the state holds {high + 1} positions, not {n_tokens}",
                    n_tokens=n_tokens,
                    pos_min=low,
                    pos_max=high,
                )
            # as long as it is not known what there is, there is nothing
            llm.n_tokens = 0
            llm._requires_eval = True
            ctx.state_set_data(view)
        llm.input_ids[:n_tokens] = ids[:n_tokens]
        if scores is not None:
            llm.scores[:n_tokens] = scores
        llm.n_tokens = n_tokens
        llm._seed = seed
        watch.n_known = 0 if note is None else min(n_tokens, note["n_known"])


def _note(state: Any) -> Mapping[str, Any] | None:
    note = getattr(state, _NOTE, None)
    if note is None:
        return None
    kinds = {"fingerprint": dict, "n_known": int, "scores": bool}
    if not isinstance(note, Mapping) or any(type(note.get(name)) is not kind for name, kind in kinds.items()):
        raise _bad(_NOTE, note, "it is not what this package writes")
    return note


def _as_ids(ids: Any) -> npt.NDArray[np.intc]:
    array = np.asarray(ids)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise _bad("input_ids", ids, f"it is {array.dtype}{list(array.shape)}, not a row of integers")
    return array.astype(np.intc, copy=False)


def _scores_of(llm: Any, state: Any, n_tokens: int, note: Mapping[str, Any] | None) -> Any:
    if note is not None and not note["scores"]:
        return np.nan  # nobody knows them
    scores = np.asarray(state.scores)
    if scores.shape != (n_tokens, llm._n_vocab) or scores.dtype.kind != "f":
        raise _bad("scores", None, f"it is {scores.dtype}{list(scores.shape)}, not [{n_tokens}, {llm._n_vocab}]")
    return scores


def _bad(name: str, value: Any, reason: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"not a state to load: {name}: {reason}", name=name, value=value)
