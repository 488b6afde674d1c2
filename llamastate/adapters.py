"""LoRA adapters, and what a context's states depend on."""

from __future__ import annotations

import contextlib
import math
import os
import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from llamastate import gguf
from llamastate._native import adapters as native
from llamastate.attach import OwnAdapter, note_adapters
from llamastate.errors import AdapterLoadError, FingerprintUnavailableError, SequencesNotEmptyError
from llamastate.fingerprint import Fingerprint, fingerprint_of
from llamastate.lifetimes import Closing
from llamastate.model import Model
from llamastate.sequences import SequenceAPI
from llamastate.words import brief

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Adapter", "AdapterAPI"]

#: ggml types that llama.cpp can multiply with on every backend: floats and the usual quantised ones.
_TYPES = frozenset((0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23, 30))
_NVFP4 = 40


class Adapter(Closing):
    """A LoRA of one model (``llama_adapter_lora_init``).

    Parameters
    ----------
    model : Model
        Kept in memory as long as the adapter.
    path : path-like
        A GGUF file with ``general.type`` "adapter".

    Raises
    ------
    AdapterLoadError
        No such file, not an adapter, or one of another model. ``reason`` says why.

    Notes
    -----
    Use it as a context manager, or call :meth:`close`; contexts that it is set on keep it. One that was loaded for the
    model of an attached ``Llama`` stays in memory as long as that. The tokens that wake an
    activated LoRA (aLoRA) are not looked for: it acts from the first token on.

    Examples
    --------
    >>> adapter = Adapter(model, "style.gguf")  # doctest: +SKIP
    >>> ctx.set_adapters([(adapter, 0.5)])  # doctest: +SKIP
    """

    _instead = "load its path again, for the model that is there"

    def __init__(self, model: Model, path: str | os.PathLike[str]) -> None:
        if not isinstance(model, Model):
            raise AdapterLoadError(f"model is {type(model).__name__}, not a Model", reason="no model")
        try:
            self.path = os.fsdecode(path)
        except TypeError as error:
            raise AdapterLoadError(f"cannot load an adapter: {error}", reason="not a path") from None
        self.model = model
        try:
            identity = gguf.identify(self.path)
            _check(identity, model)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise AdapterLoadError(f"cannot load {self.path!r}: {reason}", path=self.path, reason=reason) from None
        #: BLAKE2b (hex) over what the file holds.
        self.digest = identity.digest
        self._handle = native.load_adapter(model._handle, os.fsencode(self.path))

    @classmethod
    def _borrow(cls, model: Model, own: OwnAdapter, owner: Any) -> Self:
        """The adapter that is in effect in the context of a ``llama_cpp.Llama`` already."""
        self = cls.__new__(cls)
        self.path = own.path
        self.model = model
        self.digest = own.digest
        if not self.digest:
            with contextlib.suppress(OSError, ValueError):  # told when the fingerprint is asked for
                self.digest = gguf.identify(own.path).digest
        self._handle = native.borrow_adapter(model._handle, own.address, owner)
        return self

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` has been called."""
        return self._handle.closed

    def close(self) -> None:
        """Give the weights back, once no context uses them any more. Idempotent."""
        self._handle.close()

    def __repr__(self) -> str:
        return f"<llamastate.Adapter {self.path!r}{', closed' if self.closed else ''}>"


class AdapterAPI(SequenceAPI):
    """The adapters of a :class:`~llamastate.Context`, and its fingerprint. Not made directly."""

    _owner: Any = None
    _fingerprint: tuple[object, Fingerprint] | None = None

    @property
    def adapters(self) -> tuple[tuple[Adapter, float], ...]:
        """The adapters in effect with their scales."""
        return self._handle.adapters

    def set_adapters(self, adapters: Iterable[tuple[Adapter, float]], *, clear: bool = False) -> None:
        """Use these LoRA adapters, and no others, from now on (``llama_set_adapters_lora``).

        Parameters
        ----------
        adapters : iterable of (Adapter, float)
            Each with its scale; a scale of 0 leaves the adapter out.
        clear : bool
            Empty every sequence first.

        Raises
        ------
        SequencesNotEmptyError
            Sequences hold state that was computed with other adapters; whatever came after it would be neither the
            one model nor the other. ``sequences`` are their ids. Nothing has changed.
        AdapterLoadError
            An adapter of another model, or given twice, or a scale that is no finite number.
        ClosedError
            An adapter, or the context, is closed.

        Notes
        -----
        Setting what is set already does nothing. States that were taken before fit no longer: snapshots say so
        (:class:`FingerprintMismatchError`), bare state blobs cannot. The next decode reserves memory anew.
        """
        chosen = [_checked(entry) for entry in adapters]
        names = [id(adapter) for adapter, _ in chosen]
        if len(set(names)) != len(names):
            raise AdapterLoadError("an adapter is given twice", reason="given twice")
        chosen = [(adapter, scale) for adapter, scale in chosen if scale]
        with self._handle as handle:
            for adapter, _ in chosen:
                if not native.belongs(adapter._handle, handle):
                    raise AdapterLoadError(
                        f"{adapter.path!r} was loaded for another model", path=adapter.path, reason="another model"
                    )
            if _same(chosen, handle.adapters):
                return
            held = tuple(seq for seq in range(handle.n_seq_max) if self._span(seq)[1] >= 0)
            if held and not clear:
                raise SequencesNotEmptyError(
                    f"sequences {', '.join(map(str, held))} hold state of the adapters in use; empty them first",
                    operation="set_adapters",
                    sequences=held,
                )
            if held:
                self.clear()
            native.set_adapters(handle, tuple((a, a._handle, s) for a, s in chosen), apply=True)
            if self._owner is not None:
                note_adapters(self._owner, tuple(OwnAdapter(a.path, a.digest, s, a._handle.address) for a, s in chosen))

    def _record_adapters(self, own: tuple[OwnAdapter, ...]) -> None:
        """Note the adapters that are in effect in an attached context."""
        with self._handle as handle:
            if own and not handle.adapters:
                adapters = [(Adapter._borrow(self.model, entry, self._owner), entry.scale) for entry in own]
                native.set_adapters(handle, tuple((a, a._handle, s) for a, s in adapters), apply=False)

    @property
    def fingerprint(self) -> Fingerprint:
        """What must be equal for a state of this context to be valid elsewhere.

        Raises
        ------
        FingerprintUnavailableError
            The model's file is not there any more, or is another than the one that was loaded.

        Notes
        -----
        Found out at the first use (a few milliseconds, whatever the size of the model) and whenever the adapters have
        changed; free otherwise.
        """
        adapters = self._handle.adapters
        known = self._fingerprint
        if known is not None and known[0] is adapters:
            return known[1]
        with self._handle as handle:
            adapters = handle.adapters
            for adapter, _ in adapters:
                if not adapter.digest:
                    raise FingerprintUnavailableError(
                        f"cannot tell what the adapter {adapter.path!r} holds", path=adapter.path, reason="adapter"
                    )
            found = fingerprint_of(
                self.model,
                self._params,
                self.schema,
                handle.n_ctx_seq,
                tuple((adapter.digest, scale) for adapter, scale in adapters),
            )
            self._fingerprint = adapters, found
            return found


def _checked(entry: Any) -> tuple[Adapter, float]:
    try:
        adapter, scale = entry
        value = float(scale)
        single: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except (TypeError, ValueError, OverflowError):
        raise AdapterLoadError(f"{brief(entry)} is no (Adapter, scale)", reason="no adapter and scale") from None
    if not isinstance(adapter, Adapter):
        raise AdapterLoadError(f"{type(adapter).__name__} is no Adapter", reason="no adapter")
    if not math.isfinite(single):
        raise AdapterLoadError(f"scale {brief(scale)} is not finite", path=adapter.path, reason="scale")
    return adapter, single


def _same(chosen: list[tuple[Adapter, float]], present: tuple[tuple[Adapter, float], ...]) -> bool:
    return {(id(a), s) for a, s in chosen} == {(id(a), s) for a, s in present}


def _check(identity: gguf.Identity, model: Model) -> None:
    """Refuse what llama.cpp would end the process on, or multiply out of bounds.

    It looks at two of four dimensions, reads metadata without comparing types, and finds out at the first decode.
    """
    meta = identity.scalars
    for key in ("general.type", "general.architecture", "adapter.type"):
        if not isinstance(meta.get(key, ""), str):
            raise gguf.GGUFError(f"{key} is no text")
    if meta.get("general.type") != "adapter" or meta.get("adapter.type") != "lora":
        raise gguf.GGUFError("it is no LoRA adapter")
    if meta.get("general.architecture") != model.arch:
        raise gguf.GGUFError(f"it is for {meta.get('general.architecture')!r} models, not {model.arch!r}")
    alpha = meta.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise gguf.GGUFError(f"adapter.lora.alpha is {alpha!r}")
    weights = model.identity.tensors
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, info in identity.tensors.items():
        base, _, part = name.rpartition(".")
        if part not in ("lora_a", "lora_b"):
            if name.endswith("_norm.weight"):
                continue  # llama.cpp passes over them
            raise gguf.GGUFError(f"tensor {name!r} belongs to no LoRA")
        if info.type not in _TYPES:
            raise gguf.GGUFError(f"tensor {name!r} has ggml type {info.type}")
        pairs.setdefault(base, {})[part] = (*info.dims, *[1] * (4 - len(info.dims)))
    if not pairs:
        raise gguf.GGUFError("it has no tensors")
    for base, pair in pairs.items():
        weight = weights.get(base)
        if len(pair) != 2:
            raise gguf.GGUFError(f"{base!r} has only one of lora_a and lora_b")
        if weight is None:
            raise gguf.GGUFError(f"the model has no tensor {base!r}")
        if weight.type == _NVFP4:
            raise gguf.GGUFError(f"{base!r} is NVFP4, which takes no adapter")
        a, b = pair["lora_a"], pair["lora_b"]
        w = (*weight.dims, *[1] * (4 - len(weight.dims)))
        # of the embeddings' pair, A is stored the other way round
        if base.endswith("token_embd.weight"):
            fits = (b[1], a[1], a[0]) == (w[0], w[1], b[0])
        else:
            fits = (a[0], b[1], a[1]) == (w[0], w[1], b[0])
        if not fits or a[2:] != w[2:] or b[2:] != w[2:] or not all(a) or not all(b):
            raise gguf.GGUFError(f"{base!r} is {w[:2]} in the model, which {a} and {b} do not fit")
