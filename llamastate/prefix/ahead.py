"""Reading entries one ahead of whoever uses them, into memory that is used again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from llamastate.prefix.entry import Entry
from llamastate.prefix.folder import Allocate

__all__ = ["into", "read_ahead"]

Buffer = npt.NDArray[np.uint8]
#: ``get(key, buffer)`` gives an entry, which may lie in the buffer.
Get = Callable[[bytes, Buffer], Entry | None]


def into(buffer: Buffer) -> Allocate:
    """Memory for an entry: this, if it is large enough."""
    return lambda n: buffer[:n] if n <= buffer.nbytes else np.empty(n, np.uint8)


def read_ahead(keys: Sequence[bytes], get: Get, nbytes: int) -> Generator[Entry | None, None, None]:
    """The entries of these keys, each valid until the next is asked for; the next is read in a thread meanwhile.

    Parameters
    ----------
    keys : sequence of bytes
    get : callable
    nbytes : int
        Of one entry; room for two of them is taken.
    """
    free: SimpleQueue[Buffer | None] = SimpleQueue()
    ready: SimpleQueue[tuple[Entry | None, Buffer] | BaseException] = SimpleQueue()
    for _ in range(2):
        free.put(np.empty(nbytes, np.uint8))

    def work() -> None:
        try:
            for key in keys:
                buffer = free.get()
                if buffer is None:
                    return
                ready.put((get(key, buffer), buffer))
        except BaseException as error:  # for who waits for it
            ready.put(error)

    thread = threading.Thread(target=work, name="llamastate-read-ahead", daemon=True)
    thread.start()
    try:
        for _ in keys:
            answer = ready.get()
            if isinstance(answer, BaseException):
                raise answer
            yield answer[0]
            free.put(answer[1])
    finally:
        free.put(None)
        thread.join()
