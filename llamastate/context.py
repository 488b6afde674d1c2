"""A context: the memory of a model, and what can be done with it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llamastate import lifetimes
from llamastate._native import consts, decode, handles, memory, state
from llamastate.adapters import AdapterAPI
from llamastate.arrays import Int32Array, TokensLike, as_index, as_int32
from llamastate.attach import borrow, let_go, own_adapters
from llamastate.batching import Batch, output_mask
from llamastate.errors import (
    ContextCreateError,
    DecodeError,
    InvalidBatchError,
    InvalidPositionError,
    LogitsUnavailableError,
    NoKVSlotError,
)
from llamastate.model import Model
from llamastate.params import I32, MAX_BATCH, MAX_UBATCH, all_cores, bounded, choice, rope_params
from llamastate.probe import check_memory

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Context"]


class Context(AdapterAPI, lifetimes.Closing):
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
        Most tokens in one decode, at least ``n_seq_max`` and at most 2**24; most that are computed at once, at most
        2**18.
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

    _instead = "make another of the same model; Snapshot.take() of a sequence can be pickled, and restored there"

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
        threads = n_threads if n_threads is not None else all_cores()
        params: dict[str, Any] = {
            "n_ctx": bounded("n_ctx", n_ctx, 0, I32 - 256),
            "n_seq_max": bounded("n_seq_max", n_seq_max, 1, consts.MAX_PARALLEL_SEQUENCES),
            "n_batch": bounded("n_batch", n_batch, 1, MAX_BATCH),
            "n_ubatch": bounded("n_ubatch", n_ubatch, 1, MAX_UBATCH),
            "n_threads": bounded("n_threads", threads, 1, 512),
            "n_threads_batch": bounded("n_threads_batch", n_threads_batch or threads, 1, 512),
            "kv_unified": bool(kv_unified),
            "flash_attn_type": choice("flash_attn", flash_attn, consts.FLASH_ATTN),
            "type_k": choice("type_k", type_k, consts.CACHE_TYPES),
            "type_v": choice("type_v", type_v, consts.CACHE_TYPES),
            "swa_full": bool(swa_full),
            "offload_kqv": bool(offload_kqv),
            "op_offload": bool(op_offload),
            "embeddings": bool(embeddings),
            "pooling_type": choice("pooling_type", pooling_type, consts.POOLING),
            **rope_params(rope),
        }
        raise_if_busy = choice("on_busy", on_busy, {"wait": False, "raise": True})
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
        n_cells = params["n_ctx"] or model.n_ctx_train
        if n_cells < params["n_seq_max"]:
            params["n_ctx"] = params["n_seq_max"]  # llama.cpp makes 256 of it anyway, but too late for its own checks
        if params["n_batch"] < params["n_seq_max"]:
            # llama.cpp reserves an output for each sequence, and aborts when a batch could not hold them
            raise ContextCreateError(
                f"n_batch = {n_batch} is less than n_seq_max = {n_seq_max}", params=params, reason="n_batch"
            )
        check_memory(model, params)
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

        What takes turns is single calls of the ``Llama``'s methods. Where it reads its logits itself (``sample``, and
        so ``generate`` between two evals) it takes no turn: wrap in :meth:`lock` what other threads must not come
        between. Its model is read (``tokenize``, samplers) without a turn; close the ``Llama`` when no thread does so.
        """
        raise_if_busy = choice("on_busy", on_busy, {"wait": False, "raise": True})
        self = cls.__new__(cls)
        self._handle, self._params = borrow(llm, raise_if_busy=raise_if_busy)
        self._owner = llm
        self.model = Model._from_handle(handles.handle_model(self._handle), getattr(llm, "model_path", None))
        self._record_adapters(own_adapters(llm))
        lifetimes.contexts.add(self)
        return self

    #: The thread that is inside :meth:`lock`.
    _locked_by: int | None = None
    #: Whether this is a child's, and has not computed yet.
    forked: bool = False

    # --- life ---------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self) -> Iterator[Self]:
        """Make several calls one turn: other threads get theirs after the ``with`` block.

        Every method takes the lock by itself; what has to be true from one call to the next (logits that are still
        those of the decode before, a sequence that nobody trims meanwhile) takes this. The thread may go on calling
        methods of the context inside, and nest blocks. Of an attached context it also keeps the ``Llama``'s calls of
        other threads out, and its own together: ``Llama.eval`` and the sampling after it are two turns otherwise.

        Raises
        ------
        ContextBusyError
            With ``on_busy="raise"``: another thread is using the context.
        ClosedError
            The context is closed.
        """
        with self._handle:
            before, self._locked_by = self._locked_by, threading.get_ident()
            try:
                yield self
            finally:
                self._locked_by = before

    @property
    def closed(self) -> bool:
        """Whether the context can no longer be used."""
        return self._handle.closed

    def close(self) -> None:
        """Free the context, after the operation that is running in another thread. Idempotent."""
        if self._owner is None:
            self._handle.close()
        else:
            self._handle = let_go(self._handle)
            self._owner = None

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
    def n_threads(self) -> int:
        """Threads that compute one token (``llama_n_threads``)."""
        return self._handle.n_threads

    def set_n_threads(self, n_threads: int, n_threads_batch: int | None = None) -> None:
        """Change the number of threads, for one token and for many (``llama_set_n_threads``)."""
        one = bounded("n_threads", n_threads, 1, 512)
        many = one if n_threads_batch is None else bounded("n_threads_batch", n_threads_batch, 1, 512)
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
        text = isinstance(tokens, (str, bytes))
        single = not text and (np.isscalar(tokens) or getattr(tokens, "ndim", 1) == 0)
        ids = as_int32([tokens] if single else tokens, "tokens")
        n = len(ids)
        with self._handle as handle:
            state.check(handle, seq_id, 0)
            seq = int(seq_id)
            start = memory.seq_pos_max(handle, seq) + 1 if pos is None else as_index(pos, "pos", InvalidPositionError)
            if not 0 <= start <= I32 - n:
                raise InvalidBatchError(
                    f"invalid batch: position {start}", code=-1, n_tokens=n, reason="position", index=0, value=start
                )
            positions = np.arange(start, start + n, dtype=np.int32)
            return self._decode(ids, positions, np.ones(n, np.int32), np.full(n, seq, np.int32), output_mask(logits, n))

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
        given: object = batch
        if not isinstance(given, Batch):
            kind = type(given).__name__
            raise InvalidBatchError(f"invalid batch: {kind} is no Batch", code=-1, reason="no Batch", value=kind)
        return self._decode(*given.arrays())

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
        size = self.n_batch if chunk is None else as_index(chunk, "chunk", InvalidBatchError)
        if not 1 <= size <= self.n_batch:
            raise InvalidBatchError(
                f"chunk = {size} is not in [1, {self.n_batch}]",
                code=-1,
                n_tokens=len(ids),
                reason="chunk",
                value=size,
                limit=self.n_batch,
            )
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
        # one turn: nobody may build on a sequence that is about to be taken back
        with self._handle as handle:
            if self.forked:
                # the threads it computed with are the parent's: OpenMP would wait for them for ever
                handle.set_n_threads(1, 1)
                self.forked = False
            try:
                try:
                    return decode.decode(handle, tokens, pos, n_seq_id, seq_ids, outputs)
                except NoKVSlotError:
                    if not self._free_window(seq_ids):
                        raise
                    return decode.decode(handle, tokens, pos, n_seq_id, seq_ids, outputs)
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
        index = self._output_index(i)
        if not copy and not self._handle.borrowed:
            view: Any = decode.LogitsView(self._handle, index)  # NumPy's types know no buffers but the builtin ones
            row: npt.NDArray[np.float32] = np.frombuffer(view, np.float32)
            return row
        out = np.empty(self._handle.n_vocab, np.float32)
        decode.logits_into(self._handle, index, out)
        return out

    def _output_index(self, i: int) -> int:
        index = as_index(i, "i", LogitsUnavailableError)
        if not -I32 <= index <= I32:
            raise LogitsUnavailableError(f"no output for index {index}", index=index, n_outputs=self._handle.n_outputs)
        return index

    def embeddings(self, i: int = -1) -> npt.NDArray[np.float32]:
        """Embedding of one token of the last decode (``llama_get_embeddings_ith``), float32[n_embd_out].

        Raises
        ------
        LogitsUnavailableError
            That token put out none, or the context was not made with ``embeddings=True``, or it pools them.
        """
        out = np.empty(self._handle.n_embd_out, np.float32)
        decode.embeddings_into(self._handle, self._output_index(i), out)
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
