"""A batch: tokens of one or several sequences that are decoded together."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from llamastate.arrays import Int32Array, TokensLike, as_index, as_int32
from llamastate.errors import InvalidBatchError
from llamastate.words import brief

__all__ = ["Batch"]


class Batch:
    """Tokens to decode, each with a position, the sequences that it belongs to, and whether its logits are wanted.

    The counterpart of ``llama_batch``. It may be cleared and filled again; :meth:`Context.decode_batch` reads it and
    changes nothing in it.

    Examples
    --------
    >>> batch = Batch()
    >>> batch.add(5, pos=0, seq_ids=0)
    >>> batch.extend([7, 8, 9], pos=1, seq_ids=0, logits="last")
    >>> len(batch)
    4
    """

    __slots__ = ("_n_seq_id", "_outputs", "_pos", "_seq_ids", "_tokens")

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._pos: list[int] = []
        self._n_seq_id: list[int] = []
        self._seq_ids: list[int] = []
        self._outputs: list[bool] = []

    def __len__(self) -> int:
        return len(self._tokens)

    def clear(self) -> None:
        """Empty the batch."""
        for column in (self._tokens, self._pos, self._n_seq_id, self._seq_ids, self._outputs):
            column.clear()

    def add(self, token: int, *, pos: int, seq_ids: int | Sequence[int] = 0, logits: bool = False) -> None:
        """Append one token.

        Parameters
        ----------
        token : int
            In ``[0, n_vocab)``.
        pos : int
            Its position; per sequence positions have to follow one another.
        seq_ids : int or sequence of int
            Several sequences can share a token when the cache is unified and the memory not merely recurrent. They have
            to hold the same tokens before it: that is the caller's promise, only their lengths are compared.
        logits : bool
            Whether its logits are wanted.
        """
        ids = _owners(seq_ids)
        self._tokens.append(token)
        self._pos.append(pos)
        self._n_seq_id.append(len(ids))
        self._seq_ids.extend(ids)
        self._outputs.append(bool(logits))

    def extend(
        self,
        tokens: TokensLike,
        *,
        pos: int,
        seq_ids: int | Sequence[int] = 0,
        logits: str | Iterable[Any] | None = None,
    ) -> None:
        """Append tokens at consecutive positions.

        Parameters
        ----------
        tokens : array-like of int
        pos : int
            Position of the first.
        seq_ids : int or sequence of int
            For all of them.
        logits : {"last", "all"}, mask or None
            Whose logits are wanted; ``None`` for nobody's.
        """
        ids = as_int32(tokens, "tokens")
        mask = output_mask(logits, len(ids)).astype(bool).tolist()
        owners = _owners(seq_ids)
        start = as_index(pos, "pos", InvalidBatchError)
        self._tokens.extend(ids.tolist())
        self._pos.extend(range(start, start + len(ids)))
        self._n_seq_id.extend([len(owners)] * len(ids))
        self._seq_ids.extend(owners * len(ids))
        self._outputs.extend(mask)

    def arrays(self) -> tuple[Int32Array, Int32Array, Int32Array, Int32Array, np.ndarray[Any, np.dtype[np.int8]]]:
        """Columns as the native decode reads them.

        Returns
        -------
        tokens, pos, n_seq_id : int32[n]
        seq_ids : int32[sum(n_seq_id)]
        outputs : int8[n]

        Raises
        ------
        InvalidBatchError
            A value is no 32-bit integer.
        """
        return (
            as_int32(self._tokens, "tokens"),
            as_int32(self._pos, "pos"),
            as_int32(self._n_seq_id, "n_seq_id"),
            as_int32(self._seq_ids, "seq_ids"),
            np.array(self._outputs, dtype=np.int8),
        )


def _owners(seq_ids: int | Sequence[int]) -> list[int]:
    """Sequence ids as a list, whether one was given (of any integer type) or several."""
    try:
        return [operator.index(seq_ids)]  # type: ignore[arg-type]  # fails for a sequence, which is how it is told
    except TypeError:
        pass
    try:
        return list(seq_ids)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidBatchError(
            f"invalid batch: seq_ids is {type(seq_ids).__name__}", code=-1, reason="seq_ids", value=seq_ids
        ) from None


def output_mask(logits: str | Iterable[Any] | None, n: int) -> np.ndarray[Any, np.dtype[np.int8]]:
    """Turn ``"last"``, ``"all"``, ``None`` or a mask into int8[n]."""
    mask = np.zeros(n, np.int8)
    if logits is None:
        return mask
    if isinstance(logits, str):
        if logits == "last":
            mask[-1:] = 1
        elif logits == "all":
            mask[:] = 1
        else:
            raise InvalidBatchError(
                f"invalid batch: logits = {brief(logits)}", code=-1, n_tokens=n, reason="logits", value=logits
            )
        return mask
    try:
        given = np.asarray(logits if isinstance(logits, np.ndarray) else list(logits))
    except (TypeError, ValueError) as error:  # nothing to iterate over, or rows of several lengths
        raise InvalidBatchError(
            f"invalid batch: the logits mask is no array: {error}",
            code=-1,
            n_tokens=n,
            reason="logits mask",
            value=logits,
        ) from None
    if given.shape != (n,):
        raise InvalidBatchError(
            f"invalid batch: the logits mask has shape {given.shape}, not ({n},)",
            code=-1,
            n_tokens=n,
            reason="logits mask",
            value=given.shape,
            limit=n,
        )
    mask[given.astype(bool)] = 1
    return mask
