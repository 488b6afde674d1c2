"""Parameters of a context, checked before llama.cpp sees them."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from llamastate._native import consts
from llamastate.arrays import as_index
from llamastate.errors import ContextCreateError
from llamastate.words import brief

__all__ = ["I32", "MAX_BATCH", "MAX_UBATCH", "U32", "all_cores", "bounded", "choice", "rope_params"]

U32 = 2**32 - 1
I32 = 2**31 - 1

#: llama.cpp makes room for so many tokens at once; far more than that is no wish but a mistake, and kills the process.
MAX_BATCH = 1 << 24
MAX_UBATCH = 1 << 18

_FLOAT_MAX = float(np.finfo(np.float32).max)

#: Positional-encoding parameters that are real numbers.
ROPE_FLOATS = frozenset(
    {
        "rope_freq_base",
        "rope_freq_scale",
        "yarn_ext_factor",
        "yarn_attn_factor",
        "yarn_beta_fast",
        "yarn_beta_slow",
    }
)


def all_cores() -> int:
    """How many processors this process may use, which in a container is fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bounded(name: str, value: Any, low: int, high: int) -> int:
    """Turn ``value`` into an int in ``[low, high]``, or raise :class:`ContextCreateError`."""
    number = as_index(value, name, ContextCreateError)
    if not low <= number <= high:
        raise ContextCreateError(f"{name} = {number} is not in [{low}, {high}]", params={name: value}, reason=name)
    return number


def choice(name: str, value: Any, choices: dict[str, Any]) -> Any:
    """Look ``value`` up among the choices, or raise :class:`ContextCreateError`."""
    try:
        return choices[value]
    except (KeyError, TypeError):
        raise ContextCreateError(
            f"{name} = {brief(value)} is not one of {', '.join(map(repr, choices))}", params={name: value}, reason=name
        ) from None


def rope_params(given: dict[str, Any]) -> dict[str, Any]:
    """Check the positional-encoding parameters that were given; all others stay llama.cpp's."""
    params: dict[str, Any] = {}
    for name, value in given.items():
        if name == "rope_scaling_type":
            params[name] = choice(name, value, consts.ROPE_SCALING)
        elif name == "yarn_orig_ctx":
            params[name] = bounded(name, value, 0, U32)
        elif name in ROPE_FLOATS:
            try:
                params[name] = float(value)
            except (TypeError, ValueError, OverflowError):
                raise ContextCreateError(
                    f"{name} = {brief(value)} is no number", params={name: value}, reason=name
                ) from None
            if not abs(params[name]) <= _FLOAT_MAX:
                raise ContextCreateError(f"{name} = {brief(value)} is not finite", params={name: value}, reason=name)
            if name.startswith("rope_freq") and params[name] < 0:
                raise ContextCreateError(f"{name} = {brief(value)} is negative", params={name: value}, reason=name)
        else:
            raise TypeError(f"Context() got an unexpected keyword argument {name!r}")
    return params
