"""A context with something in every sequence, the states that are fed to it damaged, and what must hold afterwards."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llamastate import LlamaStateError, OnDeviceStateError, SeqFlags
from llamastate.layout import SequenceState, parse_context, parse_sequence
from tests.fuzz.mutate import Blob, context_headers, mutate, sequence_headers
from tests.helpers import KINDS, context, nmse, tokens

PATHS = ("sequence", "partial", "device", "whole", "sequence file", "context file")

#: Sequence ids and flags that no context has.
BAD_IDS: tuple[Any, ...] = (-7, -1, 4, 255, 256, 300, 2**31, 2**70, None, "0", 0.5)
BAD_FLAGS: tuple[Any, ...] = (4, 8, 255, -1, 2**31, 2**32, 2**70, "1", None, 1.0)


class WrongError(AssertionError):
    """What must hold does not."""


class Settings(NamedTuple):
    """Which model and which cache."""

    kind: str
    flash_attn: str
    n_seq_max: int
    kv_unified: bool


SETTINGS = tuple(
    Settings(kind, flash_attn, n_seq_max, unified)
    for kind in KINDS
    for flash_attn in ("on", "off")
    for n_seq_max, unified in ((1, True), (4, True), (4, False))
)


class World:
    """One context and its sources.

    Sequence 0 and 1 differ in length, 2 is empty, 3 is a copy of 0, which shares its cells where the cache is unified.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.ctx = context(
            settings.kind,
            flash_attn=settings.flash_attn,
            n_seq_max=settings.n_seq_max,
            kv_unified=settings.kv_unified,
            n_ctx=256 if settings.kv_unified else 256 * settings.n_seq_max,
            n_ubatch=64,
        )
        self.ctx.decode(tokens(6, seed=1), seq_id=0)
        if settings.n_seq_max > 1:
            self.ctx.decode(tokens(40 if "swa" in settings.kind else 9, seed=2), seq_id=1)
            self.ctx.decode(tokens(3, seed=3), seq_id=0)
            self.ctx.seq_cp(0, 3)
        self.whole = self.ctx.state_get_data()
        self.before = self.held()
        self.expected = self.next_logits()
        self.sources = self._sources()

    def close(self) -> None:
        self.ctx.close()

    def held(self) -> list[bytes]:
        """Every sequence's state."""
        return [self.ctx.state_seq_get_data(seq).tobytes() for seq in range(self.ctx.n_seq_max)]

    def next_logits(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Logits after one more token in every sequence. Everything is put back."""
        rows = []
        for seq in range(self.ctx.n_seq_max):
            self.ctx.decode([17], seq_id=seq)
            rows.append(self.ctx.logits())
        self.ctx.state_set_data(self.whole)
        return np.array(rows)

    def _sources(self) -> dict[str, list[Blob]]:
        ctx, schema, settings = self.ctx, self.ctx.schema, self.settings
        found: dict[str, list[Blob]] = {path: [] for path in PATHS}
        for seq in range(ctx.n_seq_max):
            data = ctx.state_seq_get_data(seq).tobytes()
            headers = sequence_headers(data, schema, partial=False)
            found["sequence"].append(Blob(data, headers))
            part = ctx.state_seq_get_data(seq, SeqFlags.PARTIAL_ONLY).tobytes()
            found["partial"].append(Blob(part, sequence_headers(part, schema, partial=True)))
            file = self.folder / "source"
            ctx.state_seq_save_file(file, seq, tokens(5))
            skip = 12 + 4 * 5
            found["sequence file"].append(
                Blob(file.read_bytes(), [*range(skip), *(at + skip - 8 for at in headers[8:])])
            )
        if settings.n_seq_max > 1 and settings.kv_unified:  # one that fits only if the others were not there
            with context(settings.kind, flash_attn=settings.flash_attn, n_ctx=256, n_ubatch=64) as other:
                other.prefill(tokens(230, seed=4))
                data = other.state_seq_get_data(0).tobytes()
            found["sequence"] += [Blob(data, sequence_headers(data, schema, partial=False)[-8:])] * 2  # seldom damaged
        whole = self.whole.tobytes()
        headers = context_headers(whole, schema)
        found["whole"].append(Blob(whole, headers))
        ctx.state_save_file(file, tokens(5))
        found["context file"].append(Blob(file.read_bytes(), [*range(skip), *(at + skip for at in headers)]))
        file.unlink()
        return found

    def donors(self) -> Iterator[bytes]:
        """All that can be spliced in elsewhere."""
        return (blob.data for blobs in self.sources.values() for blob in blobs)


class Case(NamedTuple):
    """One attempt, so that it can be told and repeated."""

    path: str
    data: bytes
    dest: Any
    flags: Any
    how: str

    def describe(self) -> str:
        return f"{self.path}: {self.how} ({len(self.data)} bytes) into {self.dest!r}, flags {self.flags!r}"


def make_case(rng: random.Random, world: World, donors: list[bytes]) -> Case:
    """Draw one. A device state is taken here, for only the latest is good."""
    path = rng.choice(PATHS)
    n = world.ctx.n_seq_max
    flags: Any = {"partial": SeqFlags.PARTIAL_ONLY, "device": SeqFlags.ON_DEVICE}.get(path, SeqFlags.NONE)
    dest: Any = rng.randrange(n)
    if path == "device":
        flags |= rng.choice((SeqFlags.NONE, SeqFlags.PARTIAL_ONLY))
        seq = rng.randrange(n)
        try:
            data = world.ctx.state_seq_get_data(seq, flags).tobytes()
        except OnDeviceStateError:  # taken before in other cells, which llama.cpp might not survive
            flags, data = SeqFlags.NONE, world.before[seq]
        partial = bool(flags & SeqFlags.PARTIAL_ONLY) and world.ctx.schema.has_partial
        on_device = flags != SeqFlags.NONE
        source = Blob(data, sequence_headers(data, world.ctx.schema, partial=partial, on_device=on_device))
        dest = rng.choice((seq, dest))
        if on_device and rng.random() < 0.1:
            world.ctx.state_seq_get_data(seq, flags)
    else:
        source = rng.choice(world.sources[path])
    damaged, how = mutate(rng, source, donors) if rng.random() > 0.02 else (source.data, "nothing")
    if rng.random() < 0.02:
        dest = rng.choice(BAD_IDS)
    if rng.random() < 0.03:
        flags = rng.choice((*BAD_FLAGS, 0, 1, 2, 3))
    return Case(path, damaged, dest, flags, how)


def apply(world: World, case: Case, *, decode: bool = False) -> str:
    """Feed a case to the context and check what came of it; ``"accepted"``, or the class of the error.

    With ``decode``, one more token is decoded in every sequence after a success: whatever they hold, nothing aborts.

    Raises
    ------
    WrongError
        An error that changed something, a success that is not what the bytes say, or an error of another kind.
    """
    ctx = world.ctx
    try:
        _feed(world, case)
    except LlamaStateError as error:
        if world.held() != world.before:
            raise WrongError(f"{type(error).__name__} changed the context: {error}") from error
        return type(error).__name__
    except Exception as error:
        raise WrongError(f"{type(error).__name__} instead of an error of ours: {error}") from error
    try:
        _check_accepted(world, case)
        for seq in range(ctx.n_seq_max if decode else 0):
            with contextlib.suppress(LlamaStateError):
                ctx.decode([3], seq_id=seq)
    finally:
        ctx.state_set_data(world.whole)
    if world.held() != world.before:
        raise WrongError("the context could not be put back")
    return "accepted"


def _feed(world: World, case: Case) -> None:
    ctx = world.ctx
    if case.path == "whole":
        ctx.state_set_data(case.data)
    elif case.path.endswith("file"):
        file = world.folder / "damaged"
        file.unlink(missing_ok=True)  # another file, not the same one cut short: somebody may still have it mapped
        file.write_bytes(case.data)
        if case.path == "context file":
            ctx.state_load_file(file)
        else:
            ctx.state_seq_load_file(file, case.dest)
    else:
        ctx.state_seq_set_data(case.data, case.dest, case.flags)


def _check_accepted(world: World, case: Case) -> None:
    ctx, schema = world.ctx, world.ctx.schema
    now = world.held()
    if case.path in ("whole", "context file"):
        skip = 12 + 4 * int.from_bytes(case.data[8:12], "little") if case.path == "context file" else 0
        given = parse_context(case.data[skip:], schema)
        for seq in range(ctx.n_seq_max):
            _same(given.extract(seq), parse_sequence(now[seq], schema), f"sequence {seq}")
        return
    dest = int(case.dest)
    for seq, (was, is_now) in enumerate(zip(world.before, now, strict=True)):
        # llama.cpp may have used a cell again that has left another sequence's window; nothing else
        if seq != dest and was != is_now:
            _same(parse_sequence(was, schema), parse_sequence(is_now, schema), f"sequence {seq}, another one")
    if case.path == "sequence file":
        skip = 12 + 4 * int.from_bytes(case.data[8:12], "little")
        _same(parse_sequence(case.data[skip:], schema, header=False), parse_sequence(now[dest], schema), "the sequence")
        return
    partial = bool(int(case.flags) & SeqFlags.PARTIAL_ONLY) and schema.has_partial
    if int(case.flags) & SeqFlags.ON_DEVICE:
        source = int.from_bytes(case.data[4:8], "little")
        data = world.sources["partial"][source].data if partial else world.before[source]
    else:
        data = case.data
    found = ctx.state_seq_get_data(dest, SeqFlags.PARTIAL_ONLY).tobytes() if partial else now[dest]
    given = parse_sequence(data, schema, partial=partial)
    _same(given, parse_sequence(found, schema, partial=partial), "the sequence")


def _same(given: SequenceState, found: SequenceState, what: str) -> None:
    """What there is now is what was given, cell by cell; only window cells that no token will see may be gone."""
    for a, b in zip(given.parts, found.parts, strict=True):
        role = b.schema.name
        first, second = a.take(np.argsort(a.pos, kind="stable")), b.take(np.argsort(b.pos, kind="stable"))
        if role == "window":
            seen = first.pos >= given.schema.window_start(int(first.pos[-1]) + 1) if first.n_cells else slice(0)
            if not np.isin(first.pos[seen], second.pos).all():
                raise WrongError(f"{what}: positions {second.pos.tolist()} in its window, of {first.pos.tolist()}")
            first = first.take(np.flatnonzero(np.isin(first.pos, second.pos)))
        if not np.array_equal(first.pos, second.pos):
            raise WrongError(f"{what}: positions {second.pos.tolist()} in its {role} part, not {first.pos.tolist()}")
        names = [name for name in ("x", "y", "token") if name in first.cells.dtype.names]
        if any(not np.array_equal(first.cells[name], second.cells[name]) for name in names):
            raise WrongError(f"{what}: other 2-D positions or tokens in its {role} part")
        for i, (x, y) in enumerate(zip(first.tensors(), second.tensors(), strict=True)):
            if not np.array_equal(x, y):
                raise WrongError(f"{what}: other bytes in tensor {i} of its {role} part")


def check_world(world: World) -> None:
    """Every sequence still goes on as it did at the beginning."""
    found = world.next_logits()
    if nmse(found, world.expected) > 1e-5 or (found.argmax(-1) != world.expected.argmax(-1)).any():
        raise WrongError(f"the sequences go on differently: {nmse(found, world.expected)}")
    if world.held() != world.before:
        raise WrongError("decoding and putting back changed the context")
