"""Where states are while their requests make room for others: in memory, and on disk beyond that."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np

from llamastate.errors import LlamaStateError
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
        What they may take in memory. Others go to files, which are gone when this is closed.
    folder : path-like, optional
        Where; the system's folder for temporary files by default.
    """

    def __init__(self, ram_bytes: int, folder: str | os.PathLike[str] | None = None) -> None:
        self.ram_bytes = ram_bytes
        self.used = 0
        #: How often there was room neither in memory nor on disk, and tokens had to be decoded again.
        self.n_lost = 0
        self._folder = folder
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._n_files = 0

    def put(self, ctx: Context, task: Task) -> None:
        """Take a task's state out of its sequence. The sequence stays as it is."""
        size = ctx.state_seq_get_size(task.seq)
        if self.used + size <= self.ram_bytes:
            task.state = ctx.state_seq_get_data(task.seq)
            self.used += task.state.nbytes
            return
        try:
            task.state = self._file()
            Snapshot.take(ctx, task.seq, task.in_context).save(task.state)
        except (LlamaStateError, OSError):
            task.state = None  # the tokens are known: that takes longer, and is as good but for the last bits
            self.n_lost += 1

    def get(self, ctx: Context, task: Task) -> None:
        """Put it back into the task's sequence.

        Raises
        ------
        NotEnoughCellsError, NoKVSlotError
            There is no room yet; it is still kept.
        """
        if isinstance(task.state, str):
            snapshot: Any = Snapshot.open(task.state)
            snapshot.restore(ctx, task.seq)
        elif task.state is not None:
            ctx.state_seq_set_data(task.state, task.seq)
        else:
            ctx.prefill(task.in_context, seq_id=task.seq, logits=None)
        self.drop(task)

    def drop(self, task: Task) -> None:
        """Nobody needs it any more."""
        if isinstance(task.state, str):
            os.unlink(task.state)
        elif isinstance(task.state, np.ndarray):
            self.used -= task.state.nbytes
        task.state = None

    def close(self) -> None:
        """Let go of everything. Idempotent."""
        if self._files is not None:
            self._files.cleanup()
            self._files = None

    def _file(self) -> str:
        if self._files is None:
            self._files = tempfile.TemporaryDirectory(prefix="llamastate-", dir=self._folder)
        self._n_files += 1
        return os.path.join(self._files.name, f"{self._n_files}.llsnap")
