"""``accelerate``: the states of a Llama, as before and without the copies."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from llamastate import (
    ClosedError,
    Context,
    ContextBusyError,
    CorruptStateError,
    FingerprintMismatchError,
    InvalidArgumentError,
    LoadError,
    NotEnoughCellsError,
    TokensMismatchError,
)
from llamastate.interop.llama_cpp import accelerate, attach
from tests import children, tiny
from tests.helpers import assert_same_logits
from tests.interop.llamas import KINDS, complete, ids, last_logits
from tests.interop.test_attach import make

TEXT = ids(60, seed=1)
FIELDS = ("input_ids", "n_tokens", "llama_state", "llama_state_size", "seed")


@pytest.fixture
def llm() -> Iterator[llama_cpp.Llama]:
    llm = make(tiny.path("chat", vocab="spm"))
    yield llm
    llm.close()


def held(llm: llama_cpp.Llama) -> tuple[list[int], bytes, int]:
    """What it holds, as llama-cpp-python itself sees it."""
    state = llama_cpp.Llama.save_state(llm)
    return llm._input_ids.tolist(), bytes(state.llama_state), llm._seed


def follow(llm: llama_cpp.Llama, token: int = 300) -> np.ndarray:
    llm.eval([token])
    return last_logits(llm)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ways", ["ours", "saved", "loaded"])
def test_round_trip(kind: str, ways: str):
    """Ours alone; what ours has saved loaded by llama-cpp-python's own; and the other way round."""
    llm = make(tiny.path(kind, vocab="spm"))
    llm.eval(TEXT)
    llm.set_seed(7)
    own = llm.save_state()
    before = held(llm)
    expected = follow(llm)
    llm.load_state(own)
    restored = follow(llm)
    llm.load_state(own)
    with accelerate(llm) as acceleration:
        assert type(llm.save_state()) is llama_cpp.LlamaState
        saved = own if ways == "loaded" else llm.save_state()
        assert type(saved.llama_state) is bytes
        for name in FIELDS:
            assert np.array_equal(getattr(saved, name), getattr(own, name)), name
        llm.reset()
        llm.eval(ids(25, seed=2))
        llm.set_seed(8)
        if ways == "saved":
            acceleration.undo()
        llm.load_state(saved)
        assert held(llm) == before
        found = follow(llm)
    assert (found == restored).all()
    assert_same_logits(found, expected)
    assert complete(llm, [*TEXT, 300, 301])[0][: len(TEXT) + 2] == [*TEXT, 300, 301]


def test_it_can_be_undone(llm: llama_cpp.Llama):
    llm.eval(TEXT)
    acceleration = accelerate(llm)
    assert acceleration.active
    assert llm.save_state().scores.shape[0] == 1
    accelerate(llm)
    acceleration.undo()
    acceleration.undo()
    assert not acceleration.active
    assert "undone" in repr(acceleration)
    assert llm.save_state().scores.shape[0] == len(TEXT)
    with accelerate(llm):
        assert llm.save_state().scores.shape[0] == 1
    assert llm.save_state().scores.shape[0] == len(TEXT)
    assert isinstance(llm, llama_cpp.Llama)
    assert type(llm).__name__ == "Llama"


def test_attachments_and_acceleration_go_together(llm: llama_cpp.Llama):
    with attach(llm) as ctx, accelerate(llm):
        llm.eval(TEXT)
        state = llm.save_state()
        ctx.decode([5])
        llm.load_state(state)
        assert ctx.seq_pos_max(0) == len(TEXT) - 1
        with Context.attach(llm) as another:
            assert another._handle is ctx._handle
        expected = held(llm)
        assert bytes(ctx.state_get_data()) == expected[1]


def test_the_lock(llm: llama_cpp.Llama):
    """It takes turns, or says that it cannot."""
    import threading

    llm.eval(TEXT)
    accelerate(llm)
    ctx = Context.attach(llm, on_busy="raise")
    raised: list[BaseException] = []

    def save() -> None:
        try:
            llm.save_state()
        except ContextBusyError as error:
            raised.append(error)

    with ctx.lock():
        thread = threading.Thread(target=save)
        thread.start()
        thread.join()
    assert len(raised) == 1
    assert llm.save_state().n_tokens == len(TEXT)


