"""What must be equal for a state to be valid: who made it, and how it lies in memory.

A state blob of llama.cpp carries no identity. One of another model with the same shape loads, and what comes out is
nonsense. A :class:`Fingerprint` goes with every snapshot; restoring compares it field by field with the context's.

No part of it are sizes and counts of the context that decoded (``n_ctx``, ``n_batch``, ``n_seq_max``, threads, GPU
layers): a state does not depend on them, but for the last bits. ``swa_full`` is none either: it decides how many cells
a context keeps, while the state of a sequence has the same ones either way.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llamastate._native import consts
from llamastate.errors import CorruptStateError, FingerprintMismatchError, VersionMismatchError
from llamastate.layout import KVSchema

if TYPE_CHECKING:
    from typing_extensions import Self

    from llamastate.layout import Schema
    from llamastate.model import Model

__all__ = ["FINGERPRINT_VERSION", "Fingerprint", "fingerprint_of", "require_same"]

#: Of the fields below and of how they are found.
FINGERPRINT_VERSION = 1

#: Stands for a number that only llama.cpp's code for that architecture knows. Equal to itself and to nothing else.
_OF_MODEL = "model"


@dataclass(frozen=True)
class Fingerprint:
    """What a state depends on, in the order in which differences are reported.

    Attributes
    ----------
    version : int
        :data:`FINGERPRINT_VERSION`.
    architecture : str
        ``general.architecture`` of the model.
    weights : str
        BLAKE2b-256 (hex) over hyperparameters, vocabulary, table of tensors and samples of their bytes, all parts of a
        split model together.
    overrides : str
        Metadata that was overridden when the model was loaded, as JSON; "" for none.
    adapters : tuple of (str, float)
        Content digest and scale of every LoRA in effect, in order of digest.
    rope_scaling : str
        "none", "linear", "yarn" or "longrope".
    rope_freq_base, rope_freq_scale, yarn_ext_factor : float or "model"
        In effect.
    yarn_attn_factor : float or "model" or None
        None where YaRN computes it.
    yarn_beta_fast, yarn_beta_slow : float or "model" or None
        None without YaRN.
    yarn_orig_ctx : int or None
        None if the model's.
    rope_factors : str
        Which of two sets of frequencies a longrope model uses, which depends on the room of a sequence: "short" or
        "long"; "" for models with one.
    state_version : int
        ``LLAMA_STATE_SEQ_VERSION``.
    type_k, type_v : str
        Types of the cache ("f16"); "" without an attention cache.
    v_trans : bool
        V is transposed: flash attention is off.
    n_streams : int
        1 for a unified cache, else the number of sequences.
    layout : str
        :meth:`Schema.digest` of everything that fixes the bytes of a blob.
    """

    version: int
    architecture: str
    weights: str
    overrides: str
    adapters: tuple[tuple[str, float], ...]
    rope_scaling: str
    rope_freq_base: float | str
    rope_freq_scale: float | str
    yarn_ext_factor: float | str
    yarn_attn_factor: float | str | None
    yarn_beta_fast: float | str | None
    yarn_beta_slow: float | str | None
    yarn_orig_ctx: int | None
    rope_factors: str
    state_version: int
    type_k: str
    type_v: str
    v_trans: bool
    n_streams: int
    layout: str

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types; :meth:`from_dict` gives an equal fingerprint back."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        fields["adapters"] = [list(pair) for pair in self.adapters]
        return fields

    @classmethod
    def from_dict(cls, fields: Any) -> Self:
        """The fingerprint that :meth:`to_dict` was called on.

        Raises
        ------
        VersionMismatchError
            Made by a newer version of this package.
        CorruptStateError
            Made by none.
        """
        version = fields.get("version") if isinstance(fields, Mapping) else None
        if type(version) is not int or version < 1:
            raise _corrupt(f"version {version!r}")
        if version > FINGERPRINT_VERSION:
            raise VersionMismatchError(
                f"a fingerprint of version {version}; this package knows {FINGERPRINT_VERSION}",
                reason="fingerprint",
                expected=FINGERPRINT_VERSION,
                found=version,
            )
        if set(fields) != set(_FIELDS):
            raise _corrupt(f"fields {sorted(set(fields) ^ set(_FIELDS))}")
        for name, kinds in _KINDS.items():
            if type(fields[name]) not in kinds:
                raise _corrupt(f"{name} is {type(fields[name]).__name__}")
        adapters = []
        for pair in fields["adapters"]:
            if type(pair) is not list or len(pair) != 2 or type(pair[0]) is not str or type(pair[1]) is not float:
                raise _corrupt("adapters")
            adapters.append((pair[0], pair[1]))
        return cls(**{**fields, "adapters": tuple(adapters)})

    @functools.cached_property
    def json(self) -> bytes:
        """:meth:`to_dict` as canonical JSON: the same bytes for equal fingerprints, on every machine."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

    @functools.cached_property
    def digest(self) -> str:
        """BLAKE2b-256 (hex) over :attr:`json`."""
        return hashlib.blake2b(self.json, digest_size=32).hexdigest()


