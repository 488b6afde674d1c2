"""A reader that survives any bytes, and says which section is damaged."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest

from llamastate import (
    BadMagicError,
    Context,
    CorruptStateError,
    FileAccessError,
    LlamaStateError,
    LoadError,
    Snapshot,
    StateFileNotFoundError,
    VersionMismatchError,
    snapfile,
)
from llamastate.snapfile import Kind
from tests.helpers import context, tokens
from tests.snapshot import image

IDS = tokens(90, seed=9)


def read_all(snapshot: Snapshot) -> None:
    """Use every section."""
    snapshot.fingerprint  # noqa: B018
    snapshot.tokens  # noqa: B018
    snapshot.state  # noqa: B018
    snapshot.logits  # noqa: B018
    snapshot.sampler_state  # noqa: B018
    snapshot.metadata  # noqa: B018
    list(snapshot.checkpoints)


def sections_of(data: bytes) -> list[snapfile.Section]:
    return list(snapfile.read(memoryview(data), exact=True).sections.values())


def name_at(data: bytes, offset: int) -> str:
    """What lies at an offset."""
    sections = sections_of(data)
    if offset < 64:
        return "header"
    if offset < 64 + 48 * len(sections):
        return "table"
    inside = [s for s in sections if s.offset <= offset < s.offset + s.length]
    return snapfile.section_name(inside[0]) if inside else "padding"


def test_every_section_is_read():
    snapshot = Snapshot.from_buffer(image.build(image.full()))
    assert snapshot.fingerprint == image.FINGERPRINT
    np.testing.assert_array_equal(snapshot.tokens, image.TOKENS)
    np.testing.assert_array_equal(snapshot.state, image.STATE)
    np.testing.assert_array_equal(snapshot.logits, image.LOGITS)
    assert snapshot.metadata == {"title": "ünïcode"}
    assert [(c.n_tokens, c.label, c.created, c.flags) for c in snapshot.checkpoints] == [
        (3, "first", 1700000000000000000, 2),
        (7, None, 0.5, 1),
    ]
    np.testing.assert_array_equal(snapshot.checkpoints[1].state, image.STATE[:33])
    assert snapshot.checkpoints[1].logits is None


def test_a_thousand_flipped_bits(tmp_path: Path):
    """Each is found at the latest when its section is used, and the section is named."""
    chance = random.Random(1)
    good = bytes(image.build(image.full()))
    path = tmp_path / "s"
    # the header and the table are a small part of the file: half of the bits for them
    n_head = 64 + 48 * len(sections_of(good))
    places = [chance.randrange(n_head) if i % 2 else chance.randrange(len(good)) for i in range(1000)]
    for at in places:
        bad = bytearray(good)
        bad[at] ^= 1 << chance.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(CorruptStateError) as caught:
            read_all(Snapshot.open(path))
        assert caught.value.section == name_at(good, at)
        assert caught.value.path == str(path)


def test_flipped_bits_in_a_real_snapshot(filled: Context):
    """Nothing that is damaged reaches the context: what the sequence held is still there."""
    chance = random.Random(2)
    good = bytes(memoryview(Snapshot.take(filled, 0, IDS)))
    filled.prefill(tokens(30), seq_id=1)
    before = filled.state_seq_get_data(1)
    for _ in range(300):
        bad = bytearray(good)
        bad[at := chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        with pytest.raises(CorruptStateError) as caught:
            Snapshot.from_buffer(bad).restore(filled, 1)
        assert caught.value.section == name_at(good, at)
    np.testing.assert_array_equal(filled.state_seq_get_data(1), before)


def test_damage_in_a_large_state(monkeypatch: pytest.MonkeyPatch):
    """Large states are verified while they are being restored; damage is taken back before anybody sees it."""
    monkeypatch.setattr("llamastate.snapimage.OVERLAP", 1000)
    with context("dense", n_seq_max=2) as ctx:
        ctx.prefill(IDS)
        data = bytearray(memoryview(Snapshot.take(ctx, 0, IDS)))
        data[-3] ^= 1
        state = ctx.state_seq_get_data(0)
        snapshot = Snapshot.from_buffer(data)
        for _ in range(2):
            with pytest.raises(CorruptStateError) as caught:
                snapshot.restore(ctx, 1)
            assert caught.value.section == "state"
            assert ctx.seq_pos_max(1) == -1
        with pytest.raises(CorruptStateError):
            snapshot.restore(ctx, 0)  # not empty: verified first
        np.testing.assert_array_equal(ctx.state_seq_get_data(0), state)
        at = snapshot._sections[Kind.STATE, 0].offset + 20
        data[-3] ^= 1
        data[at] ^= 1  # what validation refuses is called damage if it is
        with pytest.raises(CorruptStateError, match="checksum"):
            Snapshot.from_buffer(data).restore(ctx, 1)
        data[at] ^= 1
        good = Snapshot.from_buffer(data)
        assert good.restore(ctx, 1) == 90
        assert good.restore(ctx, 1) == 90
        # behind the cells, which name their sequence
        np.testing.assert_array_equal(good.state[2000:], ctx.state_seq_get_data(1)[2000:])


def test_truncation(tmp_path: Path):
    """At every boundary between sections, one byte before it and one behind it; and at every byte of the head."""
    good = bytes(image.build(image.full()))
    ends = {s.offset for s in sections_of(good)} | {s.offset + s.length for s in sections_of(good)}
    places = set(range(64 + 48 * len(ends))) | {end + d for end in ends for d in (-1, 0, 1)}
    for n in sorted(n for n in places if n < len(good)):
        (tmp_path / "s").write_bytes(good[:n])
        with pytest.raises(CorruptStateError) as caught:
            Snapshot.open(tmp_path / "s")
        assert caught.value.section in ("header", "table", "end")
        assert caught.value.offset == n
    for mmap in (True, False):
        (tmp_path / "s").write_bytes(good + b"\0")
        with pytest.raises(CorruptStateError) as caught:
            Snapshot.open(tmp_path / "s", mmap=mmap)
        assert (caught.value.section, caught.value.offset) == ("end", len(good))
    read_all(Snapshot.from_buffer(good + bytes(4096)))  # memory comes in pages


def test_random_bytes():
    chance = np.random.default_rng(3)
    head = bytes(image.build(image.full())[:64])
    for i in range(3000):
        data = chance.bytes(int(chance.integers(0, 2000)))
        with pytest.raises((BadMagicError, CorruptStateError)):
            read_all(Snapshot.from_buffer(head[: i % 65] + data))


def test_random_tables():
    """With checksums that are right: lengths, places and kinds out of all bounds give typed errors."""
    chance = random.Random(4)
    good = image.build(image.full())
    values = (0, 1, 63, 64, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
    opened = 0
    for _ in range(3000):
        bad = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            at = chance.choice((8, 12, 16, 24)) if chance.random() < 0.2 else 64 + 4 * chance.randrange(120)
            value = chance.choice(values) if chance.random() < 0.7 else chance.randrange(len(good))
            bad[at : at + 4] = (value & 0xFFFFFFFF).to_bytes(4, "little")
            if value > 2**32:
                bad[at : at + 8] = value.to_bytes(8, "little")
        try:
            read_all(Snapshot.from_buffer(image.reseal(bad)))
            opened += 1
        except LoadError:
            pass
    assert opened < 1500


def test_a_future_version(tmp_path: Path):
    future = image.build(image.full())
    struct.pack_into("<I", future, 8, 2)
    (tmp_path / "s").write_bytes(image.reseal(future))
    with pytest.raises(VersionMismatchError) as caught:
        Snapshot.open(tmp_path / "s")
    assert (caught.value.expected, caught.value.found, caught.value.path) == (1, 2, str(tmp_path / "s"))
    future = image.build(image.full())
    struct.pack_into("<Q", future, 24, snapfile.SEALED | 8)
    with pytest.raises(VersionMismatchError) as caught:
        Snapshot.from_buffer(image.reseal(future))
    assert caught.value.found == 9


def test_sections_of_the_future():
    items = image.full()
    optional = image.build([*items[:2], (77, 5, b"something new"), *items[2:]])
    read_all(Snapshot.from_buffer(optional))
    assert bytes(memoryview(Snapshot.from_buffer(optional))) == optional  # kept
    table = 64 + 48 * 2
    struct.pack_into("<I", optional, table + 4, snapfile.REQUIRED)
    with pytest.raises(VersionMismatchError) as caught:
        Snapshot.from_buffer(image.reseal(optional))
    assert caught.value.found == 77


def test_a_fingerprint_of_the_future():
    text = image.FINGERPRINT.json.replace(b'"version":1', b'"version":2,"more":[]')
    snapshot = Snapshot.from_buffer(image.build([(Kind.FINGERPRINT, 0, text), *image.minimal()[1:]]))
    with pytest.raises(VersionMismatchError) as caught:
        snapshot.fingerprint  # noqa: B018
    assert (caught.value.expected, caught.value.found) == (1, 2)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b'"x"',
        b"{}",
        b'{"version":0}',
        b'{"version":true}',
        b"[" * 100000,
        b"\xff\xfe",
        b"1" * 10000,
        image.FINGERPRINT.json.replace(b'"llama"', b"5"),
        image.FINGERPRINT.json.replace(b'"n_streams":1', b'"n_streams":true'),
        image.FINGERPRINT.json.replace(b'"n_streams":1,', b""),
        image.FINGERPRINT.json.replace(b",0.5]", b"]"),
    ],
)
def test_fingerprints_that_are_none(text: bytes):
    snapshot = Snapshot.from_buffer(image.build([(Kind.FINGERPRINT, 0, text), *image.minimal()[1:]]))
    with pytest.raises(CorruptStateError) as caught:
        snapshot.fingerprint  # noqa: B018
    assert caught.value.section == "fingerprint"


@pytest.mark.parametrize(
    "rows", [b"{}", b"[1]", b'[{"n_tokens":1}]', b'[{"n_tokens":-1,"label":null,"created":0,"flags":0}]', b"[[[["]
)
def test_checkpoints_that_are_none(rows: bytes):
    snapshot = Snapshot.from_buffer(image.build([*image.minimal(), (Kind.CHECKPOINTS, 0, rows)]))
    with pytest.raises(CorruptStateError) as caught:
        list(snapshot.checkpoints)
    assert caught.value.section == "checkpoints"


def test_lengths_that_are_no_arrays():
    snapshot = Snapshot.from_buffer(
        image.build([image.minimal()[0], (Kind.TOKENS, 0, b"12345"), image.minimal()[2], (Kind.LOGITS, 0, b"123")])
    )
    for use, section in ((lambda: snapshot.tokens, "tokens"), (lambda: snapshot.logits, "logits")):
        with pytest.raises(CorruptStateError) as caught:
            use()
        assert caught.value.section == section


def test_what_must_be_there():
    for left_out in range(3):
        items = image.minimal()
        del items[left_out]
        with pytest.raises(CorruptStateError, match="there is no"):
            Snapshot.from_buffer(image.build(items))
    with pytest.raises(CorruptStateError, match="twice"):
        Snapshot.from_buffer(image.build([*image.minimal(), image.minimal()[1]]))


def test_memory_that_was_never_sealed(filled: Context):
    out = bytearray(1 << 20)
    snapshot = Snapshot.take(filled, 0, IDS, out=out)
    with pytest.raises(CorruptStateError, match="sealed"):
        Snapshot.from_buffer(out)
    snapshot.seal()
    assert Snapshot.from_buffer(out).restore(filled, 1) == 90


def test_without_verification(filled: Context):
    """Tensor bytes are believed then, and nothing else."""
    data = bytearray(memoryview(Snapshot.take(filled, 0, IDS)))
    data[-1] ^= 1
    assert Snapshot.from_buffer(data, verify=False).restore(filled, 1) == 90
    at = Snapshot.from_buffer(data)._sections[Kind.STATE, 0].offset
    data[at + 16] ^= 1
    before = filled.state_seq_get_data(1)
    with pytest.raises(CorruptStateError) as caught:
        Snapshot.from_buffer(data, verify=False).restore(filled, 1)
    assert caught.value.section == "state"
    np.testing.assert_array_equal(filled.state_seq_get_data(1), before)


def test_tokens_of_another_length(filled: Context):
    """Sound sections that do not belong together."""
    snapshot = Snapshot.take(filled, 0, IDS)
    for n in (0, 89, 91):
        other = [
            (Kind.FINGERPRINT, 0, snapshot.fingerprint.json),
            (Kind.TOKENS, 0, np.zeros(n, np.int32)),
            (Kind.STATE, 0, snapshot.state),
        ]
        with pytest.raises(CorruptStateError):
            Snapshot.from_buffer(image.build(other)).restore(filled, 1)
        assert filled.seq_pos_max(1) == -1


def test_a_partial_state_is_no_snapshot(filled: Context):
    snapshot = Snapshot.take(filled, 0, IDS)
    items = [
        (Kind.FINGERPRINT, 0, snapshot.fingerprint.json),
        (Kind.TOKENS, 0, IDS),
        (Kind.STATE, 1, snapshot.state),
    ]
    with pytest.raises(LlamaStateError, match="partial"):
        Snapshot.from_buffer(image.build(items)).restore(filled, 1)


def test_paths(tmp_path: Path):
    with pytest.raises(StateFileNotFoundError):
        Snapshot.open(tmp_path / "none")
    for path in (tmp_path, "/dev/null", "a\0b", 5, None):
        with pytest.raises(FileAccessError):
            Snapshot.open(path)
    (tmp_path / "empty").touch()
    for mmap in (True, False):
        with pytest.raises(CorruptStateError):
            Snapshot.open(tmp_path / "empty", mmap=mmap)
