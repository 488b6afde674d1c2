"""A model: weights, metadata, vocabulary."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from llamastate import _native, chat, gguf, lifetimes
from llamastate._native import handles, vocab
from llamastate._native._amx import is_miscompiled
from llamastate.arrays import Int32Array, TokensLike, as_index, as_tokens
from llamastate.errors import FingerprintUnavailableError, ModelLoadError, TemplateError, TokenizeError

if TYPE_CHECKING:
    from typing_extensions import Self

    from llamastate.layout import Schema

__all__ = ["Model"]

_GGUF_MAGIC = b"GGUF"


class Model(lifetimes.Closing):
    """Weights and vocabulary of one GGUF file (``llama_model_load_from_file``).

    Parameters
    ----------
    path : path-like
        The GGUF; of a split model, its first part.
    n_gpu_layers : int
        Layers to put on the GPU, negative for all.
    use_mmap, use_mlock : bool
        Map the file instead of reading it; keep it from being swapped out.
    vocab_only : bool
        Only metadata and vocabulary. No context can be made from it.
    check_tensors : bool
        Let llama.cpp look for invalid numbers in the tensors while it loads.
    main_gpu : int
        The GPU for what is not split.
    use_extra_bufts : bool, optional
        Let llama.cpp lay weights out anew for this processor. By default it may, unless the library was compiled by
        a GCC whose AMX code crashes on this processor.

    Raises
    ------
    ModelLoadError
        No such file, not a GGUF, or llama.cpp refused it. ``reason`` says why.

    Notes
    -----
    Use it as a context manager, or call :meth:`close`. A :class:`~llamastate.Context` keeps the weights in memory until
    it is closed itself, so the order does not matter. Reading is thread safe.

    Examples
    --------
    >>> with Model(tiny_chat_model) as model:  # doctest: +SKIP
    ...     model.memory_kind
    'attention'
    """

    _identity: gguf.Identity | None = None
    _no_file = "the model comes from no file"

    _instead = "share it, for it can be used by any thread; elsewhere load its path again"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_gpu_layers: int = 0,
        use_mmap: bool = True,
        use_mlock: bool = False,
        vocab_only: bool = False,
        check_tensors: bool = False,
        main_gpu: int = 0,
        use_extra_bufts: bool | None = None,
    ) -> None:
        try:
            self.path: str | None = os.fsdecode(path)
        except TypeError as error:
            raise ModelLoadError(f"cannot load a model: {error}", reason="not a path") from None
        raw = _check_file(self.path)
        self._stamps = _stamps(self.path)
        try:
            with self._identified_meanwhile(unless=vocab_only):
                self._handle = handles.load_model(
                    raw,
                    n_gpu_layers=n_gpu_layers,
                    use_mmap=use_mmap,
                    use_mlock=use_mlock,
                    vocab_only=vocab_only,
                    check_tensors=check_tensors,
                    main_gpu=main_gpu,
                    use_extra_bufts=not is_miscompiled(_native.library.parent)
                    if use_extra_bufts is None
                    else use_extra_bufts,
                )
        except (OverflowError, TypeError) as error:
            raise ModelLoadError(f"bad model parameter: {error}", path=self.path, reason=str(error)) from None
        if self._stamps is not None and _stamps(self.path) != self._stamps:
            # which of both files llama.cpp has read, nobody can tell
            self._stamps, self._no_file = None, "it was replaced while it was being loaded"
        self._n_gpu_layers = int(n_gpu_layers)
        self._prepare()

    @classmethod
    def _from_handle(cls, handle: handles.ModelHandle, path: str | None) -> Self:
        self = cls.__new__(cls)
        self.path = path
        self._stamps = _stamps(path)
        self._handle = handle
        self._n_gpu_layers = 1  # nobody knows; it may have some
        self._prepare()
        return self

    @contextlib.contextmanager
    def _identified_meanwhile(self, *, unless: bool) -> Iterator[None]:
        """Find out which weights these are while llama.cpp reads them, in a thread: the first state need not wait then.

        And what becomes of the file afterwards does not matter.
        """
        path, stamps = self.path, self._stamps

        def work() -> None:
            with contextlib.suppress(OSError, ValueError):  # told when somebody asks
                assert path is not None
                self._identity = gguf.identify(path, stamps)

        thread = threading.Thread(target=work, name="llamastate-identity", daemon=True)
        started = False
        if stamps is not None and not unless:
            with contextlib.suppress(RuntimeError):  # no more threads: found out later
                thread.start()
                started = True
        try:
            yield
        finally:
            if started:
                thread.join()

    def _prepare(self) -> None:
        self._facts = vocab.facts(self._handle)
        self._special = vocab.special_tokens(self._handle)
        # found out at once: contexts ask for these also after the model has been closed
        self._arch = vocab.meta(self._handle).get("general.architecture", "")
        self._memory_kind = self._find_memory_kind()
        # Schemas of the state of contexts of this model, by the parameters that decide them (llamastate.probe).
        self._schemas: dict[tuple[Any, ...], Schema] = {}
        self._turns_exactly: dict[tuple[Any, ...], bool] = {}
        lifetimes.models.add(self)

    # --- life ---------------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` has been called."""
        return self._handle.closed

    def close(self) -> None:
        """Give the weights back, once no context needs them any more. Idempotent."""
        self._handle.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else self.memory_kind
        return f"<llamastate.Model {self.desc!r}, {state}, {self.path!r}>"

    # --- facts --------------------------------------------------------------------------------------------------------

    @property
    def n_vocab(self) -> int:
        """Number of token ids (``llama_vocab_n_tokens``)."""
        return int(self._facts["n_vocab"])

    @property
    def n_ctx_train(self) -> int:
        """Context length in training, in tokens."""
        return int(self._facts["n_ctx_train"])

    @property
    def n_embd(self) -> int:
        """Width of the hidden state."""
        return int(self._facts["n_embd"])

    @property
    def n_embd_out(self) -> int:
        """Width of an embedding that is put out (``llama_model_n_embd_out``)."""
        return int(self._facts["n_embd_out"])

    @property
    def n_layer(self) -> int:
        """Number of layers."""
        return int(self._facts["n_layer"])

    @property
    def n_swa(self) -> int:
        """Width of the sliding window in tokens; 0 without one."""
        return int(self._facts["n_swa"])

    @property
    def n_params(self) -> int:
        """Number of weights."""
        return int(self._facts["n_params"])

    @property
    def size(self) -> int:
        """Bytes of all tensors (``llama_model_size``)."""
        return int(self._facts["size"])

    @property
    def desc(self) -> str:
        """Architecture, size and quantisation in words (``llama_model_desc``)."""
        return str(self._facts["desc"])

    @property
    def is_recurrent(self) -> bool:
        """Whether all memory is recurrent (Mamba, RWKV)."""
        return bool(self._facts["is_recurrent"])

    @property
    def is_hybrid(self) -> bool:
        """Whether recurrent and attention layers are mixed (Jamba, LFM2)."""
        return bool(self._facts["is_hybrid"])

    @property
    def uses_m_rope(self) -> bool:
        """Whether positions have several dimensions (Qwen-VL): cells carry them too then."""
        return bool(self._facts["m_rope"])

    @cached_property
    def meta(self) -> Mapping[str, str]:
        """The GGUF's scalar metadata, as text."""
        return MappingProxyType(vocab.meta(self._handle))

    @property
    def identity(self) -> gguf.Identity:
        """Which weights these are, by content: part of every fingerprint (:mod:`llamastate.gguf`).

        Raises
        ------
        FingerprintUnavailableError
            It could not be found out when the model was loaded, and the file is gone, or not the same any more.
        """
        if self.path is None or self._stamps is None:
            reason = self._no_file
            raise FingerprintUnavailableError(
                f"cannot tell which weights these are: {reason}", path=self.path, reason=reason
            )
        if self._identity is not None:
            return self._identity
        try:
            # remembered by what the file was when it was loaded, so this also serves after it has been deleted
            self._identity = gguf.identify(self.path, self._stamps)
            return self._identity
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise FingerprintUnavailableError(
                f"cannot tell what {self.path!r} holds: {reason}", path=self.path, reason=reason
            ) from None

    @property
    def arch(self) -> str:
        """``general.architecture``."""
        return self._arch

    @property
    def memory_kind(self) -> str:
        """What the model's memory is made of, and so what undoing a token takes.

        One of ``"attention"``, ``"iswa"`` (some layers see a sliding window), ``"recurrent"``, ``"hybrid"``,
        ``"hybrid-iswa"``, or ``"none"`` for encoders.
        """
        return self._memory_kind

    def _find_memory_kind(self) -> str:
        if self.is_recurrent:
            return "recurrent"
        window = self.n_swa > 0
        if self.is_hybrid:
            return "hybrid-iswa" if window else "hybrid"
        if self._facts["has_encoder"] or self._facts["is_diffusion"] or self.arch in _WITHOUT_MEMORY:
            return "none"
        return "iswa" if window else "attention"

    # --- vocabulary ---------------------------------------------------------------------------------------------------

    @property
    def bos(self) -> int:
        """Id of the beginning-of-sequence token, -1 if there is none."""
        return int(self._special["bos"])

    @property
    def eos(self) -> int:
        """Id of the end-of-sequence token, -1 if there is none."""
        return int(self._special["eos"])

    @property
    def has_vocab(self) -> bool:
        """Whether there is a vocabulary at all; without one only token ids can be fed."""
        return bool(self._facts["has_vocab"])

    def is_eog(self, token: int) -> bool:
        """Whether ``token`` ends generation (``llama_vocab_is_eog``)."""
        return bool(vocab.is_eog(self._handle, as_index(token, "token", TokenizeError)))

    def tokenize(self, text: str | bytes, *, add_special: bool = True, parse_special: bool = False) -> Int32Array:
        """Turn text into token ids (``llama_tokenize``).

        Parameters
        ----------
        text : str or bytes
            UTF-8 if bytes.
        add_special : bool
            Add BOS and EOS where the model is configured to.
        parse_special : bool
            Read ``<|im_start|>`` and the like as control tokens. Leave it off for text from strangers.

        Returns
        -------
        int32[n]

        Raises
        ------
        TokenizeError
            The model has no vocabulary, the text is no text, or is too long for one call.
        """
        if isinstance(text, str):
            try:
                data = text.encode("utf-8")
            except UnicodeEncodeError as error:  # lone surrogates
                raise TokenizeError(f"text is not valid Unicode: {error}", reason=str(error)) from None
        elif isinstance(text, (bytes, bytearray, memoryview)):
            data = bytes(text)
        else:
            raise TokenizeError(f"text is {type(text).__name__}, not str", reason="not text")
        tokens: Int32Array = vocab.tokenize(
            self._handle, data, add_special, parse_special, lambda n: np.empty(n, np.int32)
        )
        return tokens

    def detokenize(
        self,
        tokens: TokensLike,
        *,
        remove_special: bool = False,
        unparse_special: bool = False,
        errors: str = "replace",
    ) -> str:
        """Turn token ids into text (``llama_detokenize``).

        Parameters
        ----------
        tokens : array-like of int
            Ids in ``[0, n_vocab)``.
        remove_special : bool
            Drop BOS and EOS where the model is configured to add them.
        unparse_special : bool
            Write control tokens out.
        errors : str
            What becomes of a character cut in two, as in :meth:`bytes.decode`.

        Raises
        ------
        TokenizeError
            An id out of range (``token`` is it), or no vocabulary.
        """
        data: bytes = vocab.detokenize(self._handle, as_tokens(tokens, self.n_vocab), remove_special, unparse_special)
        return data.decode("utf-8", errors)

    def token_to_piece(self, token: int, *, special: bool = False) -> bytes:
        """Bytes of one token (``llama_token_to_piece``). They need not be whole characters."""
        piece: bytes = vocab.token_to_piece(self._handle, as_index(token, "token", TokenizeError), special)
        return piece

    def chat_template(self, name: str | None = None) -> str | None:
        """The GGUF's chat template: the default one, or the one of that name. ``None`` if there is none."""
        text: str | None = vocab.chat_template(self._handle, name)
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """Write a conversation as the model was trained to read it.

        Parameters
        ----------
        messages : sequence of mapping
            Each with ``role`` and ``content``.
        add_generation_prompt : bool
            End where the assistant is to begin.
        template : str, optional
            Jinja2 source to use instead of the GGUF's own.
        **variables
            More names for the template.

        Returns
        -------
        str
            Tokenise it with ``parse_special=True`` and, since templates write BOS themselves, ``add_special=False``.

        Raises
        ------
        TemplateError
            No template, or it refused the messages.
        """
        source = template if template is not None else self.chat_template()
        if source is None:
            raise TemplateError("the model carries no chat template", reason="no template")
        return chat.render(
            source,
            messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=self._text_of(self.bos),
            eos_token=self._text_of(self.eos),
            **variables,
        )

    def _text_of(self, token: int) -> str:
        return "" if token < 0 else self.token_to_piece(token, special=True).decode("utf-8", "replace")