_FIELDS = tuple(f.name for f in dataclasses.fields(Fingerprint))
_NUMBER: tuple[type, ...] = (float, str)
_KINDS: dict[str, tuple[type, ...]] = {
    "architecture": (str,),
    "weights": (str,),
    "overrides": (str,),
    "adapters": (list,),
    "rope_scaling": (str,),
    "rope_freq_base": _NUMBER,
    "rope_freq_scale": _NUMBER,
    "yarn_ext_factor": _NUMBER,
    "yarn_attn_factor": (*_NUMBER, type(None)),
    "yarn_beta_fast": (*_NUMBER, type(None)),
    "yarn_beta_slow": (*_NUMBER, type(None)),
    "yarn_orig_ctx": (int, type(None)),
    "rope_factors": (str,),
    "state_version": (int,),
    "type_k": (str,),
    "type_v": (str,),
    "v_trans": (bool,),
    "n_streams": (int,),
    "layout": (str,),
}

#: How errors put a field; ``{0}`` is what the state has, ``{1}`` what the context has.
_SAY = {
    "architecture": "the state is of a {0!r} model, this one is {1!r}",
    "weights": "the state was computed with other weights (content {0:.12}…, this model's is {1:.12}…)",
    "overrides": "the model's metadata was overridden differently: {0!r}, here {1!r}",
    "adapters": "the state was computed with {0}, this context has {1}",
    "v_trans": "the state was taken with flash attention {0}, this context has it {1}",
    "n_streams": "the state is of {0}, this context has {1}",
    "layout": "the state lies differently in memory (layout {0:.12}…, here {1:.12}…)",
}


def require_same(expected: Fingerprint, found: Fingerprint) -> None:
    """Refuse a state that does not belong to a context.

    Parameters
    ----------
    expected : Fingerprint
        What the state was made with.
    found : Fingerprint
        The context's.

    Raises
    ------
    FingerprintMismatchError
        ``field`` is the first that differs, ``expected`` and ``found`` its values.
    """
    if expected is found or expected == found:
        return
    name = next(n for n in _FIELDS if getattr(expected, n) != getattr(found, n))
    was, now = getattr(expected, name), getattr(found, name)
    sentence = _SAY.get(name, name + " was {0} when the state was taken, this context has {1}")
    raise FingerprintMismatchError(
        sentence.format(_words(name, was), _words(name, now)), reason="fingerprint", field=name, expected=was, found=now
    )


def _words(name: str, value: Any) -> Any:
    if name == "v_trans":
        return "off" if value else "on"
    if name == "n_streams":
        return "a unified cache" if value == 1 else f"a cache split among {value} sequences"
    if name == "adapters":
        each = ", ".join(f"{digest[:12]}… × {scale:g}" for digest, scale in value)
        return f"adapters {each}" if value else "no adapters"
    return value