def test_it_pickles(llm: llama_cpp.Llama, tmp_path: Path):
    """Also for a program without llamastate; and the Llama itself becomes an ordinary one."""
    accelerate(llm)
    llm.eval(TEXT)
    state = llm.save_state()
    file = tmp_path / "state"
    file.write_bytes(pickle.dumps(state))
    done = children.run(
        f"""
import pickle, sys
from pathlib import Path
import llama_cpp
llm = llama_cpp.Llama({llm.model_path!r}, n_ctx=512, n_threads=1, verbose=False)
llm.load_state(pickle.loads(Path({str(file)!r}).read_bytes()))
assert "llamastate" not in sys.modules
print(llm.n_tokens, llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(llm.ctx), 0))
llm.close()
"""
    )
    assert (done.returncode, done.stdout.split()) == (0, [str(len(TEXT)), str(len(TEXT) - 1)]), done.stderr
    expected = held(llm)
    llm.reset()
    llm.load_state(pickle.loads(file.read_bytes()))
    assert held(llm) == expected
    twin = pickle.loads(pickle.dumps(llm))
    assert type(twin) is llama_cpp.Llama
    twin.close()


def test_scores(tmp_path: Path):
    """Of every token, if there are any; unknown ones are no numbers."""
    llm = make(tiny.path("chat", vocab="spm"), logits_all=True)
    with accelerate(llm):
        llm.eval(TEXT)
        expected = llm._scores.copy()
        state = llm.save_state()
        llm.reset()
        llm.eval(ids(70, seed=3))
        assert (state.scores == expected).all()
        llm.load_state(state)
        assert (llm._scores == expected).all()
        bare = make(tiny.path("chat", vocab="spm"))
        accelerate(bare)
        bare.eval(TEXT)
        llm.load_state(bare.save_state())
        assert np.isnan(llm._scores).all()
        assert (follow(llm) == follow(bare)).all()
        assert np.isfinite(llm.scores[len(TEXT)]).all()
        bare.load_state(state)
        bare.close()
        with pytest.raises(InvalidArgumentError, match="scores"):
            llm.load_state(_wrong(state, "scores", state.scores[:5]))
    llm.close()


def test_a_state_of_another_size_of_context(llm: llama_cpp.Llama):
    """Which llama-cpp-python loads, and then has no room for the next token's id."""
    small = make(tiny.path("chat", vocab="spm"), n_ctx=256)
    accelerate(small)
    accelerate(llm)
    small.eval(TEXT)
    llm.load_state(small.save_state())
    assert len(llm.input_ids) == 512
    assert (follow(llm) == follow(small)).all()
    llm.reset()
    llm.eval(ids(300))
    before = held(small)
    with pytest.raises(InvalidArgumentError, match="room for 256"):
        small.load_state(llm.save_state())
    big = llm.save_state()
    big.n_tokens = 10
    with pytest.raises(NotEnoughCellsError):
        small.load_state(big)
    assert held(small) == before
    small.close()


def test_another_model(llm: llama_cpp.Llama):
    """Same shape, other weights: refused, and nothing has changed."""
    other = make(tiny.path("chat", vocab="spm", seed=1))
    accelerate(other)
    accelerate(llm)
    other.eval(ids(30))
    llm.eval(TEXT)
    before, expected = held(llm), llm._requires_eval
    with pytest.raises(FingerprintMismatchError) as caught:
        llm.load_state(other.save_state())
    assert caught.value.field == "weights"
    assert (held(llm), llm._requires_eval) == (before, expected)
    other.close()


def _wrong(state: llama_cpp.LlamaState, name: str, value: object) -> llama_cpp.LlamaState:
    changed = copy.copy(state)
    setattr(changed, name, value)
    return changed


