"""LoRA adapters: what they do, how long they live, and what is refused before llama.cpp could abort on it."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llamastate import (
    Adapter,
    AdapterLoadError,
    ClosedError,
    Context,
    LogitsUnavailableError,
    Model,
    OnDeviceStateError,
    SeqFlags,
    SequencesNotEmptyError,
    Snapshot,
)
from tests import children, tiny
from tests.helpers import context, model, tokens

IDS = tokens(40)


@pytest.fixture
def adapter() -> Adapter:
    return Adapter(model("dense"), tiny.lora("dense"))


@pytest.fixture
def other() -> Adapter:
    return Adapter(model("dense"), tiny.lora("dense", lora_seed=1))


def logits(*adapters: tuple[Adapter, float]) -> np.ndarray:
    """What follows the text in a fresh context with these adapters."""
    with context("dense") as ctx:
        ctx.set_adapters(adapters)
        ctx.prefill(IDS)
        return ctx.logits()


def test_they_do_something(adapter: Adapter, other: Adapter):
    rows = [logits(), logits((adapter, 1.0)), logits((adapter, 0.5)), logits((other, 1.0))]
    rows.append(logits((adapter, 1.0), (other, 1.0)))
    for i, row in enumerate(rows):
        assert all(np.abs(row - before).max() > 0.1 for before in rows[:i])
    np.testing.assert_array_equal(logits((adapter, 0.0)), rows[0])


def test_as_llama_cpp_python_does(adapter: Adapter):
    from llama_cpp import Llama

    path = str(tiny.path("dense"))
    llm = Llama(path, n_ctx=512, n_threads=1, verbose=False, flash_attn=True, lora_path=adapter.path, lora_scale=0.5)
    with Context.attach(llm) as ctx:
        ((found, scale),) = ctx.adapters
        assert (found.path, found.digest, scale) == (adapter.path, adapter.digest, 0.5)
        ctx.prefill(IDS)
        np.testing.assert_array_equal(ctx.logits(), logits((adapter, 0.5)))
        ours = context("dense")
        ours.set_adapters([(adapter, 0.5)])
        assert ctx.fingerprint == ours.fingerprint
        ctx.clear()
        ctx.set_adapters([])
        ctx.prefill(IDS)
        np.testing.assert_array_equal(ctx.logits(), logits())
    with Context.attach(llm) as ctx:  # it is known later what was set
        assert ctx.adapters == ()
        ctx.clear()
        own = Adapter(ctx.model, adapter.path)
        ctx.set_adapters([(own, 1.0)])
    del own
    gc.collect()
    with Context.attach(llm) as ctx:  # and used as long as the Llama lives
        assert [(a.path, s) for a, s in ctx.adapters] == [(adapter.path, 1.0)]
        ctx.prefill(IDS)
        np.testing.assert_array_equal(ctx.logits(), logits((adapter, 1.0)))
    llm.close()
    gc.collect()


def test_changing_them(adapter: Adapter, other: Adapter):
    """Over and over, also twice between two decodes: llama.cpp tells its graphs apart by an address."""
    expected = {id(a): logits((a, 1.0)) for a in (adapter, other)}
    with context("dense") as ctx:
        for _ in range(10):
            for chosen, passing in ((adapter, other), (other, adapter)):
                ctx.set_adapters([(passing, 1.0)])
                ctx.set_adapters([(chosen, 1.0)])
                assert ctx.adapters == ((chosen, 1.0),)
                ctx.prefill(IDS)
                np.testing.assert_array_equal(ctx.logits(), expected[id(chosen)])
                ctx.clear()


def test_states_belong_to_their_adapters(adapter: Adapter, other: Adapter):
    """Exact or an error: a sequence cannot go on with other adapters than it began with."""
    with context("dense", n_seq_max=3) as ctx:
        ctx.set_adapters([(adapter, 1.0)])
        ctx.prefill(IDS, seq_id=1)
        before = ctx.state_seq_get_data(1)
        fingerprint = ctx.fingerprint
        for change in ([], [(other, 1.0)], [(adapter, 0.5)], [(adapter, 1.0), (other, 1.0)]):
            with pytest.raises(SequencesNotEmptyError) as caught:
                ctx.set_adapters(change)
            assert caught.value.sequences == (1,)
        assert ctx.adapters == ((adapter, 1.0),)
        assert ctx.fingerprint is fingerprint
        np.testing.assert_array_equal(ctx.state_seq_get_data(1), before)
        ctx.set_adapters([(adapter, 1.0)])  # what is set already
        ctx.logits()
        ctx.set_adapters([(other, 1.0)], clear=True)
        assert ctx.seq_pos_max(1) == -1
        with pytest.raises(LogitsUnavailableError):
            ctx.logits()
        assert ctx.fingerprint != fingerprint


def test_device_states_are_void_afterwards(adapter: Adapter):
    with context("dense") as ctx:
        ctx.prefill(IDS)
        blob = ctx.state_seq_get_data(0, SeqFlags.ON_DEVICE)
        ctx.set_adapters([(adapter, 1.0)], clear=True)
        ctx.prefill(IDS)
        with pytest.raises(OnDeviceStateError):
            ctx.state_seq_set_data(blob, 0, SeqFlags.ON_DEVICE)


@pytest.mark.parametrize("kind", ["dense", "iswa", "jamba", "qwen2vl"])
def test_a_snapshot_goes_on_with_its_adapters(kind: str, tmp_path: Path):
    loaded = Adapter(model(kind), tiny.lora(kind, targets=("blk.1.attn_q.weight", "blk.1.ffn_down.weight")))
    with context(kind) as ctx, context(kind) as found:
        for each in (ctx, found):
            each.set_adapters([(loaded, 0.7)])
        ctx.prefill(IDS)
        Snapshot.take(ctx, 0, IDS).save(tmp_path / "s")
        Snapshot.open(tmp_path / "s").restore(found, 0)
        for token in (1, 2, 3):
            ctx.decode([token])
            found.decode([token])
            assert (ctx.logits().argmax(), found.logits().argmax()) == (ctx.logits().argmax(),) * 2
            assert np.abs(ctx.logits() - found.logits()).max() < 0.02


# --- lifetimes ------------------------------------------------------------------------------------------------------


def test_closing():
    loaded = Model(tiny.path("dense"))
    adapter = Adapter(loaded, tiny.lora("dense"))
    expected = logits((Adapter(model("dense"), tiny.lora("dense")), 1.0))
    ctx = context(loaded)
    ctx.set_adapters([(adapter, 1.0)])
    adapter.close()
    adapter.close()
    assert adapter.closed
    assert "closed" in repr(adapter)
    loaded.close()
    gc.collect()
    ctx.prefill(IDS)  # the context keeps both
    np.testing.assert_array_equal(ctx.logits(), expected)
    with context("dense") as another, pytest.raises(ClosedError):
        another.set_adapters([(adapter, 1.0)])
    with pytest.raises(ClosedError):
        Adapter(loaded, tiny.lora("dense"))
    ctx.close()
    with pytest.raises(ClosedError):
        ctx.set_adapters([])


@pytest.mark.parametrize("order", ["model adapter ctx", "ctx adapter model", "adapter ctx model", "ctx model adapter"])
def test_in_any_order_and_at_the_end(order: str):
    """Also in a cycle, and when the interpreter ends with everything open."""
    code = """