def fingerprint_of(
    model: Model, params: Mapping[str, Any], schema: Schema, n_ctx_seq: int, adapters: tuple[tuple[str, float], ...]
) -> Fingerprint:
    """Put the fingerprint of a context together.

    Parameters
    ----------
    model : Model
    params : mapping
        What the context was made with, as for ``create_context``.
    schema : Schema
        Of its states.
    n_ctx_seq : int
        Cells that one sequence can use.
    adapters : tuple of (str, float)
        Digest and scale of each.

    Raises
    ------
    FingerprintUnavailableError
        The model's file cannot be had any more.
    """
    identity = model.identity
    rope = _rope(identity.scalars, model.arch, params)
    caches = [p for p in schema.parts if isinstance(p, KVSchema)]
    return Fingerprint(
        version=FINGERPRINT_VERSION,
        architecture=model.arch,
        weights=identity.digest,
        overrides=str(params.get("overrides", "")),
        adapters=tuple(sorted(adapters)),
        **rope,
        rope_factors=_rope_factors(identity.scalars, model.arch, identity.tensors, n_ctx_seq),
        state_version=consts.STATE_SEQ_VERSION,
        type_k=_types([entry[0] for part in caches for entry in part.k]),
        type_v=_types([entry[0] for part in caches for entry in part.v]),
        v_trans=schema.v_trans,
        n_streams=schema.n_stream,
        layout=schema.digest(),
    )


def _types(types: list[int]) -> str:
    names = {number: name for name, number in consts.CACHE_TYPES.items()}
    return "+".join(names.get(t, str(t)) for t in sorted(set(types)))


def _rope(meta: Mapping[str, Any], arch: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Rope and YaRN settings in effect, as ``llama_context`` works them out from its parameters and the model's.

    Parameters that were not given are the model's. Where only llama.cpp's code for an architecture knows those, the
    word "model" stands for them: the same setting given as a number counts as another then, which is the safe side.
    """

    def given(name: str, unset: bool) -> float | None:
        value = params.get(name)
        return None if value is None or unset else _single(value)

    def positive(name: str) -> float | None:
        return given(name, params.get(name) == 0)

    def not_negative(name: str) -> float | None:
        return given(name, (params.get(name) or 0) < 0)

    def of_model(name: str, default: float) -> float | str:
        # whether an architecture reads these keys, and what it takes without them, is its own affair
        return _OF_MODEL if arch == "grok" or f"{arch}.rope.scaling.{name}" in meta else default

    wanted = params.get("rope_scaling_type")
    scaling: Any = next((name for name, number in consts.ROPE_SCALING.items() if number == wanted), "unspecified")
    if scaling == "unspecified":
        scaling = meta.get(f"{arch}.rope.scaling.type", "linear")
    base: Any = positive("rope_freq_base")
    if base is None:
        base = _OF_MODEL if f"{arch}.rope.scaling.alpha" in meta else _single(meta.get(f"{arch}.rope.freq_base", 1e4))
    scale: Any = 1.0 if scaling == "none" else positive("rope_freq_scale")
    if scale is None:
        factor = _single(meta.get(f"{arch}.rope.scaling.factor", meta.get(f"{arch}.rope.scale_linear", 0.0)))
        scale = _single(1 / factor) if factor else 1.0
    ext: Any = not_negative("yarn_ext_factor")
    if ext is None:
        ext = of_model("yarn_ext_factor", 1.0 if scaling == "yarn" else 0.0)
    numbers: dict[str, Any] = {}
    for name, default in (("yarn_attn_factor", 1.0), ("yarn_beta_fast", 32.0), ("yarn_beta_slow", 1.0)):
        value = not_negative(name)
        numbers[name] = of_model(name, default) if value is None else value
    if ext == 0:
        numbers["yarn_beta_fast"] = numbers["yarn_beta_slow"] = None
    elif ext != _OF_MODEL:
        numbers["yarn_attn_factor"] = None
    return {
        "rope_scaling": str(scaling),
        "rope_freq_base": base,
        "rope_freq_scale": scale,
        "yarn_ext_factor": ext,
        **numbers,
        "yarn_orig_ctx": int(params.get("yarn_orig_ctx") or 0) or None,
    }


def _rope_factors(meta: Mapping[str, Any], arch: str, tensors: Mapping[str, Any], n_ctx_seq: int) -> str:
    if not any("rope_factors_long" in name for name in tensors):
        return ""
    trained = meta.get(f"{arch}.rope.scaling.original_context_length", meta.get(f"{arch}.context_length", 0))
    return "long" if n_ctx_seq > trained else "short"


def _single(value: Any) -> float:
    """As a float32 holds it, since that is what llama.cpp does."""
    try:
        number: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except (struct.error, OverflowError):
        return float("inf")
    return number


def _corrupt(reason: str) -> CorruptStateError:
    return CorruptStateError(f"no fingerprint: {reason}", reason=reason, section="fingerprint")