def test_bad_states(llm: llama_cpp.Llama):
    accelerate(llm)
    llm.eval(ids(40))
    state = llm.save_state()
    llm.reset()
    llm.eval(TEXT)
    before = held(llm)
    damaged = bytearray(state.llama_state)
    damaged[4] ^= 1
    for wrong, error in [
        (None, InvalidArgumentError),
        (b"", InvalidArgumentError),
        (_wrong(state, "n_tokens", -1), InvalidArgumentError),
        (_wrong(state, "n_tokens", 2.5), InvalidArgumentError),
        (_wrong(state, "n_tokens", 10**9), InvalidArgumentError),
        (_wrong(state, "n_tokens", 41), TokensMismatchError),
        (_wrong(state, "input_ids", state.input_ids[:30]), InvalidArgumentError),
        (_wrong(state, "input_ids", "text"), InvalidArgumentError),
        (_wrong(state, "llama_state_size", len(state.llama_state) + 1), InvalidArgumentError),
        (_wrong(state, "llama_state_size", len(state.llama_state) - 1), CorruptStateError),
        (_wrong(state, "llama_state", bytes(damaged)), LoadError),
        (_wrong(state, "llama_state", state.llama_state[:-5]), InvalidArgumentError),
        (_wrong(state, "llamastate", {"fingerprint": 3}), InvalidArgumentError),
        (_wrong(state, "llamastate", {"fingerprint": {}, "n_known": 1, "scores": False}), CorruptStateError),
    ]:
        with pytest.raises(error):
            llm.load_state(wrong)
        assert held(llm) == before
    llm.load_state(state)
    assert llm.n_tokens == 40


def test_every_bit_of_the_head(llm: llama_cpp.Llama):
    """Refused, or with the same positions: never a state that is another than it says."""
    accelerate(llm)
    llm.eval(ids(40))
    state = llm.save_state()
    llm.eval(TEXT)
    before, refused = held(llm), 0
    for bit in range(0, 8 * 200, 3):
        damaged = bytearray(state.llama_state)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            llm.load_state(_wrong(state, "llama_state", bytes(damaged)))
        except LoadError:
            refused += 1
        else:
            assert llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(llm.ctx), 0) == 39
            llm.load_state(state)
            llm.eval(TEXT)
            continue
        assert held(llm) == before
    assert refused > 400


def test_a_window_that_cannot_go_back():
    """After a restore the window holds nothing before itself: generate() has to begin anew."""
    llm = make(tiny.path("iswa", vocab="spm"))
    accelerate(llm)
    first, second = ids(100, seed=5), [*ids(100, seed=5)[:60], *ids(20, seed=6)]
    llm.eval(first)
    state = llm.save_state()
    with attach(llm) as ctx:
        blob = ctx.state_seq_get_data(0)
        ctx.state_seq_set_data(blob, 0)
    found = complete(llm, second)
    fresh = make(tiny.path("iswa", vocab="spm"))
    expected = complete(fresh, second)
    assert found[0] == expected[0]
    assert_same_logits(found[1], expected[1])
    llm.load_state(state)
    assert complete(llm, first)[0] == complete(fresh, first)[0]


def test_freed_at_once():
    """Nothing of ours keeps a Llama, not even in a ring."""
    llm = make(tiny.path("chat", vocab="spm"))
    acceleration = accelerate(llm)
    llm.eval(TEXT)
    state = llm.save_state()
    llm.load_state(state)
    died = [weakref.ref(each) for each in (llm, llm._ctx, llm._model)]
    gc.disable()
    try:
        del llm
        assert [reference() for reference in died] == [None] * 3
    finally:
        gc.enable()
    acceleration.undo()


def test_misuse(llm: llama_cpp.Llama):
    for wrong in (None, 3, object()):
        with pytest.raises(TypeError):
            accelerate(wrong)  # type: ignore[arg-type]
    accelerate(llm)
    llm.eval(TEXT)
    state = llm.save_state()
    llm.close()
    with pytest.raises(ClosedError):
        llm.save_state()
    with pytest.raises(ClosedError):
        llm.load_state(state)
    closed = make(tiny.path("chat"))
    closed.close()
    with pytest.raises(ClosedError):
        accelerate(closed)
