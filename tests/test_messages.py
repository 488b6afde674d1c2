"""What errors say to somebody who has mixed things up: what was given, what belongs there, and never megabytes."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamastate import (
    Context,
    LlamaStateError,
    Model,
    NoKVSlotError,
    Sampler,
    SamplerError,
    SamplingParams,
    Session,
    SessionManager,
    Snapshot,
    __version__,
)
from llamastate.cli import main
from llamastate.words import brief
from tests import tiny
from tests.helpers import context, tokens

LONG = 3_000_000
IDS = tokens(8)


@pytest.fixture(scope="module")
def ctx() -> Iterator[Context]:
    with context("dense", n_seq_max=2) as ctx:
        ctx.decode(IDS)
        yield ctx


@pytest.fixture(scope="module")
def chat() -> Iterator[Model]:
    with Model(tiny.path("chat", vocab="spm")) as model:
        yield model


def said(action: Callable[[], Any], error: type[LlamaStateError] = LlamaStateError) -> str:
    """What the error says that this raises."""
    with pytest.raises(error) as caught:
        action()
    assert len(str(caught.value)) < 500
    return str(caught.value)


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5, "5"),
        ("root", "'root'"),
        (10**5000, "an integer of 16610 bits"),
        (["a", "b"], "['a', 'b']"),
    ],
    ids=["number", "text", "huge number", "list"],
)
def test_brief(value: object, text: str) -> None:
    assert brief(value) == text


@pytest.mark.parametrize(
    "value", ["x" * LONG, bytearray(LONG), ["x" * 1000] * 1000, Unprintable()], ids=["str", "bytearray", "list", "bad"]
)
def test_brief_is_brief(value: object) -> None:
    assert 0 < len(brief(value)) < 150


@pytest.mark.parametrize(
    "value",
    [bytearray(LONG), "x" * LONG, [0] * LONG, 10**5000, Unprintable()],
    ids=["bytearray", "str", "list", "int", "bad"],
)
def test_messages_are_short(value: Any, ctx: Context) -> None:
    """Whatever was put in the wrong place."""
    for action in (
        lambda: ctx.state_seq_get_data_into(0, value),
        lambda: ctx.state_seq_get_data(value),
        lambda: ctx.state_seq_get_data(0, value),
        lambda: ctx.seq_pos_max(value),
        lambda: ctx.seq_rm(0, value, -1),
        lambda: ctx.decode(IDS, seq_id=value),
        lambda: Context(ctx.model, n_ctx=value),
        lambda: Context(ctx.model, flash_attn=value),
        lambda: Context(ctx.model, rope_freq_base=value),
        lambda: Sampler(ctx.model, temperature=value),
        lambda: Sampler(ctx.model, logit_bias={1: value}),
        lambda: ctx.decode([1], logits=value),
        lambda: ctx.logits(value),
    ):
        said(action)


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (lambda ctx: ctx.state_seq_get_data_into(0, bytearray(9)), "seq_id is bytearray, not an integer"),
        (lambda ctx: ctx.seq_rm("0"), "seq_id is str, not an integer"),
        (lambda ctx: ctx.seq_pos_max(300), "sequence id 300 is not in [0, 2): the context was made with n_seq_max = 2"),
    ],
)
def test_sequence_ids(action: Callable[[Context], Any], text: str, ctx: Context) -> None:
    assert said(lambda: action(ctx)) == text


@pytest.mark.parametrize(
    "action",
    [
        lambda ctx, text: ctx.prefill(text),
        lambda ctx, text: ctx.decode(text),
        lambda ctx, text: ctx.model.detokenize(text),
        lambda ctx, text: Snapshot.take(ctx, 0, text),
        lambda ctx, text: ctx.state_seq_save_file("nowhere", 0, text),
        lambda ctx, text: ctx.state_save_file("nowhere", text),
        lambda ctx, text: Session(ctx, tokens=text),
    ],
)
@pytest.mark.parametrize("text", ["Once upon", b"Once upon"])
def test_text_where_tokens_belong(action: Callable[[Context, Any], Any], text: str | bytes, ctx: Context) -> None:
    kind = type(text).__name__
    assert f"tokens is {kind}, not token ids: use model.tokenize(text)" in said(lambda: action(ctx, text))
    assert not os.path.exists("nowhere")


# --- kinds of files and states --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(ctx: Context, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    found = {name: folder / name for name in ("ggsn", "ggsq", "llsnap", "sequence", "context", "text")}
    ctx.state_save_file(found["ggsn"], IDS)
    ctx.state_seq_save_file(found["ggsq"], 0, IDS)
    Snapshot.take(ctx, 0, IDS).save(found["llsnap"])
    found["sequence"].write_bytes(ctx.state_seq_get_data(0))
    found["context"].write_bytes(ctx.state_get_data())
    found["text"].write_text("import sys\n" * 20)
    return {**found, "gguf": tiny.path("dense")}


USES: dict[str, Callable[[Context, Path], Any]] = {
    "ggsn": lambda ctx, path: ctx.state_load_file(path),
    "ggsq": lambda ctx, path: ctx.state_seq_load_file(path, 1),
    "llsnap": lambda ctx, path: Snapshot.open(path),
    "sequence": lambda ctx, path: ctx.state_seq_set_data(path.read_bytes(), 1),
    "context": lambda ctx, path: ctx.state_set_data(path.read_bytes()),
}
THIS_IS = {
    "ggsn": "this is a GGSN (a whole context): use Context.state_load_file or Session.import_file",
    "ggsq": "this is a GGSQ (one sequence): use Context.state_seq_load_file or Session.import_file",
    "llsnap": "this is a snapshot: use Snapshot.open or Session.load",
    "sequence": "this is the state of one sequence: use state_seq_set_data",
    "context": "this is the state of a whole context: use state_set_data",
    "gguf": "this is a GGUF (a model), not a state",
}


@pytest.mark.parametrize("given", THIS_IS)
@pytest.mark.parametrize("use", USES)
def test_the_wrong_kind_of_file(use: str, given: str, ctx: Context, files: dict[str, Path]) -> None:
    if use == given:
        return
    text = said(lambda: USES[use](ctx, files[given]))
    if (use, given) != ("llsnap", "context"):  # of which the first eight bytes say too little
        assert THIS_IS[given] in text


def test_the_right_kind_of_file(ctx: Context, files: dict[str, Path]) -> None:
    for name, use in USES.items():
        use(ctx, files[name])
    ctx.seq_rm(1)


@pytest.mark.parametrize("command", ["inspect", "verify"])
@pytest.mark.parametrize(
    ("name", "text"),
    [("text", "is neither .llsnap, GGSN nor GGSQ"), ("gguf", "is a GGUF (a model), not a saved state")],
)
def test_the_command_line_names_what_is_no_state(
    command: str, name: str, text: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(files[name])]) == 1
    assert f"{files[name]} {text}" in "".join(capsys.readouterr())


def test_the_command_line_names_a_damaged_file(
    tmp_path: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ggsq", "llsnap"):
        path = tmp_path / name
        path.write_bytes(files[name].read_bytes()[:100])
        assert main(["inspect", str(path)]) == 1
        assert capsys.readouterr().err.startswith(f"llamastate: {path}: ")


# --- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("taken", "here"), [("on", "off"), ("off", "on")])
def test_flash_attention_is_called_by_its_name(taken: str, here: str) -> None:
    with context("dense", flash_attn=taken) as source, context("dense", flash_attn=here) as target:
        source.decode(IDS)
        blob = source.state_seq_get_data(0)
        assert f"taken with flash attention {taken}, this context has it {here}" in said(
            lambda: target.state_seq_set_data(blob, 0)
        )


def test_types_are_called_by_their_names() -> None:
    with context("dense") as source, context("dense", type_k="q8_0") as target:
        source.decode(IDS)
        blob = source.state_seq_get_data(0)
        assert "K of layer 0 is f16, this context has q8_0" in said(lambda: target.state_seq_set_data(blob, 0))


# --- samplers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("root ::= *", "expecting preceding item to */+/?/{ at"),
        ('root ::= "a', "unexpected end of input"),
        ("root ::= nothing", "Undefined rule identifier 'nothing'"),
        ("root = 'a'", "expecting ::= at = 'a'"),
        ('other ::= "a"', "grammar does not contain a 'root' symbol"),
        ('root ::= "a" ) ' + "x " * 90_000, "expecting newline or end at ) x x"),
    ],
    ids=["star", "end", "undefined", "equals", "root", "long"],
)
def test_what_is_wrong_with_a_grammar(
    grammar: str, reason: str, chat: Model, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the error, and nowhere else."""
    text = said(lambda: Sampler(chat, grammar=grammar), SamplerError)
    assert reason in text
    assert capfd.readouterr().err == ""
    os.write(2, b"still there")
    assert capfd.readouterr().err == "still there"


