"""Copying, keeping, moving and clearing sequences: exact for all of them, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llama_cpp as lib
import numpy as np
import pytest

from llamastate import (
    Batch,
    Context,
    InvalidPositionError,
    Model,
    NoKVSlotError,
    NotEnoughCellsError,
    PendingUpdateError,
)
from tests import raw, tiny
from tests.helpers import KINDS, assert_same_logits, context, follow, nmse, tokens

TEXT = tokens(60, seed=1)
every_kind = pytest.mark.parametrize("kind", KINDS)
both_pools = pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
#: Windows have a second cache that is smaller, and M-RoPE has several positions a token.
SHIFTABLE = ("dense", "mamba", "mamba2", "jamba", "lfm2")


def filled(kind: str, **params: Any) -> Context:
    """Sequence 0 holds the text, sequence 2 something shorter, 1 and 3 nothing."""
    ctx = context(kind, n_seq_max=4, **params)
    ctx.decode(tokens(25, seed=2), seq_id=2)
    ctx.decode(TEXT, seq_id=0)
    return ctx


def scratch(kind: str, ids: np.ndarray[Any, np.dtype[np.int32]], first: int = 7) -> np.ndarray[Any, Any]:
    """Logits after ``first`` and three greedy tokens behind ``ids``."""
    with context(kind) as ctx:
        ctx.decode(ids)
        return follow(ctx, first, 4)[1]


# --- copying ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dst", [1, 2], ids=["onto nothing", "onto something"])
@both_pools
@every_kind
def test_copy(kind: str, unified: bool, dst: int):
    """Both go their own ways from there, and each as if the other did not exist."""
    with filled(kind, kv_unified=unified) as ctx:
        bystander = 2 if dst == 1 else 1
        before = ctx.state_seq_get_data(bystander)
        ctx.seq_cp(0, dst)
        assert ctx.seq_pos_max(dst) == ctx.seq_pos_max(0) == len(TEXT) - 1
        # At once, and not at the next decode. (A blob names its sequence in every cell: read both into the same one.)
        with context(kind, n_seq_max=4, kv_unified=unified) as fresh:
            images = []
            for seq in (0, dst):
                fresh.state_seq_set_data(ctx.state_seq_get_data(seq), 0)
                images.append(fresh.state_seq_get_data(0))
        np.testing.assert_array_equal(*images)
        np.testing.assert_array_equal(ctx.state_seq_get_data(bystander), before)
        one, two = follow(ctx, 11, 4, seq_id=dst)[1], follow(ctx, 7, 4, seq_id=0)[1]
        assert_same_logits(one, scratch(kind, TEXT, 11))
        assert_same_logits(two, scratch(kind, TEXT, 7))
        np.testing.assert_array_equal(ctx.state_seq_get_data(bystander), before)


@both_pools
@every_kind
def test_copy_and_then_replace_the_original(kind: str, unified: bool):
    """In llama.cpp a copy between streams happens at the next decode, of whatever is there by then."""
    with filled(kind, kv_unified=unified) as ctx:
        other = ctx.state_seq_get_data(2)
        ctx.seq_cp(0, 1)
        ctx.state_seq_set_data(other, 0)
        assert_same_logits(follow(ctx, 7, 4, seq_id=1)[1], scratch(kind, TEXT))
        assert_same_logits(follow(ctx, 7, 4, seq_id=0)[1], scratch(kind, tokens(25, seed=2)))


@both_pools
@every_kind
def test_copy_of_nothing_empties(kind: str, unified: bool):
    with filled(kind, kv_unified=unified) as ctx:
        ctx.seq_cp(1, 2)
        assert ctx.seq_pos_max(2) == -1
        assert_same_logits(follow(ctx, 7, 4, seq_id=0)[1], scratch(kind, TEXT))
        assert_same_logits(follow(ctx, 7, 4, seq_id=2)[1], _from_nothing(kind))


def _from_nothing(kind: str) -> np.ndarray[Any, Any]:
    with context(kind) as ctx:
        return follow(ctx, 7, 4)[1]


@both_pools
@every_kind
def test_copy_onto_itself(kind: str, unified: bool):
    with filled(kind, kv_unified=unified) as ctx:
        before, logits = ctx.state_get_data(), ctx.logits()
        for span in ((), (0, 20), (10, 20)):
            ctx.seq_cp(0, 0, *span)
        np.testing.assert_array_equal(ctx.state_get_data(), before)
        np.testing.assert_array_equal(ctx.logits(), logits)


@pytest.mark.parametrize("until", [1, 20, 40, 58, 59])
@both_pools
@every_kind
def test_copy_of_the_beginning(kind: str, unified: bool, until: int):
    """As good as decoding the beginning anew, or refused with nothing changed."""
    with filled(kind, kv_unified=unified) as ctx:
        before = ctx.state_get_data()
        try:
            ctx.seq_cp(0, 1, 0, until)
        except InvalidPositionError:
            assert tiny.MODELS[kind].kind != "attention"
            np.testing.assert_array_equal(ctx.state_get_data(), before)
            return
        assert tiny.MODELS[kind].kind in ("attention", "iswa")
        assert ctx.seq_pos_max(1) == until - 1
        assert_same_logits(follow(ctx, 7, 4, seq_id=1)[1], scratch(kind, TEXT[:until]))
        assert_same_logits(follow(ctx, 7, 4, seq_id=0)[1], scratch(kind, TEXT))


@every_kind
def test_copy_of_the_rest(kind: str):
    """Onto a sequence that begins alike. Only attention rows can be put together so, and only in one pool."""
    for unified in (True, False):
        with filled(kind, kv_unified=unified) as ctx:
            ctx.decode(TEXT[:30], seq_id=1)
            before = ctx.state_get_data()
            if unified and tiny.MODELS[kind].kind == "attention":
                ctx.seq_cp(0, 1, 30, -1)
                assert_same_logits(follow(ctx, 7, 4, seq_id=1)[1], scratch(kind, TEXT))
            else:
                with pytest.raises(InvalidPositionError) as caught:
                    ctx.seq_cp(0, 1, 30, -1)
                assert caught.value.value == (30, -1)
                np.testing.assert_array_equal(ctx.state_get_data(), before)


def test_a_copied_window_that_has_lost_its_beginning():
    """Copied whole it is exact; its beginning is gone, and a copy of it is refused."""
    with context("iswa", n_seq_max=2, n_ctx=1024, n_ubatch=16) as ctx:
        ctx.prefill(tokens(500), chunk=16)
        before, low = ctx.state_get_data(), ctx.seq_pos_min(0)
        for until in (1, 100, low + 30):
            with pytest.raises(InvalidPositionError):
                ctx.seq_cp(0, 1, 0, until)
        np.testing.assert_array_equal(ctx.state_get_data(), before)
        ctx.seq_cp(0, 1, 0, low + 31)  # the first that still has a whole window before it
        assert_same_logits(follow(ctx, 7, 4, seq_id=1)[1], scratch("iswa", tokens(500)[: low + 31]))
        ctx.seq_cp(0, 1)
        assert_same_logits(follow(ctx, 7, 4, seq_id=1)[1], follow(ctx, 7, 4, seq_id=0)[1])


# --- keeping and clearing ---------------------------------------------------------------------------------------------


@both_pools
@every_kind
def test_keep(kind: str, unified: bool):
    with filled(kind, kv_unified=unified) as ctx:
        ctx.seq_cp(0, 1)
        before = ctx.state_seq_get_data(0)
        ctx.seq_keep(0)
        assert [ctx.seq_pos_max(seq) for seq in range(4)] == [len(TEXT) - 1, -1, -1, -1]
        np.testing.assert_array_equal(ctx.state_seq_get_data(0), before)
        assert_same_logits(follow(ctx, 7, 4, seq_id=0)[1], scratch(kind, TEXT))
        assert_same_logits(follow(ctx, 7, 4, seq_id=1)[1], _from_nothing(kind))


@pytest.mark.parametrize("data", [True, False])
@both_pools
@every_kind
def test_clear(kind: str, unified: bool, data: bool):
    with filled(kind, kv_unified=unified) as ctx, context(kind, n_seq_max=4, kv_unified=unified) as fresh:
        ctx.clear(data=data)
        np.testing.assert_array_equal(ctx.state_get_data(), fresh.state_get_data())
        for seq in (0, 2):
            assert_same_logits(follow(ctx, 7, 4, seq_id=seq)[1], _from_nothing(kind))


# --- moving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "params"), [*((kind, {}) for kind in SHIFTABLE), ("iswa", {"swa_full": True})])
def test_moved_as_a_whole_says_the_same(kind: str, params: dict[str, Any]):
    """Rotary positions are relative, and recurrent states have none: only the keys are rounded once more."""
    with filled(kind, **params) as ctx:
        bystander = ctx.state_seq_get_data(2)
        ctx.seq_add(0, 0, -1, 9)
        assert ctx.seq_pos_max(0) == len(TEXT) + 8
        found = follow(ctx, 7, 4, seq_id=0)[1]
        assert nmse(found, scratch(kind, TEXT)) < 1e-5
        np.testing.assert_array_equal(ctx.state_seq_get_data(2), bystander)


@pytest.mark.parametrize("move", ["add", "div"])
def test_moved_as_llama_cpp_moves(move: str):
    """To the bit what its own function gives, also of a part."""
    with filled("dense") as ctx, filled("dense") as twin:
        memory = lib.llama_get_memory(raw.pointer(twin))
        if move == "add":
            ctx.seq_rm(0, 10, 20)
            raw.seq_rm(twin, 0, 10, 20)
            ctx.seq_add(0, 20, -1, -10)
            lib.llama_memory_seq_add(memory, 0, 20, -1, -10)
        else:
            ctx.seq_div(0, 20, 40, 2)
            lib.llama_memory_seq_div(memory, 0, 20, 40, 2)
        np.testing.assert_array_equal(follow(ctx, 7, 4)[1], follow(twin, 7, 4)[1])


PENDING: dict[str, Callable[[Context], Any]] = {
    "state_seq_get_data": lambda ctx: ctx.state_seq_get_data(0),
    "state_seq_get_data_into": lambda ctx: ctx.state_seq_get_data_into(bytearray(1 << 20), 0),
    "state_get_data": lambda ctx: ctx.state_get_data(),
    "state_get_data_into": lambda ctx: ctx.state_get_data_into(bytearray(1 << 20)),
    "seq_cp": lambda ctx: ctx.seq_cp(0, 1),
}


@pytest.mark.parametrize("operation", PENDING)
@pytest.mark.parametrize("move", ["add", "div"])
def test_no_state_of_moved_positions_before_the_next_decode(move: str, operation: str):
    """The cells say the new positions already, the keys are still turned to the old ones."""
    with filled("dense", kv_unified=False) as ctx:
        size = ctx.state_get_size()
        if move == "add":
            ctx.seq_add(0, 30, -1, 3)
        else:
            ctx.seq_div(0, 30, -1, 2)
        with pytest.raises(PendingUpdateError) as caught:
            PENDING[operation](ctx)
        assert caught.value.operation
        assert ctx.state_get_size() == size
        ctx.decode([1], seq_id=2)  # any decode turns them
        PENDING[operation](ctx)


#: Kinds with keys that are turned, and what makes a window as long as the cache.
TURNED: list[tuple[str, dict[str, Any]]] = [("dense", {}), ("iswa", {"swa_full": True}), ("jamba", {}), ("lfm2", {})]
turned = pytest.mark.parametrize(("kind", "params"), TURNED, ids=[kind for kind, _ in TURNED])


@both_pools
@turned
def test_only_what_was_moved_has_to_wait(kind: str, params: dict[str, Any], unified: bool):
    """The keys of others are not touched, neither now nor when the moved ones are turned."""
    with filled(kind, kv_unified=unified, **params) as ctx:
        other = ctx.state_seq_get_data(2)
        ctx.seq_add(0, 0, -1, 3)
        with pytest.raises(PendingUpdateError) as caught:
            ctx.state_seq_get_data(0)
        assert caught.value.seq_ids == (0,)
        with pytest.raises(PendingUpdateError):
            ctx.state_get_data()
        np.testing.assert_array_equal(ctx.state_seq_get_data(2), other)
        assert ctx.state_seq_get_data(1).nbytes < other.nbytes
        ctx.seq_cp(2, 3)
        ctx.decode([1], seq_id=1)
        np.testing.assert_array_equal(ctx.state_seq_get_data(2), other)
        assert_same_logits(follow(ctx, 7, 4, seq_id=2)[1], scratch(kind, tokens(25, seed=2)))
        assert_same_logits(follow(ctx, 7, 4, seq_id=3)[1], scratch(kind, tokens(25, seed=2)))


def _remove(ctx: Context, blob: np.ndarray[Any, Any]) -> None:
    assert ctx.seq_rm(0)


def _replace(ctx: Context, blob: np.ndarray[Any, Any]) -> None:
    ctx.state_seq_set_data(blob, 0)


def _keep_other(ctx: Context, blob: np.ndarray[Any, Any]) -> None:
    ctx.seq_keep(2)


def _copy_over(ctx: Context, blob: np.ndarray[Any, Any]) -> None:
    ctx.seq_cp(2, 0)


@pytest.mark.parametrize("end", [_remove, _replace, _keep_other, _copy_over])
@both_pools
@turned
def test_what_was_moved_and_is_gone_is_not_waited_for(kind: str, params: dict[str, Any], unified: bool, end: Any):
    """llama.cpp still turns all keys at the next decode, but those that took the cells by an angle of nothing."""
    with filled(kind, kv_unified=unified, **params) as ctx:
        blob, other = ctx.state_seq_get_data(0), ctx.state_seq_get_data(2)
        ctx.seq_add(0, 10, -1, 3)
        end(ctx, blob)
        whole = ctx.state_get_data()
        np.testing.assert_array_equal(ctx.state_seq_get_data(2), other)
        found = follow(ctx, 7, 4, seq_id=0)[1]
        texts = {_replace: TEXT, _copy_over: tokens(25, seed=2)}
        assert_same_logits(found, scratch(kind, texts[end]) if end in texts else _from_nothing(kind))
        with context(kind, n_seq_max=4, kv_unified=unified, **params) as fresh:
            fresh.state_set_data(whole)
            assert_same_logits(follow(fresh, 7, 4, seq_id=0)[1], found)
        assert_same_logits(follow(ctx, 7, 4, seq_id=2)[1], scratch(kind, tokens(25, seed=2)))


def test_emptying_the_original_does_not_turn_its_copy():
    with filled("dense") as ctx:
        ctx.seq_add(0, 0, -1, 3)
        ctx.seq_cp(0, 1)
        ctx.seq_rm(0)
        with pytest.raises(PendingUpdateError) as caught:
            ctx.state_seq_get_data(1)
        assert caught.value.seq_ids == (1,)
        ctx.decode([1], seq_id=2)
        ctx.state_seq_get_data(1)
        assert nmse(follow(ctx, 7, 4, seq_id=1)[1], scratch("dense", TEXT)) < 1e-5


def test_recurrent_states_have_no_keys_to_wait_for():
    with filled("mamba") as ctx:
        ctx.seq_add(0, 0, -1, 3)
        blob = ctx.state_seq_get_data(0)
        with context("mamba", n_seq_max=4) as fresh:
            fresh.state_seq_set_data(blob, 0)
            assert fresh.seq_pos_max(0) == len(TEXT) + 2
            assert_same_logits(follow(fresh, 7, 4, seq_id=0)[1], scratch("mamba", TEXT))


def test_a_decode_without_room_turns_the_keys_too():
    with context("dense", n_ctx=256, n_seq_max=2) as ctx, context("dense", n_ctx=256, n_seq_max=2) as other:
        for each in (ctx, other):
            each.decode(tokens(200), seq_id=0)
            each.seq_add(0, 0, -1, 5)
        with pytest.raises(NoKVSlotError):
            ctx.decode(tokens(60), seq_id=1)
        other.decode([1], seq_id=1)
        np.testing.assert_array_equal(ctx.state_seq_get_data(0), other.state_seq_get_data(0))


@turned
def test_moved_twice_before_a_decode(kind: str, params: dict[str, Any]):
    """Of a copy too: it has its own cells after the first move."""
    with filled(kind, **params) as ctx, filled(kind, **params) as once:
        for each in (ctx, once):
            each.seq_cp(0, 1)
        ctx.seq_add(1, 0, -1, 4)
        ctx.seq_add(1, 0, -1, 5)
        once.seq_add(1, 0, -1, 9)
        np.testing.assert_array_equal(follow(ctx, 7, 4, seq_id=1)[1], follow(once, 7, 4, seq_id=1)[1])
        assert_same_logits(follow(ctx, 7, 4, seq_id=0)[1], scratch(kind, TEXT))


@pytest.mark.parametrize("operation", ["seq_add", "seq_div"])
def test_moving_what_was_copied_while_it_waited(operation: str):
    """Its cells would have to be copied, and half of that is still to come: it says who asked."""
    with filled("dense") as ctx:
        ctx.seq_add(0, 0, -1, 4)
        ctx.seq_cp(0, 1)
        spans = [(ctx.seq_pos_min(seq), ctx.seq_pos_max(seq)) for seq in range(4)]
        with pytest.raises(PendingUpdateError) as caught:
            getattr(ctx, operation)(1, 10, -1, 2)
        assert (caught.value.operation, caught.value.seq_ids) == (operation, (1,))
        assert [(ctx.seq_pos_min(seq), ctx.seq_pos_max(seq)) for seq in range(4)] == spans
        ctx.decode([1], seq_id=2)
        getattr(ctx, operation)(1, 10, -1, 2)
        assert nmse(follow(ctx, 7, 4, seq_id=0)[1], scratch("dense", TEXT)) < 1e-5


def test_cells_that_a_state_of_the_whole_context_shares():
    with filled("dense") as ctx, context("dense", n_seq_max=4) as fresh:
        ctx.seq_cp(0, 1)
        fresh.state_set_data(ctx.state_get_data())
        fresh.seq_add(1, 0, -1, 5)
        assert (fresh.seq_pos_min(0), fresh.seq_pos_max(0)) == (0, len(TEXT) - 1)
        assert_same_logits(follow(fresh, 7, 4, seq_id=0)[1], scratch("dense", TEXT))


UNTURNED = [
    *({"type_k": type_k} for type_k in ("bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")),
    {"rope_scaling_type": "yarn", "rope_freq_scale": 0.25},
    {"yarn_attn_factor": 1.5},
]


@pytest.mark.parametrize("params", UNTURNED, ids=str)
def test_keys_that_llama_cpp_cannot_turn(params: dict[str, Any]):
    """It would end the process, or scale the keys of every sequence."""
    # a model of its own: YaRN changes what llama.cpp says of it
    with Model(tiny.path("dense")) as own, context(own, n_seq_max=4, n_ctx=1024, **params) as ctx:
        ctx.decode(TEXT)
        ctx.decode(TEXT, seq_id=1)
        before = ctx.state_get_data()
        for move in (lambda: ctx.seq_add(0, 0, -1, 2), lambda: ctx.seq_div(0, 0, -1, 2)):
            with pytest.raises(InvalidPositionError) as caught:
                move()
            assert caught.value.reason == "no shift"
        np.testing.assert_array_equal(ctx.state_get_data(), before)


def test_keys_that_are_scaled_by_nothing():
    """Rope parameters alone forbid nothing."""
    params = {"rope_freq_base": 5000.0, "rope_freq_scale": 0.5}
    with Model(tiny.path("dense")) as own, context(own, n_seq_max=4, n_ctx=1024, **params) as ctx:
        ctx.decode(TEXT)
        ctx.decode(TEXT, seq_id=2)
        other = ctx.state_seq_get_data(2)
        ctx.seq_add(0, 0, -1, 2)
        ctx.decode([1], seq_id=1)
        np.testing.assert_array_equal(ctx.state_seq_get_data(2), other)


@pytest.mark.parametrize("delta", [-10, 9])
def test_a_state_taken_after_the_move_is_exact(delta: int):
    """The classic one, which makes room by forgetting a part; and a text that does not begin at 0."""
    with filled("dense") as ctx:
        if delta < 0:
            ctx.seq_rm(0, 10, 20)
            ctx.seq_add(0, 20, -1, delta)
        else:
            ctx.seq_add(0, 0, -1, delta)
        ctx.decode([1], seq_id=2)
        blob = ctx.state_seq_get_data(0)
        expected = follow(ctx, 7, 4, seq_id=0)[1]
        with context("dense", n_seq_max=4) as fresh:
            fresh.state_seq_set_data(blob, 0)
            assert fresh.seq_pos_max(0) == len(TEXT) - 1 + delta
            assert_same_logits(follow(fresh, 7, 4, seq_id=0)[1], expected)


def test_a_state_put_over_moved_positions_is_not_moved():
    """The turning that was still to come belonged to the cells that are gone."""
    with filled("dense") as ctx:
        blob, whole = ctx.state_seq_get_data(0), ctx.state_get_data()
        expected = scratch("dense", TEXT)
        ctx.seq_add(0, 0, -1, 40)
        ctx.state_seq_set_data(blob, 0)
        assert_same_logits(follow(ctx, 7, 4, seq_id=0)[1], expected)
        ctx.seq_add(0, 0, -1, 40)
        ctx.state_set_data(whole)
        assert ctx.state_get_data().tobytes() == whole.tobytes()  # nothing pending any more
        assert_same_logits(follow(ctx, 7, 4, seq_id=0)[1], expected)
        ctx.seq_add(0, 0, -1, 40)
        ctx.clear()
        assert ctx.state_seq_get_data(0).nbytes == 16
        assert_same_logits(follow(ctx, 7, 4, seq_id=0)[1], _from_nothing("dense"))


@pytest.mark.parametrize("how", ["copy", "batch"])
@pytest.mark.parametrize("move", ["add", "div"])
def test_moving_one_does_not_move_the_other(how: str, move: str):
    """Cells that two sequences share have one position. llama.cpp moves it for both."""
    with context("dense", n_seq_max=4) as ctx:
        if how == "copy":
            ctx.decode(TEXT, seq_id=0)
            ctx.seq_cp(0, 1)
        else:
            batch = Batch()
            batch.extend(TEXT, pos=0, seq_ids=[0, 1])
            ctx.decode_batch(batch)
        if move == "add":
            ctx.seq_add(1, 0, -1, 5)
        else:
            ctx.seq_div(1, 10, 30, 2)
        assert (ctx.seq_pos_min(0), ctx.seq_pos_max(0)) == (0, len(TEXT) - 1)
        assert_same_logits(follow(ctx, 7, 4, seq_id=0)[1], scratch("dense", TEXT))
        moved = follow(ctx, 7, 4, seq_id=1)[1]
        with context("dense") as alone:
            alone.decode(TEXT)
            if move == "add":
                alone.seq_add(0, 0, -1, 5)
            else:
                alone.seq_div(0, 10, 30, 2)
            assert nmse(moved, follow(alone, 7, 4)[1]) < 1e-4


@pytest.mark.parametrize("kind", ["dense", "mamba"])
def test_moving_a_copy_that_has_gaps(kind: str):
    """A copy forgets its middle and closes up, as one does to make room; and is moved once more."""
    with filled(kind) as ctx, filled(kind) as alone:
        ctx.seq_cp(0, 1)
        for each, seq in ((ctx, 1), (alone, 0)):
            if kind == "dense":
                assert each.seq_rm(seq, 10, 20)
                each.seq_add(seq, 20, -1, -10)
                each.decode([3], seq_id=seq)
                each.seq_add(seq, 30, -1, 4)  # a gap
                each.decode([3], seq_id=seq)
            each.seq_add(seq, 0, -1, 2)
        assert_same_logits(follow(ctx, 7, 4, seq_id=1)[1], follow(alone, 7, 4, seq_id=0)[1])
        assert (ctx.seq_pos_min(1), ctx.seq_pos_max(1)) == (alone.seq_pos_min(0), alone.seq_pos_max(0))
        assert_same_logits(follow(ctx, 7, 4, seq_id=0)[1], scratch(kind, TEXT))


def test_no_room_to_move_a_copy():
    """Cells of its own are not to be had: nothing is moved, and both are as they were."""
    with context("dense", n_ctx=256, n_seq_max=2) as ctx:
        ctx.decode(tokens(200), seq_id=0)
        ctx.seq_cp(0, 1)
        before = ctx.state_get_data()
        with pytest.raises(NotEnoughCellsError) as caught:
            ctx.seq_add(1, 0, -1, 5)
        assert (caught.value.needed, caught.value.available) == (200, 56)
        np.testing.assert_array_equal(ctx.state_get_data(), before)
        ctx.decode([1], seq_id=1)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in SHIFTABLE])
def test_models_whose_positions_cannot_be_moved(kind: str):
    """Several positions a token, or two caches of which one is smaller: said before anything happens."""
    with filled(kind) as ctx:
        before, logits = ctx.state_get_data(), ctx.logits()
        for move in (lambda: ctx.seq_add(0, 0, -1, 2), lambda: ctx.seq_div(0, 0, -1, 2)):
            with pytest.raises(InvalidPositionError) as caught:
                move()
            assert caught.value.reason == "no shift"
        np.testing.assert_array_equal(ctx.state_get_data(), before)
        np.testing.assert_array_equal(ctx.logits(), logits)


@pytest.mark.parametrize("arguments", [(0, -1, -1), (5, 10, -6), (0, -1, 2**31 - 30), (0, -1, -(2**40))])
def test_moves_that_leave_the_numbers_there_are(arguments: tuple[int, int, int]):
    with filled("dense") as ctx:
        before = ctx.state_get_data()
        with pytest.raises(InvalidPositionError):
            ctx.seq_add(0, *arguments)
        np.testing.assert_array_equal(ctx.state_get_data(), before)


@pytest.mark.parametrize("arguments", [(70, 80, 5), (20, 20, 5), (0, -1, 0)])
def test_moves_of_nothing(arguments: tuple[int, int, int]):
    with filled("dense") as ctx:
        before, logits = ctx.state_get_data(), ctx.logits()
        ctx.seq_add(0, *arguments)
        ctx.seq_div(0, 0, -1, 1)
        ctx.seq_add(1, 0, -1, 5)  # an empty sequence
        np.testing.assert_array_equal(ctx.state_get_data(), before)
        np.testing.assert_array_equal(ctx.logits(), logits)
