"""What callers hand in, as arrays that C can read."""

from __future__ import annotations

import operator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from llamastate._native.lists import first_outside
from llamastate.errors import InvalidBatchError, InvalidBufferError, LlamaStateError, TokenizeError
from llamastate.words import brief

__all__ = ["Int32Array", "TokensLike", "as_bytes_view", "as_int32", "as_tokens"]

Int32Array: TypeAlias = npt.NDArray[np.int32]
#: Anything NumPy turns into a one-dimensional array of integers.
TokensLike: TypeAlias = npt.ArrayLike

_INT32 = np.iinfo(np.int32)
#: Of the longest integers that are told from each other.
_MAX_BITS = 1024


def as_int32(values: Any, what: str) -> Int32Array:
    """Turn ``values`` into a contiguous int32 array without ever wrapping a number around.

    Raises
    ------
    InvalidBatchError
        Not one-dimensional, not integers, or a value past 32 bits.
    """
    if isinstance(values, (str, bytes)):
        hint = "token ids: use model.tokenize(text)" if what == "tokens" else "an array of integers"
        raise _bad(f"{what} is {type(values).__name__}, not {hint}")
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise _bad(f"{what} is no array: {str(error)[:200]}") from None
    if array.dtype == np.int32 and array.ndim == 1:
        # a copy, always: what has been checked must not change while llama.cpp reads it without the GIL
        return np.array(array, order="C")
    if array.ndim == 0:
        raise _bad(f"{what} is {type(values).__name__}, not an array of integers")
    if array.ndim != 1:
        raise _bad(f"{what} has {array.ndim} dimensions, not 1")
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.dtype.kind in "US":
        raise _bad(f"{what} holds text, not integers")
    if array.dtype.kind not in "iu":
        # an object array is what NumPy makes of integers past 64 bits
        raise _bad(f"{what} holds {array.dtype}, not integers")
    low, high = int(array.min()), int(array.max())
    if low < _INT32.min or high > _INT32.max:
        index = int(np.argmax((array < _INT32.min) | (array > _INT32.max)))
        raise _bad(f"{what}[{index}] = {int(array[index])} does not fit 32 bits", index, int(array[index]))
    return np.ascontiguousarray(array, dtype=np.int32)


def as_tokens(tokens: TokensLike, n_vocab: int) -> Int32Array:
    """Turn ``tokens`` into int32[n], each in ``[0, n_vocab)``.

    Raises
    ------
    TokenizeError
        With the first bad id as ``token``.
    """
    try:
        array = as_int32(tokens, "tokens")
    except InvalidBatchError as error:
        reason = error.reason or str(error)  # without "invalid batch": there may be none
        raise TokenizeError(reason, reason=reason, token=error.value, n_vocab=n_vocab) from None
    bad = first_outside(array, n_vocab)
    if bad >= 0:
        token = int(array[bad])
        raise TokenizeError(
            f"token id {token} is not in [0, {n_vocab})", reason="token id out of range", token=token, n_vocab=n_vocab
        )
    return array


def as_index(value: Any, what: str, error: type[LlamaStateError]) -> int:
    """Turn an integer-like object into an int, or raise ``error``."""
    try:
        number = operator.index(value)
    except TypeError:
        problem = f"{type(value).__name__}, not an integer"
    else:
        if number.bit_length() <= _MAX_BITS:
            return number
        problem = brief(number)  # no message could even write it out
    facts = {"name": what, "reason": what, "value": value, "seq_id": value}
    known = {name: fact for name, fact in facts.items() if name in error.fields}
    raise error(f"{what} is {problem}", **known)


def as_bytes_view(obj: Any) -> memoryview:
    """View any contiguous buffer as bytes, without copying. The view pins the buffer while it lives.

    Raises
    ------
    InvalidBufferError
        No buffer protocol, or not contiguous.
    """
    kind = type(obj).__name__
    try:
        view = memoryview(obj)
    except TypeError:
        raise InvalidBufferError(f"{kind} has no buffer protocol", reason="no buffer protocol", type=kind) from None
    except (ValueError, BufferError) as problem:
        raise InvalidBufferError(f"{kind} cannot be read: {problem}", reason=str(problem), type=kind) from None
    if not view.c_contiguous:
        raise InvalidBufferError(f"{kind} is not contiguous", reason="not contiguous", type=kind)
    if view.nbytes == 0:  # cast() refuses shapes with a zero in them
        return memoryview(b"")
    return view.cast("B")


def _bad(reason: str, index: int | None = None, value: int | None = None) -> InvalidBatchError:
    return InvalidBatchError(f"invalid batch: {reason}", code=-1, reason=reason, index=index, value=value)
