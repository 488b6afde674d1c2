"""Borrowing the context of a live ``llama_cpp.Llama``."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from llamastate import (
    Batch,
    Context,
    ContextBusyError,
    LogitsUnavailableError,
    OnDeviceStateError,
    PendingUpdateError,
    Sampler,
    SeqFlags,
    SequenceChangedError,
    Session,
)
from tests import models, raw, tiny
from tests.conftest import THREADS
from tests.helpers import assert_same_logits, context, follow, model, tokens

KINDS = ("chat", "iswa", "mamba", "jamba", "lfm2swa", "qwen2vl")
TEXT = tokens(60, seed=1)


def make(path: Path, **params: Any) -> llama_cpp.Llama:
    params = {"n_ctx": 512, "n_threads": THREADS, "n_threads_batch": THREADS, "verbose": False, **params}
    return llama_cpp.Llama(str(path), **params)


@pytest.fixture
def llm() -> Iterator[llama_cpp.Llama]:
    llm = make(tiny.path("chat", vocab="spm"))
    yield llm
    llm.close()


# --- the same context -------------------------------------------------------------------------------------------------


def test_it_is_the_same_context(llm: llama_cpp.Llama):
    ctx = Context.attach(llm)
    assert raw.pointer(ctx) == ctypes.cast(llm.ctx, ctypes.c_void_p).value
    assert (ctx.n_ctx, ctx.n_batch, ctx.n_seq_max) == (512, 512, 1)
    assert ctx.model.n_vocab == llm.n_vocab()
    assert ctx.model.path == llm.model_path
    assert ctx.model.tokenize("the of").tolist() == llm.tokenize(b"the of")
    assert ctx.model.meta["general.architecture"] == llm.metadata["general.architecture"]
    llm.eval(TEXT.tolist())
    assert ctx.seq_pos_max(0) == len(TEXT) - 1
    ctx.decode([5])
    assert llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(llm.ctx), 0) == len(TEXT)


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_round_trip(name: str, flash_attn: bool):
    """Restored, it goes on as the Llama itself would have, and as a context of our own does."""
    llm = make(tiny.path(name), flash_attn=flash_attn)
    ctx = Context.attach(llm)
    llm.eval(TEXT.tolist())
    blob, whole = ctx.state_seq_get_data(0), ctx.state_get_data()
    expected = follow(ctx, 7, 8)
    for restore in (lambda: ctx.state_seq_set_data(blob, 0), lambda: ctx.state_set_data(whole)):
        llm.reset()
        llm.eval(tokens(25).tolist())
        restore()
        assert ctx.seq_pos_max(0) == len(TEXT) - 1
        found = follow(ctx, 7, 8)
        assert found[0] == expected[0]
        assert_same_logits(found[1], expected[1])
    # The settings are llama-cpp-python's own: of a cache that is not unified, for one sequence.
    with context(name, kv_unified=False, flash_attn="on" if flash_attn else "off") as own:
        own.state_seq_set_data(blob, 0)
        assert_same_logits(follow(own, 7, 8)[1], expected[1])
        own.state_set_data(whole)
        back = own.state_seq_get_data(0)
    ctx.clear()
    ctx.state_seq_set_data(back, 0)
    assert_same_logits(follow(ctx, 7, 8)[1], expected[1])
    llm.close()


@pytest.mark.parametrize("name", KINDS)
def test_the_bytes_are_those_of_the_low_level_functions(name: str, tmp_path: Path):
    llm = make(tiny.path(name))
    ctx = Context.attach(llm)
    llm.eval(TEXT.tolist())
    np.testing.assert_array_equal(ctx.state_get_data(), raw.get(ctx))
    for flags in (SeqFlags.NONE, SeqFlags.PARTIAL_ONLY):
        np.testing.assert_array_equal(ctx.state_seq_get_data(0, flags), raw.seq_get(ctx, 0, flags))
    assert ctx.state_get_data().tobytes() == bytes(llm.save_state().llama_state)
    ctx.state_seq_save_file(tmp_path / "ours", 0, TEXT)
    raw.seq_save_file(ctx, tmp_path / "theirs", 0, TEXT)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    blob = ctx.state_seq_get_data(0)
    ctx.clear()
    assert raw.seq_set(ctx, blob, 0) == blob.nbytes
    np.testing.assert_array_equal(ctx.state_seq_get_data(0), blob)
    llm.close()


def test_smollm2_goes_on_where_it_was(smollm2_path: Path):
    """Through ``Llama.generate``, with the Llama told what its context holds."""
    llm = make(smollm2_path, n_ctx=256)
    ctx = Context.attach(llm)
    prompt = llm.tokenize(b"The capital of France is")
    llm.eval(prompt)
    blob = ctx.state_seq_get_data(0)
    expected = follow(ctx, 260, 5)

    llm.reset()
    llm.eval(llm.tokenize(b"Something else altogether, and longer than that was"))
    ctx.state_seq_set_data(blob, 0)
    llm.n_tokens, llm.input_ids[: len(prompt)] = len(prompt), prompt
    llm.eval([260])
    np.testing.assert_array_equal(follow(ctx, expected[0][1], 4)[1], expected[1][1:])
    assert models.smollm2() == smollm2_path
    llm.close()


# --- two at once ------------------------------------------------------------------------------------------------------


def test_attachments_share_a_lock(llm: llama_cpp.Llama):
    one, two = Context.attach(llm, on_busy="raise"), Context.attach(llm)
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with one._handle:
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert inside.wait(60)
        for call in (lambda: two.decode([1]), lambda: one.decode([1]), lambda: llm.eval([1])):
            with pytest.raises(ContextBusyError):
                call()
    finally:
        leave.set()
        thread.join()
    llm.eval([1])
    two.decode([1])
    assert one.seq_pos_max(0) == 1


@pytest.mark.parametrize("name", KINDS)
def test_attachments_share_device_states(name: str):
    """Taken through one, good through the other; and void when either takes another."""
    llm = make(tiny.path(name))
    one, two = Context.attach(llm), Context.attach(llm)
    llm.eval(TEXT.tolist())
    blob = one.state_seq_get_data(0, SeqFlags.ON_DEVICE)
    expected = follow(one, 7, 4)[1]
    two.state_seq_set_data(blob, 0, SeqFlags.ON_DEVICE)
    assert_same_logits(follow(two, 7, 4)[1], expected)
    two.clear()
    two.decode(TEXT[:20])
    two.state_seq_get_data(0, SeqFlags.ON_DEVICE)
    before = one.state_get_data()
    with pytest.raises(OnDeviceStateError):
        one.state_seq_set_data(blob, 0, SeqFlags.ON_DEVICE)
    np.testing.assert_array_equal(one.state_get_data(), before)
    llm.close()


def test_two_llamas_are_strangers():
    first, second = make(tiny.path("chat")), make(tiny.path("chat"))
    one, two = Context.attach(first), Context.attach(second)
    assert raw.pointer(one) != raw.pointer(two)
    first.eval(TEXT.tolist())
    blob = one.state_seq_get_data(0, SeqFlags.ON_DEVICE)
    with pytest.raises(OnDeviceStateError):
        two.state_seq_set_data(blob, 0, SeqFlags.ON_DEVICE)
    two.state_seq_set_data(one.state_seq_get_data(0), 0)
    assert_same_logits(follow(two, 7, 4)[1], follow(one, 7, 4)[1])
    first.close()
    two.decode([1])
    second.close()


# --- what the Llama does itself ---------------------------------------------------------------------------------------

OWN_CALLS: dict[str, Callable[[llama_cpp.Llama], Any]] = {
    "eval": lambda llm: llm.eval([3]),
    "completion": lambda llm: llm("the of and", max_tokens=2),
    "load_state": lambda llm: llm.load_state(llm.save_state()),
    "seq_rm": lambda llm: llm._ctx.kv_cache_seq_rm(0, 5, -1),
    "clear": lambda llm: llm._ctx.kv_cache_clear(),
}


@pytest.mark.parametrize("call", OWN_CALLS)
def test_its_own_calls_make_our_logits_old(llm: llama_cpp.Llama, call: str):
    ctx = Context.attach(llm)
    llm.eval(TEXT.tolist())
    with pytest.raises(LogitsUnavailableError):
        ctx.logits()
    ctx.decode([5])
    assert np.isfinite(ctx.logits()).all()
    OWN_CALLS[call](llm)
    for use in (ctx.logits, lambda: ctx.logits(0), lambda: ctx.logits(copy=False)):
        with pytest.raises(LogitsUnavailableError):
            use()


def test_its_recurrent_reset_makes_our_logits_old():
    """A Llama clears a recurrent memory itself, past its own wrapper."""
    llm = make(tiny.path("mamba"))
    ctx = Context.attach(llm)
    ctx.decode(TEXT)
    llm.reset()
    assert ctx.seq_pos_max(0) == -1
    with pytest.raises(LogitsUnavailableError):
        ctx.logits()
    llm.close()


@pytest.mark.parametrize("call", OWN_CALLS)
def test_its_own_calls_take_turns(llm: llama_cpp.Llama, call: str):
    ctx = Context.attach(llm)
    llm.eval(TEXT.tolist())
    inside, leave, done = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        with ctx._handle:
            inside.set()
            leave.wait(60)

    def use() -> None:
        OWN_CALLS[call](llm)
        done.set()

    holder, user = threading.Thread(target=hold), threading.Thread(target=use)
    holder.start()
    assert inside.wait(60)
    user.start()
    try:
        assert not done.wait(0.15)
    finally:
        leave.set()
        holder.join()
        user.join()
    assert done.is_set()


def test_its_eval_and_its_sampling_as_one_turn(llm: llama_cpp.Llama):
    """It reads its logits without a lock of its own: another thread's decode would put others in their place."""
    llm.eval(TEXT.tolist())
    expected = llm.sample(temp=0)
    llm.reset()
    ctx = Context.attach(llm)
    done = threading.Event()

    def use() -> None:
        ctx.decode([1, 2, 3])
        done.set()

    user = threading.Thread(target=use)
    with ctx.lock():
        user.start()
        llm.eval(TEXT.tolist())
        assert not done.wait(0.15)
        assert llm.sample(temp=0) == expected
    user.join()
    assert done.is_set()


