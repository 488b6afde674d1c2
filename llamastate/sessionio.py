"""A session out of its context and back: snapshots, files, and the same for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from llamastate import layout, sessionfiles
from llamastate.errors import CorruptStateError, InvalidArgumentError, LlamaStateError
from llamastate.history import Checkpoint
from llamastate.restore import put_back
from llamastate.sampler import Sampler
from llamastate.sessioncore import check_context
from llamastate.sessionstore import SessionStore
from llamastate.snapshot import CheckpointFlags, CheckpointRecord, Snapshot

if TYPE_CHECKING:
    from typing_extensions import Self

    from llamastate.context import Context

__all__ = ["SessionIO", "in_thread"]

_T = TypeVar("_T")


class SessionIO(SessionStore):
    """How a :class:`~llamastate.Session` is saved and brought back. Not made directly."""

    def snapshot(
        self,
        *,
        out: Any = None,
        sampler: Sampler | Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Snapshot:
        """Take everything that the session is: tokens, state, checkpoints, the logits of the last token.

        Parameters
        ----------
        out : buffer or Snapshot, optional
            Where to put it, as for :meth:`Snapshot.take`.
        sampler : Sampler or mapping, optional
            To be kept with it: :meth:`Sampler.from_state` goes on from there.
        metadata : mapping, optional
            Anything of JSON types.

        Returns
        -------
        Snapshot
        """
        with self._turn():
            self._check_step()
            if self.n_past:
                # so that the next token can be sampled at once wherever this is restored
                self._need_logits()
            return Snapshot.take(
                self.ctx,
                self.seq_id,
                self._tokens,
                out=out,
                logits=self._logits if self._has_logits else None,
                sampler=sampler,
                checkpoints=[_record(p) for p in self._history if p.n_tokens <= self.n_past],
                metadata=metadata,
            )

    def restore(self, snapshot: Snapshot) -> None:
        """Become what the snapshot is of. What the session was is gone, its checkpoints too.

        Raises
        ------
        LoadError
            One of its subclasses says why; the session is as it was.
        """
        with self._turn(), contextlib.ExitStack() as stack:
            self._check_step()
            before = self._tokens
            room = self._scarce_room(len(before), stack)
            try:
                with self._all_or_nothing():
                    self._adopt(snapshot)
            except LlamaStateError:
                if self.ctx.seq_pos_max(self.seq_id) + 1 != len(before):
                    self._take_back(before, None, None)
                raise
            except BaseException:
                # Ctrl-C: it may be the old state, the new one, or none
                self.ctx.seq_rm(self.seq_id)
                if room is not None:
                    put_back(self.ctx, self.seq_id, room)
                self._take_back(before, None, None)
                raise

    def _adopt(self, snapshot: Snapshot) -> None:
        if not isinstance(snapshot, Snapshot):
            raise InvalidArgumentError(
                f"snapshot is {type(snapshot).__name__}, not a Snapshot", name="snapshot", value=snapshot
            )
        tokens = snapshot.tokens.copy()
        row = snapshot.logits
        if row is not None:
            self._check_row("logits", row)
        # Copies: a session lives on when the file that it came from has long been replaced.
        points = [self._checked(i, _checkpoint(r), len(tokens)) for i, r in enumerate(snapshot.checkpoints)]
        snapshot.restore(self.ctx, self.seq_id)
        self._tokens = tokens
        self._redo = []
        self._history.replace(points)
        self._history.thin(len(tokens))
        self._has_logits = row is not None
        if row is not None:
            self._logits[:] = row

    def _checked(self, i: int, point: Checkpoint, n_tokens: int) -> Checkpoint:
        """Refuse a checkpoint that is not what it says: found out on the way back to it, that would be too late."""
        found = point.n_tokens
        if point.state is not None:
            schema = self.ctx.schema
            partial = point.kind == "partial" and schema.has_partial
            found = layout.validate_sequence(point.state, schema, self.ctx.limits, partial=partial).pos_max + 1
            point.sound = point.state
        if not found == point.n_tokens <= n_tokens:
            raise _corrupt(f"checkpoint {i}", f"a state of {found} tokens for {point.n_tokens} of {n_tokens}")
        if point.logits is not None:
            self._check_row(f"checkpoint {i}: logits", point.logits)
        return point

    def _check_row(self, section: str, row: npt.NDArray[np.float32]) -> None:
        if row.shape != self._logits.shape:
            raise _corrupt(section, f"{row.size} logits, not {self._logits.size}")

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        sampler: Sampler | Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> int:
        """Write the session to a file, atomically and durably.

        Parameters
        ----------
        path : path-like
        sampler, metadata
            As for :meth:`snapshot`.

        Returns
        -------
        int
            Bytes written.

        Raises
        ------
        SaveError
            The old file, if any, is as it was.
        """
        with self.snapshot(sampler=sampler, metadata=metadata) as snapshot:
            return snapshot.save(path)

    @classmethod
    def load(cls, ctx: Context, path: str | os.PathLike[str], *, seq_id: int = 0, **options: Any) -> Self:
        """Bring a session back: its next token can be sampled at once, and its checkpoints are there.

        Parameters
        ----------
        ctx : Context
            Of the same model and cache settings.
        path : path-like
            Written by :meth:`save`.
        seq_id : int
            The sequence to use. What it held is replaced.
        **options
            As for :class:`Session`.

        Raises
        ------
        LoadError
            One of its subclasses says why (:class:`FingerprintMismatchError`: another model); the sequence is as it
            was.
        """
        with Snapshot.open(path) as snapshot:
            return cls.from_snapshot(ctx, snapshot, seq_id=seq_id, **options)

    @classmethod
    def from_snapshot(cls, ctx: Context, snapshot: Snapshot, *, seq_id: int = 0, **options: Any) -> Self:
        """Begin a session as what the snapshot is of; :meth:`load` with the file opened already."""
        check_context(ctx)
        with ctx._handle:
            self = cls._unchecked(ctx, seq_id, **options)
            with self._turn():
                self._adopt(snapshot)
            return self

    # --- llama.cpp's own files ----------------------------------------------------------------------------------------

    @classmethod
    def import_file(cls, ctx: Context, path: str | os.PathLike[str], *, seq_id: int = 0, **options: Any) -> Self:
        """Begin a session as what a file of llama.cpp holds: a GGSN of llama-cli, a GGSQ of llama-server or others.

        Parameters
        ----------
        ctx : Context
            Of the same model and cache settings. The file does not name its model: that is the caller's promise.
        path : path-like
            With one sequence in it.
        seq_id : int
            The sequence to use. What it held is replaced.
        **options
            As for :class:`Session`.

        Raises
        ------
        LoadError
            One of its subclasses says why (:class:`MediaTokensError`: images among the tokens); the sequence is as it
            was.
        TokensMismatchError
            The state is not of the tokens beside it; likewise.

        Notes
        -----
        Such files carry no logits. The first :meth:`Session.generate` decodes the last token again; of a recurrent or
        hybrid model all tokens.
        """
        check_context(ctx)
        with ctx._handle:
            self = cls._unchecked(ctx, seq_id, **options)
            with self._turn():
                self._tokens = sessionfiles.load_file(ctx, path, self.seq_id)
            return self

    def export_file(self, path: str | os.PathLike[str], *, format: str = "ggsq") -> int:  # noqa: A002
        """Write a file that llama.cpp reads, atomically and durably. Checkpoints do not go with it.

        Parameters
        ----------
        path : path-like
        format : {"ggsq", "ggsq-packed", "ggsn"}
            For ``llama_state_seq_load_file`` (llama-cpp-python, older llama-server); the same with the tokens packed as
            newer llama-server packs them; for ``llama_state_load_file`` (llama-cli), as sequence 0.

        Returns
        -------
        int
            Bytes written.

        Raises
        ------
        SaveError
            The old file, if any, is as it was.
        """
        with self._long_turn():
            self._check_step()
            return sessionfiles.save_file(self.ctx, path, self.seq_id, self._tokens, format)

    # --- asyncio ------------------------------------------------------------------------------------------------------

    async def asave(self, path: str | os.PathLike[str], **keep: Any) -> int:
        """:meth:`save` for asyncio."""
        return await in_thread(lambda stopped: self.save(path, **keep))

    @classmethod
    async def aload(cls, ctx: Context, path: str | os.PathLike[str], *, seq_id: int = 0, **options: Any) -> Self:
        """:meth:`load` for asyncio."""
        return await in_thread(lambda stopped: cls.load(ctx, path, seq_id=seq_id, **options))


async def in_thread(work: Callable[[Callable[[], bool]], _T]) -> _T:
    """Run ``work(stopped)`` in a thread. A task that is cancelled tells it so, and waits for it to end."""
    cancelled = False
    job = asyncio.ensure_future(asyncio.to_thread(work, lambda: cancelled))
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        cancelled = True
        await asyncio.wait([job])
        raise


def _corrupt(section: str, reason: str) -> CorruptStateError:
    return CorruptStateError(f"damaged snapshot: {section}: {reason}", reason=reason, section=section)


def _record(point: Checkpoint) -> CheckpointRecord:
    flags = CheckpointFlags.AUTOMATIC if point.automatic else CheckpointFlags.NONE
    if point.kind == "partial":
        flags |= CheckpointFlags.PARTIAL
    return CheckpointRecord(point.n_tokens, point.label, point.created_ns, flags, point.state, point.logits)


def _checkpoint(record: CheckpointRecord) -> Checkpoint:
    partial = bool(record.flags & CheckpointFlags.PARTIAL)
    kind = "mark" if record.state is None else "partial" if partial else "full"
    return Checkpoint(
        record.n_tokens,
        record.label,
        bool(record.flags & CheckpointFlags.AUTOMATIC),
        kind,
        int(record.created),
        None if record.state is None else record.state.copy(),
        None if record.logits is None else record.logits.copy(),
    )
