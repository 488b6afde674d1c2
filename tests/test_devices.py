"""Layers and caches on a GPU, or on what stands in for one (``tests.devices``)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llamastate import Context, Model, SeqFlags
from tests import tiny
from tests.conftest import THREADS
from tests.helpers import KINDS, assert_same_logits, follow, nmse, tokens

every_kind = pytest.mark.parametrize("kind", KINDS)
#: All layers on the device, and only the last two of them: then a cache lies in two memories.
every_split = pytest.mark.parametrize("layers", [99, 3], ids=["all", "some"])
#: V by rows, and transposed.
every_layout = pytest.mark.parametrize("flash_attn", ["on", "off"])


def on_device(kind: str, layers: int, **params: object) -> Context:
    params.setdefault("n_ctx", 512)
    return Context(Model(tiny.path(kind), n_gpu_layers=layers), n_threads=THREADS, **params)


@every_kind
@every_split
@every_layout
@pytest.mark.parametrize("offload_kqv", [True, False], ids=["kv on the device", "kv on the host"])
def test_a_state_from_a_device_goes_on_there(kind: str, layers: int, flash_attn: str, offload_kqv: bool):
    """Into a fresh context on the device, the same bytes come back, and it goes on as the one that decoded."""
    settings = {"flash_attn": flash_attn, "offload_kqv": offload_kqv}
    with on_device(kind, layers, **settings) as source, on_device(kind, layers, **settings) as fresh:
        source.prefill(tokens(90, seed=9), chunk=40)
        first = int(source.logits().argmax())
        blob, whole = source.state_seq_get_data(0), source.state_get_data()
        expected = follow(source, first, 8)
        for restore in (lambda: fresh.state_seq_set_data(blob, 0), lambda: fresh.state_set_data(whole)):
            restore()
            np.testing.assert_array_equal(fresh.state_seq_get_data(0), blob)
            found = follow(fresh, first, 8)
            assert found[0] == expected[0]
            assert_same_logits(found[1], expected[1])


@pytest.mark.parametrize("flash_attn", ["on", "off"])
@pytest.mark.parametrize("cache_type", ["f32", "q8_0", "q4_0"])
def test_other_types_of_cache(flash_attn: str, cache_type: str):
    types = {"type_k": cache_type, "type_v": cache_type if flash_attn == "on" else "f16"}
    with (
        on_device("dense", 99, flash_attn=flash_attn, **types) as source,
        on_device("dense", 99, flash_attn=flash_attn, **types) as fresh,
    ):
        source.prefill(tokens(90, seed=9), chunk=40)
        first = int(source.logits().argmax())
        blob = source.state_seq_get_data(0)
        expected = follow(source, first, 8)
        fresh.state_seq_set_data(blob, 0)
        np.testing.assert_array_equal(fresh.state_seq_get_data(0), blob)
        found = follow(fresh, first, 8)
        assert found[0] == expected[0]
        assert_same_logits(found[1], expected[1])


@every_kind
@every_layout
def test_between_host_and_device(kind: str, flash_attn: str):
    """The bytes of one are the bytes of the other: what was decoded here goes on there."""
    with on_device(kind, 0, flash_attn=flash_attn) as host, on_device(kind, 99, flash_attn=flash_attn) as gpu:
        for source, target in ((host, gpu), (gpu, host)):
            source.clear()
            source.prefill(tokens(90, seed=9), chunk=40)
            blob = source.state_seq_get_data(0)
            target.state_seq_set_data(blob, 0)
            np.testing.assert_array_equal(target.state_seq_get_data(0), blob)
            source.decode([7])
            target.decode([7])
            assert nmse(target.logits(), source.logits()) <= 1e-3  # another device's arithmetic


@every_kind
@every_split
@pytest.mark.parametrize("flags", [SeqFlags.ON_DEVICE, SeqFlags.ON_DEVICE | SeqFlags.PARTIAL_ONLY], ids=repr)
def test_undo_with_tensors_that_stay_there(kind: str, layers: int, flags: SeqFlags):
    with on_device(kind, layers, flash_attn="on") as ctx, on_device(kind, layers, flash_attn="on") as other:
        for each in (ctx, other):
            each.prefill(tokens(60, seed=9), chunk=40)
        first = int(ctx.logits().argmax())
        blob = ctx.state_seq_get_data(0, flags)
        assert blob.nbytes < ctx.state_seq_get_size(0)
        expected = follow(other, first, 8)
        for further in (1, 40):
            ctx.decode(tokens(further, seed=further))
            ctx.state_seq_set_data(blob, 0, flags)
            found = follow(ctx, first, 8)
            assert found[0] == expected[0]
            assert_same_logits(found[1], expected[1])


@every_layout
def test_a_real_model(smollm2_path: Path, flash_attn: str):
    with Model(smollm2_path, n_gpu_layers=99) as model:
        ids = model.tokenize(
            "Once there was a king who had three sons, and he did not know which should have the crown."
        )
        settings = {"n_ctx": 512, "n_ubatch": 128, "n_threads": THREADS, "flash_attn": flash_attn}
        with Context(model, **settings) as source, Context(model, **settings) as fresh:
            source.prefill(ids, chunk=32)
            first = int(source.logits().argmax())
            blob = source.state_seq_get_data(0)
            expected = follow(source, first, 6)
            fresh.state_seq_set_data(blob, 0)
            np.testing.assert_array_equal(fresh.state_seq_get_data(0), blob)
            found = follow(fresh, first, 6)
            assert found[0] == expected[0]
            assert_same_logits(found[1], expected[1])
