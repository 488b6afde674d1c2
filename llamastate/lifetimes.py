"""What is still open, so that the interpreter's exit can close it in order.

At exit Python drops objects in no useful order, and a GPU backend that unloads before its contexts are freed crashes.
Stores go first, which may have to write, then contexts, then models; whatever was closed before is not here any more.
Finalizers that run by themselves at exit would come in between. And :class:`Closing`, which all that can be closed have
in common.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, SupportsIndex

from llamastate.errors import NotCopyableError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Closing", "contexts", "databases", "models", "stores"]


class Closing:
    """What owns something, gives it back with :meth:`close`, and can be the subject of a ``with`` block."""

    #: Of what cannot be copied or pickled: what to do instead.
    _instead: ClassVar[str | None] = None

    def close(self) -> None:
        """Give back what it owns. Idempotent."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        if self._instead is None:
            return super().__reduce_ex__(protocol)
        what = type(self).__name__
        raise NotCopyableError(
            f"a {what} can be neither copied nor pickled: {self._instead}", what=what, instead=self._instead
        )


class _Closable(Protocol):
    def close(self) -> None: ...


class _Forkable(_Closable, Protocol):
    forked: bool


stores: weakref.WeakSet[_Closable] = weakref.WeakSet()
databases: weakref.WeakSet[_Closable] = weakref.WeakSet()
contexts: weakref.WeakSet[_Forkable] = weakref.WeakSet()
models: weakref.WeakSet[_Closable] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for item in (*stores, *databases, *contexts, *models):
        # One that cannot be closed must not keep the others open: that is the crash this is here to prevent. Nor must
        # somebody who does not want to wait until a store has written everything.
        with contextlib.suppress(Exception, KeyboardInterrupt):
            item.close()


def _forget_all() -> None:
    for context in contexts:
        context.forked = True
    contexts.clear()
    models.clear()


if hasattr(os, "register_at_fork"):
    # A child has the parent's memory but not its threads: a lock that one of them held is never released, and what was
    # being computed never ends. Native objects are of no use there, and closing them at its exit would hang.
    os.register_at_fork(after_in_child=_forget_all)
