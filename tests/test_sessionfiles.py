"""Sessions from and to the files of llama.cpp, checked against llama.cpp's own functions."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from llamastate import Session, layout
from llamastate.errors import (
    BadMagicError,
    CorruptStateError,
    InvalidArgumentError,
    LoadError,
    MediaTokensError,
    SaveError,
    StateFileNotFoundError,
    TokensMismatchError,
    VersionMismatchError,
)
from llamastate.sessionfiles import FORMATS, pack_tokens, unpack_tokens
from tests import raw
from tests.helpers import KINDS, assert_same_logits, context, greedy, tokens
from tests.test_files import file_size_limit

IDS = tokens(70, seed=1)


def written_there(name: str, path: Path, form: str) -> np.ndarray:
    """A file of llama.cpp's own making; and how it goes on from there."""
    with context(name) as ctx:
        ctx.prefill(IDS)
        if form == "ggsn":
            raw.save_file(ctx, path, IDS)
        else:
            raw.seq_save_file(ctx, path, 0, pack_tokens(IDS) if form == "ggsq-packed" else IDS)
        return greedy(ctx, 4)[1]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", KINDS)
def test_import(name: str, form: str, tmp_path: Path) -> None:
    expected = written_there(name, tmp_path / "file", form)
    with context(name, n_seq_max=2) as ctx:
        ctx.prefill(tokens(30, 5), seq_id=0)
        before = ctx.state_seq_get_data(0)
        session = Session.import_file(ctx, tmp_path / "file", seq_id=1)
        assert session.tokens.tolist() == IDS.tolist()
        rows = []
        for _ in range(4):
            session.generate(1)
            rows.append(session.logits)
        assert_same_logits(np.array(rows), expected)
        np.testing.assert_array_equal(ctx.state_seq_get_data(0)[8:], before[8:])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", KINDS)
def test_export(name: str, form: str, tmp_path: Path) -> None:
    """llama.cpp reads what a session wrote that was not alone in its context."""
    path = tmp_path / "file"
    with context(name, n_seq_max=2) as ctx:
        ctx.prefill(tokens(30, 5), seq_id=0)
        session = Session(ctx, 1)
        session.feed(IDS)
        assert session.export_file(path, format=form) == path.stat().st_size
        token = int(session.logits.argmax())
        session.feed([token])
        expected = session.logits
    with context(name) as ctx:
        if form == "ggsn":
            assert raw.load_file(ctx, path) == IDS.tolist()
        else:
            found = raw.seq_load_file(ctx, path, 0)[0]
            assert found == (pack_tokens(IDS) if form == "ggsq-packed" else IDS).tolist()
        ctx.decode([token])
        assert_same_logits(ctx.logits(), expected)
        assert Session.import_file(ctx, path).tokens.tolist() == IDS.tolist()


@pytest.mark.parametrize("name", ["dense", "mamba", "jamba"])
def test_the_same_bytes(name: str, tmp_path: Path) -> None:
    with context(name) as ctx:
        session = Session(ctx)
        session.feed(IDS)
        for form, write in (
            ("ggsq", lambda p: raw.seq_save_file(ctx, p, 0, IDS)),
            ("ggsn", lambda p: raw.save_file(ctx, p, IDS)),
        ):
            session.export_file(tmp_path / "ours", format=form)
            assert write(tmp_path / "theirs")
            assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", KINDS)
def test_nothing(name: str, form: str, tmp_path: Path) -> None:
    """An empty session makes the other empty."""
    with context(name, n_seq_max=2) as ctx:
        Session(ctx, 0).export_file(tmp_path / "file", format=form)
        ctx.prefill(IDS, seq_id=1)
        assert Session.import_file(ctx, tmp_path / "file", seq_id=1).n_past == 0
        assert ctx.seq_pos_max(1) == -1


# --- the packed payload -----------------------------------------------------------------------------------------------


def packed(n: int, ids: list[int], media: list[bytes] | None = None, version: int = 1, tail: bytes = b"") -> np.ndarray:
    """As ``server_tokens::serialize`` writes it."""
    media = media or []
    data = struct.pack(f"<iII{len(ids)}iI", -1, version, n, *ids, len(media)) + struct.pack(
        f"<{len(media)}I", *range(len(media))
    )
    data += b"".join(struct.pack("<I", len(chunk)) + chunk for chunk in media) + tail
    return np.frombuffer(data + bytes(-len(data) % 4), np.int32)


