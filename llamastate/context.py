"""A context: the memory of a model, and what can be done with it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llamastate import layout, lifetimes
from llamastate._native import consts, decode, handles, memory, state
from llamastate.arrays import Int32Array, TokensLike, as_index, as_int32
from llamastate.attach import borrow
from llamastate.batching import Batch, output_mask
from llamastate.errors import (
    ContextCreateError,
    DecodeError,
    InvalidBatchError,
    InvalidPositionError,
    InvalidSequenceError,
    LlamaStateError,
    NoKVSlotError,
)
from llamastate.exactness import can_trim
from llamastate.model import Model
from llamastate.state import StateAPI

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Context"]

_U32 = 2**32 - 1
_I32 = 2**31 - 1


class Context(StateAPI):
    """The memory of a model (``llama_context``): what has been decoded, by sequence.

    Parameters
    ----------
    model : Model
        Kept in memory as long as the context.
    n_ctx : int
        Cells of the cache, 0 for as many as the model was trained with. Rounded up to a multiple of 256.
    n_seq_max : int
        Sequences, at most 256. When the cache is not unified they share ``n_ctx`` evenly.
    n_batch, n_ubatch : int
        Most tokens in one decode; most that are computed at once.
    n_threads, n_threads_batch : int, optional
        For one token and for many; all cores if ``None``.
    kv_unified : bool
        One pool of cells for all sequences: copying a sequence copies nothing.
    flash_attn : {"auto", "on", "off"}
        Decides how V lies in memory, and so in a state: states do not move between "on" and "off".
    type_k, type_v : str
        Types of the cache: "f16", "f32", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl".
    swa_full : bool
        Keep all cells of sliding-window layers, not only the window's.
    offload_kqv, op_offload : bool
        Let the GPU hold the cache; let it help with tensors in host memory.
    embeddings : bool
        Put out embeddings with the logits.
    pooling_type : {"unspecified", "none", "mean", "cls", "last", "rank"}
        How the embeddings of a sequence become one.
    rope_scaling_type, rope_freq_base, rope_freq_scale, yarn_ext_factor, yarn_attn_factor, yarn_beta_fast, \
