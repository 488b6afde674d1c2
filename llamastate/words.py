"""How messages quote what a caller gave, which may be megabytes long."""

from __future__ import annotations

import reprlib
from typing import Any

__all__ = ["brief"]

_LIMIT = 60

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = _LIMIT


def brief(value: Any) -> str:
    """Write ``value`` as ``repr()`` does, in about 60 characters at most, and without ever failing."""
    if isinstance(value, int) and value.bit_length() > 8 * _LIMIT:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to write very long ones
    if isinstance(value, (bytes, bytearray)):
        value = value[: _LIMIT + 1]  # reprlib would write all of it first
    try:
        text = _repr.repr(value)
    except Exception:  # an object's own __repr__ may do anything
        return f"<{type(value).__name__}>"
    return text if len(text) <= 2 * _LIMIT else f"{text[:_LIMIT]}...{text[-_LIMIT // 2 :]}"