import gc, sys
from llamastate import Adapter, Model
from tests import tiny
from tests.helpers import context
def make():
    model = Model(tiny.path("dense"))
    adapter = Adapter(model, tiny.lora("dense"))
    ctx = context(model)
    ctx.set_adapters([(adapter, 1.0)])
    ctx.decode([1])
    return {"model": model, "adapter": adapter, "ctx": ctx}
for close in (True, False):
    things = make()
    for name in sys.argv[1].split():
        thing = things.pop(name)
        if close:
            thing.close()
        del thing
        gc.collect()
cycle = make()
cycle["self"] = cycle
del cycle
gc.collect()
left = make()
print("end")
"""
    done = children.run(code, order)
    assert (done.returncode, done.stdout.strip()) == (0, "end"), done.stderr


def test_loading_while_others_decode():
    """A model's set of adapters is walked by decodes; nothing comes in between."""
    stop = threading.Event()
    wrong: list[BaseException] = []

    def decode() -> None:
        try:
            with context("dense") as ctx:
                while not stop.is_set():
                    ctx.prefill(IDS)
                    ctx.clear()
                    with context("dense", n_ctx=256) as short:
                        short.decode([1])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=decode) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(40):
        with (
            Adapter(model("dense"), tiny.lora("dense", lora_seed=i % 2)) as adapter,
            context("dense", n_ctx=256) as ctx,
        ):
            ctx.set_adapters([(adapter, 1.0)])
            ctx.decode([1])
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


# --- bad input ------------------------------------------------------------------------------------------------------


def test_arguments(adapter: Adapter):
    with context("dense") as ctx, context("iswa") as foreign:
        for entries in (
            [adapter],
            [(adapter,)],
            [(adapter, 1.0, 2)],
            [("x", 1.0)],
            [(adapter, "x")],
            [(adapter, float("nan"))],
            [(adapter, float("inf"))],
            [(adapter, 1e300)],
            [(adapter, None)],
            [(adapter, 1.0), (adapter, 0.5)],
        ):
            with pytest.raises(AdapterLoadError):
                ctx.set_adapters(entries)
        with pytest.raises(AdapterLoadError, match="another model"):
            foreign.set_adapters([(adapter, 1.0)])
        assert ctx.adapters == foreign.adapters == ()