def _stamps(path: str | None) -> gguf.Stamps | None:
    try:
        return None if path is None else gguf.stamps_of(path)
    except (OSError, ValueError):
        return None


#: Architectures that llama.cpp runs without a memory (``llama_model::create_memory``).
_WITHOUT_MEMORY = frozenset(
    [
        *("bert", "jina-bert-v2", "jina-bert-v3", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert"),
        *("modern-bert", "gemma-embedding", "wavtokenizer-dec", "dream", "llada", "llada-moe", "rnd1"),
    ]
)


def _check_file(path: str) -> bytes:
    """Find out before llama.cpp does whether there is a GGUF at all, and say what is wrong in the system's words."""
    try:
        raw = os.fsencode(path)
        if not stat.S_ISREG(os.stat(raw).st_mode):
            # opening a pipe would wait for its writer, and llama.cpp can map nothing but a file
            reason = "Is a directory" if os.path.isdir(raw) else "Not a regular file"
            raise OSError(errno.EINVAL, reason, path)
        with open(raw, "rb") as file:
            magic = file.read(4)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelLoadError(f"cannot load {path!r}: {reason}", path=path, reason=reason) from None
    if magic != _GGUF_MAGIC:
        reason = f"not a GGUF file: it begins with {magic!r}"
        raise ModelLoadError(f"cannot load {path!r}: {reason}", path=path, reason=reason)
    return raw
