"""What is still open, so that the interpreter's exit can close it in order.

At exit Python drops objects in no useful order, and a GPU backend that unloads before its contexts are freed crashes.
Contexts go first, then models; whatever was closed before is not here any more.
"""

from __future__ import annotations

import atexit
import weakref
from typing import Protocol

__all__ = ["contexts", "models"]


class _Closable(Protocol):
    def close(self) -> None: ...


contexts: weakref.WeakSet[_Closable] = weakref.WeakSet()
models: weakref.WeakSet[_Closable] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for group in (contexts, models):
        for item in list(group):
            item.close()