def test_packed_payload() -> None:
    np.testing.assert_array_equal(pack_tokens(IDS), packed(len(IDS), IDS.tolist()))
    for ids in ([], [0], IDS.tolist()):
        assert unpack_tokens(pack_tokens(ids)).tolist() == ids
        assert unpack_tokens(ids).tolist() == ids


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        ([-1], CorruptStateError),
        ([-1, 1], CorruptStateError),
        ([-1, 1, 0], CorruptStateError),
        (packed(3, [1, 2]), CorruptStateError),
        (packed(2**32 - 1, [1, 2]), CorruptStateError),
        (packed(1, [1, 2]), CorruptStateError),
        (packed(2, [1, 2], tail=bytes(4)), CorruptStateError),
        (packed(2, [1, 2], version=2), VersionMismatchError),
        (packed(2, [1, -1], media=[b"image"]), MediaTokensError),
        (packed(2, [1, -1], media=[b"image", b"x"]), MediaTokensError),
        (packed(2, [1, -1], media=[b"image"])[:-1], CorruptStateError),
        (packed(2, [1, -1], media=[b"image"], tail=bytes(8)), CorruptStateError),
        (packed(2, [1, 256]), CorruptStateError),
        (packed(2, [1, -1]), CorruptStateError),
        ([1, -1], CorruptStateError),
    ],
)
def test_payloads_that_cannot_be_used(payload: list[int], error: type[Exception], tmp_path: Path) -> None:
    path = tmp_path / "file"
    with context("dense") as ctx:
        ctx.decode([1, 2])
        raw.seq_save_file(ctx, path, 0, np.array(payload, np.int32))
        ctx.decode([3])
        with pytest.raises(error) as caught:
            Session.import_file(ctx, path)
        assert caught.value.path == str(path)
        if isinstance(caught.value, MediaTokensError):
            assert caught.value.n_chunks
        assert ctx.seq_pos_max(0) == 2


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("n", [0, 68, 69, 71])
def test_tokens_must_be_those_of_the_state(n: int, form: str, tmp_path: Path) -> None:
    ids = tokens(n, seed=1)
    with context("iswa") as ctx:
        ctx.prefill(IDS)
        if form == "ggsn":
            raw.save_file(ctx, tmp_path / "file", ids)
        else:
            raw.seq_save_file(ctx, tmp_path / "file", 0, pack_tokens(ids) if form == "ggsq-packed" else ids)
        with pytest.raises(TokensMismatchError) as caught:
            Session.import_file(ctx, tmp_path / "file")
        assert (caught.value.n_tokens, caught.value.pos_max) == (n, 69)
        assert ctx.seq_pos_max(0) == 69


def test_a_context_of_several_sequences(tmp_path: Path) -> None:
    with context("dense", n_seq_max=2) as ctx:
        for seq_id in range(2):
            ctx.decode([1, 2], seq_id=seq_id)
        raw.save_file(ctx, tmp_path / "file", np.array([1, 2], np.int32))
        with pytest.raises(LoadError, match="2 sequences"):
            Session.import_file(ctx, tmp_path / "file")


@pytest.mark.parametrize("form", FORMATS)
def test_damage(form: str, tmp_path: Path) -> None:
    """Whatever is cut off, the sequence stays as it is."""
    path = tmp_path / "file"
    written_there("iswa", path, form)
    data = path.read_bytes()
    with context("iswa") as ctx:
        ctx.decode([1, 2])
        before = ctx.state_get_data()
        for end in [*range(0, 400, 7), len(data) // 2, len(data) - 1]:
            path.write_bytes(data[:end])
            with pytest.raises((LoadError, TokensMismatchError)):
                Session.import_file(ctx, path)
        path.write_bytes(b"GGUF" + data[4:])
        with pytest.raises(BadMagicError):
            Session.import_file(ctx, path)
        with pytest.raises(StateFileNotFoundError):
            Session.import_file(ctx, tmp_path / "none")
        np.testing.assert_array_equal(ctx.state_get_data(), before)


def test_export_that_fails(tmp_path: Path) -> None:
    with context("dense") as ctx:
        session = Session(ctx)
        session.feed(IDS)
        session.export_file(tmp_path / "file")
        old = (tmp_path / "file").read_bytes()
        for form in FORMATS:
            with file_size_limit(1000), pytest.raises(SaveError):
                session.export_file(tmp_path / "file", format=form)
        with pytest.raises(InvalidArgumentError):
            session.export_file(tmp_path / "file", format="gguf")
        assert (tmp_path / "file").read_bytes() == old
        assert layout.read_header(old).tokens.tolist() == IDS.tolist()
