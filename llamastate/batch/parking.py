"""Where states are while their requests make room for others: in memory, and on disk beyond that."""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np

from llamastate.errors import LlamaStateError, NoKVSlotError, NotEnoughCellsError
from llamastate.snapshot import Snapshot

if TYPE_CHECKING:
    from llamastate.batch.tasks import Task
    from llamastate.context import Context

__all__ = ["Parking"]


class Parking:
    """States of parked tasks.

    Parameters
    ----------
    ram_bytes : int
        What they may take in memory. Others go to files without a name: whatever ends the process, nothing of them is
        left, and nobody else can take them away.
    folder : path-like, optional
        Where; the system's folder for temporary files by default.

    Notes
    -----
    A state that cannot be kept, or comes back damaged, costs time and no more: the tokens are known and are decoded
    again. That is as good but for the last bits.
    """

    def __init__(self, ram_bytes: int, folder: str | os.PathLike[str] | None = None) -> None:
        self.ram_bytes = ram_bytes
        self.used = 0
        #: How often tokens had to be decoded again.
        self.n_lost = 0
        self._folder = folder

    def put(self, ctx: Context, task: Task) -> None:
        """Take a task's state out of its sequence. The sequence stays as it is."""
        try:
            if self.used + ctx.state_seq_get_size(task.seq) <= self.ram_bytes:
                task.state = ctx.state_seq_get_data(task.seq)
                self.used += task.state.nbytes
            else:
                task.state = self._file(Snapshot.take(ctx, task.seq, task.in_context))
        except (LlamaStateError, OSError, MemoryError):
            task.state = None

    def get(self, ctx: Context, task: Task) -> None:
        """Put it back into the task's sequence.

        Raises
        ------
        NotEnoughCellsError, NoKVSlotError
            There is no room yet; it is still kept.
        """
        if not self._restored(ctx, task):
            ctx.prefill(task.in_context, seq_id=task.seq, logits=None)
            self.n_lost += 1  # not once for each time that there is no room yet
        self.drop(task)

    def drop(self, task: Task) -> None:
        """Nobody needs it any more."""
        if isinstance(task.state, np.ndarray):
            self.used -= task.state.nbytes
        elif task.state is not None:
            with contextlib.suppress(OSError):
                task.state.close()
        task.state = None

    def _restored(self, ctx: Context, task: Task) -> bool:
        try:
            if isinstance(task.state, np.ndarray):
                ctx.state_seq_set_data(task.state, task.seq)
            elif task.state is not None:
                _read(task.state).restore(ctx, task.seq)
            else:
                return False
        except (NotEnoughCellsError, NoKVSlotError):
            raise
        except (LlamaStateError, OSError, ValueError, MemoryError):
            self.drop(task)
            return False
        return True

    def _file(self, snapshot: Snapshot) -> Any:
        file: Any = tempfile.TemporaryFile(prefix="llamastate-", dir=self._folder, buffering=0)  # noqa: SIM115
        try:
            with memoryview(snapshot) as data:
                done = 0
                while done < len(data):
                    done += file.write(data[done:])
        except BaseException:
            file.close()
            raise
        return file


def _read(file: Any) -> Snapshot:
    # Not mapped: where the disk fails, reading is an error, and touching a map the end of the process.
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    data = np.empty(size, np.uint8)
    done = 0
    while done < size and (n := file.readinto(data[done:])):
        done += n
    return Snapshot.from_buffer(data[:done])