def test_its_own_shift_is_pending(llm: llama_cpp.Llama):
    ctx = Context.attach(llm)
    llm.eval(TEXT.tolist())
    llm._ctx.kv_cache_seq_shift(0, 0, -1, 3)
    with pytest.raises(PendingUpdateError):
        ctx.state_seq_get_data(0)
    ctx.decode([1])
    blob = ctx.state_seq_get_data(0)
    expected = follow(ctx, 7, 4)[1]
    with context("chat", kv_unified=False, flash_attn="off") as own:
        own.state_seq_set_data(blob, 0)
        assert_same_logits(follow(own, 7, 4)[1], expected)


def test_its_calls_are_its_own_again_afterwards(llm: llama_cpp.Llama):
    """Once no attachment is left, nothing of ours is asked any more."""
    ctx = Context.attach(llm, on_busy="raise")
    handle = weakref.ref(ctx._handle)
    del ctx
    assert handle() is None
    expected = llm("the of and", max_tokens=4, temperature=0)["choices"][0]["text"]
    llm.reset()
    again = Context.attach(llm)
    assert llm("the of and", max_tokens=4, temperature=0)["choices"][0]["text"] == expected
    again.close()


def test_batches_and_samplers_work_on_it(llm: llama_cpp.Llama):
    ctx = Context.attach(llm)
    batch = Batch()
    batch.extend(TEXT, pos=0, logits="last")
    assert ctx.decode_batch(batch) == 1
    with context("chat", kv_unified=False, flash_attn="off") as own:
        own.decode(TEXT)
        assert_same_logits(ctx.logits(), own.logits())
        assert Sampler(ctx.model).sample(ctx) == Sampler(model("chat")).sample(own)
    view = ctx.logits(copy=False)  # always a copy: nobody could hold the owner's memory
    expected = view.copy()
    llm.eval([1, 2, 3])
    np.testing.assert_array_equal(view, expected)


def test_a_session_notices_what_the_llama_does(llm: llama_cpp.Llama):
    ctx = Context.attach(llm)
    session = Session(ctx)
    session.feed(TEXT)
    llm.tokenize(b"the of")
    llm.n_tokens = len(TEXT)
    llm._ctx.kv_cache_seq_rm(0, len(TEXT), -1)  # nothing is there
    llm._ctx.get_state_size()
    session.feed([5])
    for change in (
        lambda: (setattr(llm, "n_tokens", len(TEXT)), llm.eval([6])),
        lambda: llm._ctx.kv_cache_seq_rm(0, 3, 5),
        lambda: llm._ctx.kv_cache_seq_cp(0, 0, 0, -1),
    ):
        assert session.n_past == len(TEXT) + 1
        change()
        assert ctx.seq_pos_max(0) == len(TEXT)
        with pytest.raises(SequenceChangedError):
            session.feed([7])
        ctx.clear()
        session = Session(ctx)
        session.feed([*TEXT, 5])