def test_logits_that_are_not_there() -> None:
    with context("dense") as ctx:
        assert "nothing has been decoded" in said(ctx.logits)
        ctx.decode(IDS)
        ctx.state_seq_set_data(ctx.state_seq_get_data(0), 0)
        assert "decode the last token again" in said(ctx.logits)
    assert said(lambda: ctx.seq_rm(0)) == "the context is closed"


# --- sessions -------------------------------------------------------------------------------------------------------


def test_things_that_belong_elsewhere(ctx: Context, tmp_path: Path) -> None:
    """No attribute error, whatever was taken for something else."""
    snapshot = Snapshot.take(ctx, 0, IDS)
    session = Session(ctx, tokens=IDS)
    manager = SessionManager(tmp_path)
    for action, text in (
        (lambda: Session(ctx.model), "ctx is Model, not a Context"),
        (lambda: Session("x"), "ctx is str, not a Context"),
        (lambda: Session.load(ctx.model, tmp_path / "x"), "cannot read"),
        (lambda: Session.from_snapshot("x", snapshot), "ctx is str, not a Context"),
        (lambda: Session.import_file("x", tmp_path / "x"), "ctx is str, not a Context"),
        (lambda: snapshot.restore(1, ctx), "ctx is int, not a Context"),
        (lambda: Snapshot.take(0, ctx, IDS), "ctx is int, not a Context"),
        (lambda: session.generate(8, sampler=0.8), "sampler is float, neither a Sampler nor SamplingParams"),
        (lambda: manager.save("alice", "x"), "session is str, not a Session"),
        (lambda: SessionManager(None), "folder is NoneType, not a path"),
        (lambda: session.checkpoint(5), "label is int, not str"),
        (lambda: session.rollback([]), "target is list, neither a Checkpoint, a label nor a number of tokens"),
        (lambda: session.rollback("a"), "no checkpoint is labelled 'a'"),
        (session.undo, "there are no checkpoints to go back to; call checkpoint() first"),
        (lambda: Session(ctx), "; give tokens=, another seq_id, or ctx.seq_rm(0) first"),
        (lambda: Snapshot.take(ctx, 1, IDS), "the sequence is empty"),
    ):
        assert text in said(action)


