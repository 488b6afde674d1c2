"""When a state whose tensors stay in the context may be taken again, with layers on several devices.

llama.cpp keeps a storage for each device. With a GPU a wrong rule ends the process here; without one, the tests say
that there is one, and look at the rule.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llamastate import Context, Model, SeqFlags
from llamastate._native import handles
from llamastate.errors import OnDeviceStateError
from tests import devices, tiny
from tests.helpers import context, tokens

DEVICE, PARTIAL = SeqFlags.ON_DEVICE, SeqFlags.ON_DEVICE | SeqFlags.PARTIAL_ONLY


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not devices.gpus():
        monkeypatch.setattr(handles, "gpu_alignments", lambda: [128])


def split(kind: str, layers: int, **params: object) -> Context:
    """Transposed rows, which are padded one by one; as many of the last layers on a device."""
    return context(Model(tiny.path(kind), n_gpu_layers=layers), flash_attn="off", n_ctx=512, n_seq_max=2, **params)


def sizes(ctx: Context) -> tuple[int, int]:
    """Bytes of the first sequence's base cache and of its window."""
    window = ctx.state_seq_get_size(0, SeqFlags.PARTIAL_ONLY)
    return ctx.state_seq_get_size(0) - window, window


@pytest.fixture
def windowed() -> Iterator[Context]:
    """Two layers with a window and two without, by turns; three go to the device."""
    with split("iswa11", 4) as ctx:
        yield ctx


def test_both_caches_hold_more(windowed: Context):
    ctx = windowed
    for n in range(1, 6):
        ctx.decode(tokens(n, seed=n), seq_id=0)
        ctx.decode(tokens(3, seed=n), seq_id=1)
        blob, end, size = ctx.state_seq_get_data(0, DEVICE), ctx.seq_pos_max(0), sizes(ctx)
        ctx.decode([3], seq_id=0)
        ctx.state_seq_set_data(blob, 0, DEVICE)
        assert (ctx.seq_pos_max(0), sizes(ctx)) == (end, size)


def refuses(ctx: Context, flags: SeqFlags) -> None:
    with pytest.raises(OnDeviceStateError) as caught:
        ctx.state_seq_get_data(0, flags)
    assert (caught.value.reason, caught.value.seq_id) == ("same size in other cells", 0)


def test_the_window_holds_as_much_as_before(windowed: Context):
    """And the other layers more: the sum of all is another one, that of the device with a window's layer is not."""
    ctx = windowed
    ctx.decode(tokens(40), seq_id=0)
    before = sizes(ctx)
    ctx.state_seq_get_data(0, DEVICE)
    for n in range(1, 12):
        ctx.decode(tokens(n, seed=n), seq_id=0)
        ctx.decode(tokens(1, seed=n), seq_id=1)
        now = sizes(ctx)
        assert now[0] > before[0]
        assert now[1] == before[1]
        refuses(ctx, DEVICE)
        refuses(ctx, PARTIAL)


def test_a_partial_state_leaves_the_storage_of_the_rest():
    """A full one of as many tokens in other cells may not go there, even if another state was taken meanwhile."""
    with split("jamba", 3) as ctx:
        ctx.decode(tokens(20), seq_id=0)
        ctx.state_seq_get_data(0, DEVICE)
        ctx.state_seq_get_data(0, PARTIAL)
        ctx.seq_rm(0)
        ctx.decode(tokens(5), seq_id=1)
        ctx.decode(tokens(20), seq_id=0)
        refuses(ctx, DEVICE)


def test_a_recurrent_state_goes_to_its_storage_at_any_time():
    """It is one stretch of as many bytes, always; the attention layers beside it are another matter."""
    with split("jamba", 3) as ctx:
        ctx.decode(tokens(20), seq_id=0)
        for flags in (DEVICE, PARTIAL, PARTIAL, DEVICE):
            ctx.state_seq_get_data(0, flags)
            ctx.decode([7], seq_id=0)
        ctx.state_seq_get_data(0, PARTIAL)


@pytest.mark.parametrize(("layers", "params"), [(0, {}), (4, {"offload_kqv": False})])
def test_what_lies_in_one_memory(layers: int, params: dict[str, bool]):
    """There the sum decides, and it grows with the text."""
    with split("iswa11", layers, **params) as ctx:
        ctx.decode(tokens(40), seq_id=0)
        ctx.state_seq_get_data(0, DEVICE)
        for n in range(1, 4):
            ctx.decode(tokens(n), seq_id=0)
            ctx.state_seq_get_data(0, DEVICE)


@pytest.mark.skipif(devices.gpus() > 1, reason="with several GPUs nobody tells")
@pytest.mark.parametrize("layers", [-1, 99])
def test_all_layers_on_the_only_device(layers: int):
    with split("iswa11", layers) as ctx:
        ctx.decode(tokens(40), seq_id=0)
        ctx.state_seq_get_data(0, DEVICE)
        ctx.decode([1], seq_id=0)
        ctx.state_seq_get_data(0, DEVICE)
