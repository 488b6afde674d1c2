"""Saved sessions that are damaged, cut, of the future, or replaced while they are open."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from llamastate import Context, Sampler, Session, Snapshot, snapfile
from llamastate.cli import verify_file
from llamastate.errors import CorruptStateError, VersionMismatchError
from tests.helpers import assert_same_logits, context, tokens
from tests.snapshot import image

#: What a load does not need: damage there is found by whoever asks for it, and by ``llamastate verify``.
UNUSED = ("sampler", "metadata")


@pytest.fixture(scope="module")
def ctx() -> Iterator[Context]:
    with context("lfm2swa", n_seq_max=2, n_ctx=1024) as ctx:
        yield ctx


@pytest.fixture(scope="module")
def saved(ctx: Context, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A session with everything: automatic checkpoints, two of the caller's, one of them full."""
    path = tmp_path_factory.mktemp("session") / "good"
    session = Session(ctx, 0, checkpoint_every=32)
    session.feed(tokens(60))
    session.checkpoint("turn 1")
    session.feed(tokens(30, 1))
    session.checkpoint("turn 2", full=True)
    session.feed(tokens(5, 2))
    session.save(path, sampler=Sampler(ctx.model, temperature=0.5, seed=1), metadata={"user": "x"})
    return path.read_bytes()


def places(data: bytes) -> list[tuple[int, int, str]]:
    """Start, end and name of everything in a file."""
    sections = snapfile.read(memoryview(data), exact=True).sections.values()
    table = 64 + 48 * len(sections)
    found = [(0, 64, "header"), (64, table, "table")]
    found += [(s.offset, s.offset + s.length, snapfile.section_name(s)) for s in sections]
    found.sort()
    gaps = [(a[1], b[0], "padding") for a, b in pairwise(found) if a[1] < b[0]]
    return sorted(found + gaps)


def test_a_thousand_flipped_bits(ctx: Context, saved: bytes, tmp_path: Path) -> None:
    """Every one is found, its section is named, and what the sequence held is still there."""
    path = tmp_path / "chat.llsnap"
    chance = random.Random(7)
    spans = places(saved)
    ctx.seq_rm(1)
    ctx.prefill(tokens(20, 9), seq_id=1)
    before = ctx.state_seq_get_data(1)
    seen = set()
    for i in range(1000):
        # half of them anywhere, half in a section that is drawn first: small ones have their turn too
        start, end, _ = chance.choice(spans) if i % 2 else (0, len(saved), "")
        at = chance.randrange(start, end)
        name = next(name for a, b, name in spans if a <= at < b)
        seen.add(name)
        bad = bytearray(saved)
        bad[at] ^= 1 << chance.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(CorruptStateError) as caught:
            verify_file(str(path))
        assert (caught.value.section, caught.value.path) == (name, str(path))
        if name not in UNUSED:
            with pytest.raises(CorruptStateError) as caught:
                Session.load(ctx, path, seq_id=1)
            assert (caught.value.section, caught.value.path) == (name, str(path))
    assert seen == {name for _, _, name in spans}
    np.testing.assert_array_equal(ctx.state_seq_get_data(1), before)


def test_truncation(ctx: Context, saved: bytes, tmp_path: Path) -> None:
    """At every boundary, one byte before and one behind it."""
    path = tmp_path / "chat.llsnap"
    ctx.seq_rm(1)
    cuts = {edge + d for start, end, _ in places(saved) for edge in (start, end) for d in (-1, 0, 1)}
    for n in sorted(n for n in cuts if 0 <= n < len(saved)):
        path.write_bytes(saved[:n])
        with pytest.raises(CorruptStateError) as caught:
            Session.load(ctx, path, seq_id=1)
        assert caught.value.section in ("header", "table", "end")
        assert caught.value.offset == n
    path.write_bytes(saved + b"\0")
    with pytest.raises(CorruptStateError):
        Session.load(ctx, path, seq_id=1)
    assert ctx.seq_pos_max(1) == -1


def test_a_future_version(ctx: Context, saved: bytes, tmp_path: Path) -> None:
    future = bytearray(saved)
    struct.pack_into("<I", future, 8, snapfile.VERSION + 1)
    (tmp_path / "chat.llsnap").write_bytes(image.reseal(future))
    ctx.seq_rm(1)
    with pytest.raises(VersionMismatchError) as caught:
        Session.load(ctx, tmp_path / "chat.llsnap", seq_id=1)
    assert (caught.value.expected, caught.value.found) == (snapfile.VERSION, snapfile.VERSION + 1)
    assert ctx.seq_pos_max(1) == -1


def test_replaced_while_mapped(ctx: Context, saved: bytes, tmp_path: Path) -> None:
    """Who has opened a file has it as it was; sessions from it need it no more."""
    path = tmp_path / "chat.llsnap"
    path.write_bytes(saved)
    ctx.seq_rm(1)
    with Snapshot.open(path) as opened:
        other = Session(ctx, 1)
        other.feed(tokens(10, 5))
        other.save(path)
        ctx.seq_rm(1)
        session = Session.from_snapshot(ctx, opened, seq_id=1)
    path.unlink()
    assert session.n_past == 95
    assert session.rollback("turn 1") == 0
    with context("lfm2swa", n_ctx=1024) as fresh:
        fresh.prefill(tokens(60))
        assert_same_logits(session.logits, fresh.logits())
