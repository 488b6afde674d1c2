"""Arguments of stores: what they may be."""

from __future__ import annotations

from typing import Any

from llamastate.arrays import as_index
from llamastate.context import Context
from llamastate.errors import InvalidArgumentError

__all__ = ["at_least", "check_context", "check_share", "check_tier"]

#: How many tokens the numbers in a block's header can count.
MOST_TOKENS = (1 << 31) - 1


def at_least(name: str, value: object, limit: int, most: int | None = None) -> int:
    """An integer from ``limit`` to ``most``."""
    number = as_index(value, name, InvalidArgumentError)
    if number < limit:
        raise InvalidArgumentError(f"{name} = {number} is below {limit}", name=name, value=number, limit=limit)
    if most is not None and number > most:
        raise InvalidArgumentError(f"{name} = {number} is above {most}", name=name, value=number, limit=most)
    return number


def check_share(value: Any) -> float:
    """What part of a store anchors may take, in ``(0, 1]``."""
    if not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise InvalidArgumentError(
            f"anchor_share = {value!r} is not in (0, 1]", name="anchor_share", value=value, limit=(0, 1)
        )
    return value


def check_tier(value: Any) -> None:
    """A place beyond the disk, or None."""
    names = ("known", "get", "put", "touch", "tails", "close")
    if value is not None and not all(callable(getattr(value, name, None)) for name in names):
        raise InvalidArgumentError(
            f"remote is {type(value).__name__}, not a Tier such as RemoteTier", name="remote", value=value
        )


def check_context(value: Any, name: str = "ctx") -> None:
    """A context, whatever else can be passed there."""
    if not isinstance(value, Context):
        raise InvalidArgumentError(f"{name} is {type(value).__name__}, not a Context", name=name, value=value)