yarn_beta_slow, yarn_orig_ctx
        As in ``llama_context_params``; what is not given is the model's.
    on_busy : {"wait", "raise"}
        What a second thread gets: its turn, or :class:`ContextBusyError`.

    Raises
    ------
    ContextCreateError
        llama.cpp refuses the parameters (``reason``), or there is no memory for it.

    Notes
    -----
    Use it as a context manager, or call :meth:`close`. Every method may be called from any thread; the GIL is free
    while llama.cpp computes and while bytes move.

    Examples
    --------
    >>> ctx = Context(model, n_ctx=512, n_seq_max=2)  # doctest: +SKIP
    >>> ctx.decode(model.tokenize("Once upon a time"))  # doctest: +SKIP
    1
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int = 0,
        n_seq_max: int = 1,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        kv_unified: bool = True,
        flash_attn: str = "auto",
        type_k: str = "f16",
        type_v: str = "f16",
        swa_full: bool = False,
        offload_kqv: bool = True,
        op_offload: bool = True,
        embeddings: bool = False,
        pooling_type: str = "unspecified",
        on_busy: str = "wait",
        **rope: Any,
    ) -> None:
        threads = n_threads if n_threads is not None else _all_cores()
        params: dict[str, Any] = {
            "n_ctx": _bounded("n_ctx", n_ctx, 0, _I32 - 256),
            "n_seq_max": _bounded("n_seq_max", n_seq_max, 1, consts.MAX_PARALLEL_SEQUENCES),
            "n_batch": _bounded("n_batch", n_batch, 1, _I32),
            "n_ubatch": _bounded("n_ubatch", n_ubatch, 1, _I32),
            "n_threads": _bounded("n_threads", threads, 1, 512),
            "n_threads_batch": _bounded("n_threads_batch", n_threads_batch or threads, 1, 512),
            "kv_unified": bool(kv_unified),
            "flash_attn_type": _choice("flash_attn", flash_attn, consts.FLASH_ATTN),
            "type_k": _choice("type_k", type_k, consts.CACHE_TYPES),
            "type_v": _choice("type_v", type_v, consts.CACHE_TYPES),
            "swa_full": bool(swa_full),
            "offload_kqv": bool(offload_kqv),
            "op_offload": bool(op_offload),
            "embeddings": bool(embeddings),
            "pooling_type": _choice("pooling_type", pooling_type, consts.POOLING),
            **_rope_params(rope),
        }
        raise_if_busy = _choice("on_busy", on_busy, {"wait": False, "raise": True})
        if not isinstance(model, Model):
            raise ContextCreateError(f"model is {type(model).__name__}, not a Model", params=params, reason="no model")
        if model._handle.vocab_only:
            raise ContextCreateError(
                "the model was loaded with vocab_only: it has no weights", params=params, reason="vocab_only"
            )
        if model._facts["has_encoder"] and model._facts["has_decoder"]:
            raise ContextCreateError(
                "models with an encoder and a decoder are not supported", params=params, reason="encoder-decoder"
            )
        self.model = model
        self._params = params
        self._owner: object | None = None
        self._handle = handles.create_context(model._handle, params, raise_if_busy=raise_if_busy)
        lifetimes.contexts.add(self)

    @classmethod
    def attach(cls, llm: Any, *, on_busy: str = "wait") -> Self:
        """Work on the context of a live ``llama_cpp.Llama``: the same one, borrowed, nothing copied.

        Parameters
        ----------
        llm : llama_cpp.Llama
            Kept alive as long as this object. Its own calls take turns with ours from now on.
        on_busy : {"wait", "raise"}
            As for a context of one's own. All attachments to one ``Llama`` share one lock, the first's.

        Raises
        ------
        ClosedError
            It is closed already.
        NativeVersionError
            It runs on another copy of llama.cpp than this package.

        Notes
        -----
        After a restore the ``Llama`` does not know what its context holds: set its ``n_tokens`` and ``input_ids``
        yourself. Closing the attachment leaves the ``Llama`` as it is.
        """
        raise_if_busy = _choice("on_busy", on_busy, {"wait": False, "raise": True})
        self = cls.__new__(cls)
        self._handle, self._params = borrow(llm, raise_if_busy=raise_if_busy)
        self._owner = llm
        self.model = Model._from_handle(handles.handle_model(self._handle), getattr(llm, "model_path", None))
        lifetimes.contexts.add(self)
        return self

    # --- life ---------------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether the context can no longer be used."""
        return self._handle.closed

    def close(self) -> None:
        """Free the context, after the operation that is running in another thread. Idempotent."""
        self._handle.close()
        self._owner = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        what = "closed" if self.closed else f"n_ctx={self.n_ctx}, n_seq_max={self.n_seq_max}"
        return f"<llamastate.Context {what}, {self.model.memory_kind}>"

    # --- facts --------------------------------------------------------------------------------------------------------

    @property
    def n_ctx(self) -> int:
        """Cells of the cache (``llama_n_ctx``)."""
        return self._handle.n_ctx

    @property
    def n_ctx_seq(self) -> int:
        """Cells that one sequence can use (``llama_n_ctx_seq``)."""
        return self._handle.n_ctx_seq

    @property
    def n_batch(self) -> int:
        """Most tokens in one decode (``llama_n_batch``)."""
        return self._handle.n_batch

    @property
    def n_ubatch(self) -> int:
        """Most tokens that are computed at once (``llama_n_ubatch``)."""
        return self._handle.n_ubatch

    @property
    def n_seq_max(self) -> int:
        """Number of sequences (``llama_n_seq_max``)."""
        return self._handle.n_seq_max

    @property
    def n_threads(self) -> int:
        """Threads that compute one token (``llama_n_threads``)."""
        return self._handle.n_threads

    def set_n_threads(self, n_threads: int, n_threads_batch: int | None = None) -> None:
        """Change the number of threads, for one token and for many (``llama_set_n_threads``)."""
        one = _bounded("n_threads", n_threads, 1, 512)
        many = one if n_threads_batch is None else _bounded("n_threads_batch", n_threads_batch, 1, 512)
        self._handle.set_n_threads(one, many)

    # --- decoding -----------------------------------------------------------------------------------------------------

    def decode(
        self,
        tokens: TokensLike,
        *,
        seq_id: int = 0,
        pos: int | None = None,
        logits: str | Iterable[Any] | None = "last",
    ) -> int:
        """Feed tokens to one sequence (``llama_decode``).

        Parameters
        ----------
        tokens : array-like of int
            At most ``n_batch``; longer texts go through :meth:`prefill`.
        seq_id : int
            In ``[0, n_seq_max)``.
        pos : int, optional
            Position of the first token. It has to follow what the sequence holds, which is what ``None`` means.
        logits : {"last", "all"}, mask or None
            Whose logits are wanted.

        Returns
        -------
        int
            How many outputs there are.

        Raises
        ------
        InvalidBatchError
            ``index`` is the first token at fault; nothing has changed.
        NoKVSlotError
            The cache has no room; nothing has changed.
        DecodeError
            The computation failed. What it had done is undone; where that is impossible (``removed``) the sequence is
            empty now.
        """
        ids = as_int32(tokens if np.ndim(tokens) else [tokens], "tokens")
        n = len(ids)
        with self._handle as handle:
            seq = as_index(seq_id, "seq_id", InvalidSequenceError)
            start = memory.seq_pos_max(handle, seq) + 1 if pos is None else as_index(pos, "pos", InvalidPositionError)
            if not 0 <= start <= _I32 - n:
                raise InvalidBatchError(
                    f"invalid batch: position {start}", code=-1, n_tokens=n, reason="position", index=0, value=start
                )
            positions = np.arange(start, start + n, dtype=np.int32)
            return self._decode(
                ids, positions, np.ones(n, np.int32), np.full(n, seq, np.int32), output_mask(logits, n)
            )

    def decode_batch(self, batch: Batch) -> int:
        """Feed a batch of several sequences (``llama_decode``).

        Parameters
        ----------
        batch : Batch

        Returns
        -------
        int
            How many outputs there are.

        Raises
        ------
        InvalidBatchError, NoKVSlotError, DecodeError
            As for :meth:`decode`.
        """
        return self._decode(*batch.arrays())

    def prefill(
        self,
        tokens: TokensLike,
        *,
        seq_id: int = 0,
        chunk: int | None = None,
        logits: str | Iterable[Any] | None = "last",
    ) -> int:
        """Feed any number of tokens to one sequence, in decodes of ``chunk`` (``n_batch``) tokens.

        Parameters
        ----------
        tokens : array-like of int
        seq_id : int
        chunk : int, optional
            Tokens in one decode. How a text is cut decides the last bits of the logits.
        logits : {"last", "all"}, mask or None
            As for :meth:`decode`; only the last chunk's can be read afterwards.

        Returns
        -------
        int
            How many outputs the last decode has.

        Raises
        ------
        DecodeError
            As for :meth:`decode`; the chunks before the failing one are undone as well, or the sequence is empty and
            ``removed`` says so.
        """
        ids = as_int32(tokens, "tokens")
        mask = output_mask(logits, len(ids))
        size = self.n_batch if chunk is None else _bounded("chunk", chunk, 1, self.n_batch)
        with self._handle as handle:
            start = memory.seq_pos_max(handle, seq_id) + 1
            if start + len(ids) > self.n_ctx_seq and self.model.memory_kind != "recurrent":
                raise NoKVSlotError(
                    f"{len(ids)} tokens after {start} do not fit {self.n_ctx_seq} cells", code=1, n_tokens=len(ids)
                )
            n_outputs = 0
            for at in range(0, max(len(ids), 1), size):
                part = slice(at, at + size)
                try:
                    n_outputs = self.decode(ids[part], seq_id=seq_id, logits=mask[part])
                except DecodeError as error:
                    error.removed = (error.removed or ()) + self._undo({seq_id: start})
                    raise
            return n_outputs

    def _decode(
        self,
        tokens: Int32Array,
        pos: Int32Array,
        n_seq_id: Int32Array,
        seq_ids: Int32Array,
        outputs: npt.NDArray[np.int8],
    ) -> int:
        try:
            return decode.decode(self._handle, tokens, pos, n_seq_id, seq_ids, outputs)
        except DecodeError as error:
            # 1 and -1 change nothing. After an abort (2) and after fatal errors some physical batches have been
            # computed and others not, and a recurrent state may be half-way: go back to where every sequence was.
            if error.code == 2 or (error.code is not None and error.code < -1):
                first = np.repeat(pos, n_seq_id)
                starts = {int(s): int(first[seq_ids == s].min()) for s in np.unique(seq_ids)}
                error.removed = self._undo(starts)
            raise

    def _undo(self, starts: dict[int, int]) -> tuple[int, ...]:
        """Trim sequences back to a length; those that cannot be trimmed exactly are emptied and returned."""
        removed = []
        for seq, start in starts.items():
            if not self.seq_rm(seq, start, -1):
                memory.seq_rm(self._handle, seq, -1, -1)
                removed.append(seq)
        return tuple(removed)

    # --- outputs ------------------------------------------------------------------------------------------------------

    def logits(self, i: int = -1, *, copy: bool = True) -> npt.NDArray[np.float32]:
        """Logits of one token of the last decode (``llama_get_logits_ith``).

        Parameters
        ----------
        i : int
            Its index in the batch; negative numbers count the outputs from the last.
        copy : bool
            Without it a read-only view of llama.cpp's memory: the next decode changes what it shows, and a decode that
            would move the memory (more outputs than ever before) raises :class:`ContextBusyError` while the view lives.
            Attached contexts always copy.

        Returns
        -------
        float32[n_vocab]

        Raises
        ------
        LogitsUnavailableError
            That token put out none, or its sequence's state has been changed since (restored, trimmed): logits are no
            part of a state.
        """
        index = as_index(i, "i", LlamaStateError)
        if not copy and not self._handle.borrowed:
            return np.frombuffer(decode.LogitsView(self._handle, index), np.float32)
        out = np.empty(self._handle.n_vocab, np.float32)
        decode.logits_into(self._handle, index, out)
        return out

    def embeddings(self, i: int = -1) -> npt.NDArray[np.float32]:
        """Embedding of one token of the last decode (``llama_get_embeddings_ith``), float32[n_embd_out].

        Raises
        ------
        LogitsUnavailableError
            That token put out none, or the context was not made with ``embeddings=True``, or it pools them.
        """
        out = np.empty(self._handle.n_embd_out, np.float32)
        decode.embeddings_into(self._handle, as_index(i, "i", LlamaStateError), out)
        return out

    def embeddings_seq(self, seq_id: int = 0) -> npt.NDArray[np.float32]:
        """Pooled embedding of a sequence in the last decode (``llama_get_embeddings_seq``).

        Returns
        -------
        float32[n_embd_out], or float32[n_cls_out] when the pooling type is "rank"
        """
        rank = self._handle.pooling_type == consts.POOLING["rank"]
        out = np.empty(self.model._facts["n_cls_out"] if rank else self._handle.n_embd_out, np.float32)
        decode.embeddings_seq_into(self._handle, seq_id, out)
        return out

    # --- sequences ----------------------------------------------------------------------------------------------------

    def seq_pos_min(self, seq_id: int) -> int:
        """Smallest position in a sequence's memory, -1 if empty (``llama_memory_seq_pos_min``).

        With a sliding window it is the window's, so it grows as the window moves on.
        """
        return memory.seq_pos_min(self._handle, seq_id)

    def seq_pos_max(self, seq_id: int) -> int:
        """Largest position in a sequence's memory, -1 if empty (``llama_memory_seq_pos_max``)."""
        return memory.seq_pos_max(self._handle, seq_id)

    def seq_rm(self, seq_id: int, p0: int = -1, p1: int = -1) -> bool:
        """Remove positions ``[p0, p1)`` from a sequence (``llama_memory_seq_rm``).

        Parameters
        ----------
        seq_id : int
        p0, p1 : int
            Negative means from the beginning, to the end.

        Returns
        -------
        bool
            False if what remains would not be exact; nothing has changed then. llama.cpp says true when a sliding
            window no longer reaches back far enough; this does not.

        Notes
        -----
        Removing everything always works. Recurrent and hybrid models can remove nothing less. O(cells), no bytes
        copied.
        """
        with self._handle as handle:
            low, high = self._span(seq_id)
            to_end = p1 < 0 or p1 > high
            if p0 <= 0 and to_end:
                handle.forget_outputs(seq_id)
                return memory.seq_rm(handle, seq_id, -1, -1)
            if p0 > high or 0 <= p1 <= max(p0, 0):
                return True  # nothing there to remove
            if to_end:
                exact = can_trim(self.model.memory_kind, self.model.n_swa, low, high, p0)
            else:
                exact = self.model.memory_kind in ("attention", "iswa")
            if not exact:
                return False
            handle.forget_outputs(seq_id)
            return memory.seq_rm(handle, seq_id, p0, p1)

    def seq_cp(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        """Make ``dst`` a copy of ``src``, or of its positions ``[p0, p1)`` (``llama_memory_seq_cp``).

        Parameters
        ----------
        src, dst : int
        p0, p1 : int
            Negative means from the beginning, to the end. A whole copy replaces ``dst``; a part replaces what ``dst``
            has at those positions.

        Raises
        ------
        InvalidPositionError
            A part that cannot be copied exactly: of a recurrent state, of a window that no longer reaches that far, or
            (when the cache is not unified) one that does not begin at 0.

        Notes
        -----
        In a unified cache both share the cells: nothing is copied. Otherwise every byte is copied at once; llama.cpp
        would put that off to the next decode, and states taken meanwhile would be wrong.
        """
        with self._handle as handle:
            low, high = self._span(src)
            self._span(dst)
            if src == dst:
                return
            whole = p0 <= 0 and (p1 < 0 or p1 > high)
            kind = self.model.memory_kind
            if not whole and not self._can_copy_part(low, high, p0, p1):
                raise InvalidPositionError(
                    f"positions [{p0}, {p1}) of sequence {src} cannot be copied exactly", reason=kind, value=(p0, p1), limit=high
                )
            handle.forget_outputs(dst)
            if self._params.get("kv_unified") or kind == "recurrent":
                memory.seq_rm(handle, dst, *((-1, -1) if whole else (p0, p1)))
                memory.seq_cp(handle, src, dst, p0, p1)
                return
            self._refuse_pending("seq_cp")
            memory.seq_rm(handle, dst, -1, -1)
            if high < 0:
                return
            blob = np.empty(state.seq_get_size(handle, src, 0), np.uint8)
            state.seq_get_data_into(handle, blob, src, 0)
            if not whole:
                blob = np.frombuffer(layout.parse_sequence(blob.data, self.schema).slice(0, p1).to_bytes(), np.uint8)
            state.seq_set_data(handle, blob, dst, 0)

    def _can_copy_part(self, low: int, high: int, p0: int, p1: int) -> bool:
        kind = self.model.memory_kind
        if kind == "attention":
            return bool(self._params.get("kv_unified")) or p0 <= 0
        if kind == "iswa":
            return bool(self._params.get("kv_unified")) and p0 <= 0 and can_trim(kind, self.model.n_swa, low, high, p1)
        return False

    def seq_keep(self, seq_id: int) -> None:
        """Empty every other sequence (``llama_memory_seq_keep``)."""
        with self._handle as handle:
            self._span(seq_id)
            handle.forget_outputs(keep=seq_id)
            for seq in range(handle.n_seq_max):
                if seq != seq_id:
                    # one by one: llama.cpp's own function keeps whatever lies in another stream
                    memory.seq_rm(handle, seq, -1, -1)

    def seq_add(self, seq_id: int, p0: int, p1: int, delta: int) -> None:
        """Move positions ``[p0, p1)`` by ``delta`` (``llama_memory_seq_add``).

        Parameters
        ----------
        seq_id : int
        p0, p1 : int
            Negative means from the beginning, to the end.
        delta : int
            No position may become negative.

        Raises
        ------
        InvalidPositionError
            A position would become negative or leave 32 bits, or this model's positions cannot be moved.

        Notes
        -----
        The keys are rotated at the next decode; until then the sequence's state cannot be taken
        (:class:`PendingUpdateError`). What comes of it is an approximation by nature: no decode from scratch would
        give the same. Cells that the sequence shares with others are copied first.
        """
        with self._handle as handle:
            low, high = self._movable(seq_id, p0, p1)
            if high >= low and not (0 <= low + delta and high + delta <= _I32):
                raise InvalidPositionError(
                    f"moving [{low}, {high}] by {delta} leaves [0, {_I32}]", reason="out of range", value=delta, limit=-low
                )
            if high >= low and delta:
                self._unshare(seq_id)
                handle.forget_outputs(seq_id)
                memory.seq_add(handle, seq_id, p0, p1, delta)

    def seq_div(self, seq_id: int, p0: int, p1: int, d: int) -> None:
        """Divide positions ``[p0, p1)`` by ``d`` (``llama_memory_seq_div``); as :meth:`seq_add` in all else.

        Parameters
        ----------
        seq_id : int
        p0, p1 : int
        d : int
            At least 1.
        """
        if not 1 <= as_index(d, "d", InvalidPositionError) <= _I32:
            raise InvalidPositionError(f"positions cannot be divided by {d}", reason="divisor", value=d, limit=1)
        with self._handle as handle:
            low, high = self._movable(seq_id, p0, p1)
            if high >= low and d > 1:
                self._unshare(seq_id)
                handle.forget_outputs(seq_id)
                memory.seq_div(handle, seq_id, p0, p1, d)

    def _movable(self, seq_id: int, p0: int, p1: int) -> tuple[int, int]:
        """Return the smallest and largest position of a range that is there, or refuse a model that cannot shift."""
        low, high = self._span(seq_id)
        if self._handle.m_rope or not memory.can_shift(self._handle):
            raise InvalidPositionError("this model's positions cannot be moved", reason="no shift", value=(p0, p1))
        return max(0 if self.model.memory_kind == "iswa" else low, p0), high if p1 < 0 else min(high, p1 - 1)

    def _unshare(self, seq_id: int) -> None:
        """Give a sequence cells of its own. Moving the position of a shared cell would move the others' too."""
        if not self._handle.shared_cells or not self._params.get("kv_unified") or self.n_seq_max == 1:
            return
        self._refuse_pending("seq_add")
        self.state_seq_set_data(self.state_seq_get_data(seq_id), seq_id)

    def clear(self, *, data: bool = True) -> None:
        """Empty every sequence (``llama_memory_clear``); with ``data``, the tensors are zeroed too."""
        with self._handle as handle:
            handle.forget_outputs()
            memory.clear(handle, data)


def _all_cores() -> int:
    # as many as this process may use, which in a container is fewer than the machine has
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _bounded(name: str, value: Any, low: int, high: int) -> int:
    number = as_index(value, name, ContextCreateError)
    if not low <= number <= high:
        raise ContextCreateError(f"{name} = {number} is not in [{low}, {high}]", params={name: value}, reason=name)
    return number


def _choice(name: str, value: Any, choices: dict[str, Any]) -> Any:
    try:
        return choices[value]
    except (KeyError, TypeError):
        raise ContextCreateError(
            f"{name} = {value!r} is not one of {', '.join(map(repr, choices))}", params={name: value}, reason=name
        ) from None


def _rope_params(given: dict[str, Any]) -> dict[str, Any]:
    """Check the positional-encoding parameters that were given; all others stay llama.cpp's."""
    params: dict[str, Any] = {}
    for name, value in given.items():
        if name == "rope_scaling_type":
            params[name] = _choice(name, value, consts.ROPE_SCALING)
        elif name == "yarn_orig_ctx":
            params[name] = _bounded(name, value, 0, _U32)
        elif name in _ROPE_FLOATS:
            try:
                params[name] = float(value)
            except (TypeError, ValueError):
                raise ContextCreateError(f"{name} = {value!r} is no number", params={name: value}, reason=name) from None
            if not np.isfinite(params[name]):
                raise ContextCreateError(f"{name} = {value!r} is not finite", params={name: value}, reason=name)
        else:
            raise TypeError(f"Context() got an unexpected keyword argument {name!r}")
    return params


_ROPE_FLOATS = frozenset(
    {
        "rope_freq_base",
        "rope_freq_scale",
        "yarn_ext_factor",
        "yarn_attn_factor",
        "yarn_beta_fast",
        "yarn_beta_slow",
    }
)