def test_files(tmp_path: Path):
    (tmp_path / "text").write_text("no adapter")
    (tmp_path / "empty").touch()
    for path in (
        "missing",
        tmp_path,
        tmp_path / "text",
        tmp_path / "empty",
        tiny.path("dense"),
        "a\0b",
        5,
        "/dev/null",
    ):
        with pytest.raises(AdapterLoadError):
            Adapter(model("dense"), path)
    with pytest.raises(AdapterLoadError):
        Adapter("model", tiny.lora("dense"))
    for foreign in (model("iswa"), model("mamba"), model("dense", n_embd=32, n_ff=64)):
        with pytest.raises(AdapterLoadError):
            Adapter(foreign, tiny.lora("dense"))


def crafted(path: Path, tensors: dict[str, np.ndarray], **metadata: Any) -> Path:
    out = gguf.GGUFWriter(path, metadata.pop("arch", "llama"))
    for name, value in {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
        **metadata,
    }.items():
        if value is not None:
            add = {str: out.add_string, float: out.add_float32, int: out.add_uint32}[type(value)]
            add(name, value)
    for name, data in tensors.items():
        out.add_tensor(name, data)
    tiny.write(out)
    return path


def pair(base: str, a: tuple[int, ...], b: tuple[int, ...], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Shapes as NumPy has them, slowest dimension first."""
    return {f"{base}.lora_a": np.ones(a, dtype), f"{base}.lora_b": np.ones(b, dtype)}


Q = "blk.0.attn_q.weight"  # 64 → 64
EMBEDDINGS = "token_embd.weight"  # 256 rows of 64


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        pair(Q, (4, 63), (64, 4)),
        pair(Q, (4, 64), (63, 4)),
        pair(Q, (4, 64), (64, 5)),
        pair(Q, (2, 4, 64), (2, 64, 4)),  # more experts than there are
        pair(Q, (2, 4, 64), (64, 4)),
        pair(Q, (4, 64), (64, 4), np.int32),
        pair(Q, (4, 64), (64, 4), np.float64),
        pair("blk.9.attn_q.weight", (4, 64), (64, 4)),
        pair(EMBEDDINGS, (4, 64), (256, 4)),
        pair(EMBEDDINGS, (256, 4), (64, 5)),
        {f"{Q}.lora_a": np.ones((4, 64), np.float32)},
        {f"{Q}.lora_b": np.ones((64, 4), np.float32)},
        {Q: np.ones((64, 64), np.float32)},
        {"lora_a": np.ones((4, 64), np.float32)},
        {f"{Q}.lora_a.lora_b": np.ones((4, 64), np.float32)},
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, tensors: dict[str, np.ndarray]):
    with pytest.raises(AdapterLoadError) as caught:
        Adapter(model("dense"), crafted(tmp_path / "x.gguf", tensors))
    assert caught.value.path == str(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    "metadata",
    [
        {"general.type": 5},
        {"general.type": None},
        {"general.type": "model"},
        {"adapter.type": 5},
        {"adapter.type": "other"},
        {"adapter.lora.alpha": "text"},
        {"adapter.lora.alpha": 8},
        {"adapter.lora.alpha": float("nan")},
        {"arch": "gemma3"},
    ],
    ids=str,
)
def test_metadata_that_llama_cpp_would_abort_on(tmp_path: Path, metadata: dict[str, Any]):
    with pytest.raises(AdapterLoadError):
        Adapter(model("dense"), crafted(tmp_path / "x.gguf", pair(Q, (4, 64), (64, 4)), **metadata))


def test_what_does_fit(tmp_path: Path):
    for i, tensors in enumerate(
        (
            pair(Q, (4, 64), (64, 4)),
            pair(Q, (4, 64), (64, 4), np.float16),
            pair(EMBEDDINGS, (256, 4), (64, 4)),
            {**pair(Q, (1, 64), (64, 1)), "blk.0.attn_norm.weight": np.ones(64, np.float32)},
        )
    ):
        with context("dense") as ctx:
            ctx.set_adapters([(Adapter(ctx.model, crafted(tmp_path / f"{i}.gguf", tensors)), 0.01)])
            ctx.prefill(IDS)
            assert np.isfinite(ctx.logits()).all()


def test_damaged_files(tmp_path: Path):
    """In a child: an abort would be seen."""
    done = children.run(
        """
import random, sys
from pathlib import Path
from llamastate import Adapter, AdapterLoadError
from tests import tiny
from tests.helpers import context, model
good = tiny.lora("dense").read_bytes()
chance = random.Random(6)
refused = 0
for i in range(400):
    bad = bytearray(good)
    for _ in range(chance.randrange(1, 4)):
        bad[chance.randrange(600)] = chance.choice((0, 1, 2, 127, 255, chance.randrange(256)))
    if i % 4 == 0:
        del bad[chance.randrange(len(bad)):]
    path = Path(sys.argv[1], f"{i}.gguf")
    path.write_bytes(bad)
    try:
        adapter = Adapter(model("dense"), path)
    except AdapterLoadError:
        refused += 1
        continue
    with context("dense", n_ctx=256) as ctx:
        ctx.set_adapters([(adapter, 1.0)])
        ctx.decode([1, 2, 3])
print(refused)
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert 200 < int(done.stdout) <= 400