def test_parameters_serve_as_a_sampler(chat: Model) -> None:
    with context(chat) as ctx:
        texts = []
        for sampler in (SamplingParams(temperature=0.8, seed=3), Sampler(chat, temperature=0.8, seed=3)):
            session = Session(ctx)
            session.feed(b"Once upon")  # bytes are text in UTF-8
            texts += [session.generate(6, sampler=sampler)]
            ctx.seq_rm(0)
            session = Session(ctx)
            session.feed("Once upon")
            texts += ["".join(session.generate(6, sampler=SamplingParams(temperature=0.8, seed=3), stream=True))]
            ctx.seq_rm(0)
        assert len({str(text) for text in texts}) == 1


@pytest.mark.parametrize("kind", ["dense", "iswa", "jamba"])
def test_a_full_context_ends_generation(kind: str) -> None:
    """With what has been generated; only a context that has no room at all is an error."""
    with context(kind, n_ctx=256) as ctx:
        session = Session(ctx)
        session.feed(tokens(250))
        done = session.generate(20)
        assert (done.finish_reason, len(done.tokens)) == ("full", 6)
        assert tuple(session.tokens[250:]) == done.tokens
        with pytest.raises(NoKVSlotError) as caught:
            session.generate(1)
        expected = "the context is full: 256 of n_ctx = 256 cells are used; roll back or use a larger n_ctx"
        assert str(caught.value) == expected
        assert session.n_past == 256
        session.rollback(250)
        assert list(session.generate(20, stream=True)) == []  # this model has no text
        assert session.n_past == 256
        session.rollback(250)
        assert asyncio.run(session.agenerate(20)) == done
        assert session.generate(0).finish_reason == "length"


def test_rollback_to_a_label() -> None:
    with context("dense") as ctx:
        session = Session(ctx)
        for at, label in ((8, "a"), (16, "b"), (24, "a")):
            session.feed(tokens(8, seed=at))
            session.checkpoint(label)
        session.feed([1])
        session.rollback("a")
        assert session.n_past == 24
        session.rollback("b")
        assert session.n_past == 16
        session.feed([1, 2])
        assert session.rollback("a") == 0
        assert session.n_past == 8
        lost = session.checkpoint("lost")
        session.rollback(4)
        session.feed([1])
        assert "dropped when other tokens took its place" in said(lambda: session.rollback(lost))
        assert session.n_past == 5


def test_a_manager_is_a_collection_of_names(tmp_path: Path) -> None:
    with context("dense") as ctx:
        manager = SessionManager(tmp_path)
        assert (list(manager), len(manager), bool(manager)) == ([], 0, True)
        for name in ("bob", "alice"):
            manager.create(name, ctx, system_prompt=IDS)
            ctx.seq_rm(0)
        assert list(manager) == ["alice", "bob"]
        assert len(manager) == 2
        assert "alice" in manager
        assert "carol" not in manager
        assert said(lambda: manager.create("Alice", ctx)).startswith("there is a session 'alice' already;")


def test_verify_for_programs(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--json", str(files["llsnap"]), str(files["text"])]) == 1
    good, bad = json.loads(capsys.readouterr().out)
    assert (good["path"], good["ok"], good["error"]) == (str(files["llsnap"]), True, None)
    assert (bad["ok"], bad["checked"]) == (False, None)
    assert "neither" in bad["error"]
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"llamastate {__version__}\n"
