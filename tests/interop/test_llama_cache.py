"""``LlamaStateCache``: completions with it are the completions without it."""

from __future__ import annotations

import gc
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from llamastate import ClosedError, Context, ContextBusyError, InvalidArgumentError
from llamastate.interop.llama_cpp import LlamaStateCache, accelerate
from llamastate.prefix import PrefixStore
from tests import children, models, tiny
from tests.helpers import assert_same_logits
from tests.interop.llamas import KINDS, complete, ids, last_logits
from tests.interop.test_attach import make

BLOCK = 16
SHARED = ids(100, seed=1)
#: They begin alike; the last goes on from the first.
PROMPTS = [SHARED + ids(20 + i, seed=2 + i) for i in range(4)]


def tiny_llm(kind: str = "chat", **params: Any) -> llama_cpp.Llama:
    seed = params.pop("seed_of_weights", 0)
    return make(tiny.path(kind, vocab="spm", seed=seed), **params)


@pytest.fixture
def llms() -> Iterator[Callable[..., llama_cpp.Llama]]:
    made: list[llama_cpp.Llama] = []

    def new(kind: str = "chat", cache: LlamaStateCache | None = None, **params: Any) -> llama_cpp.Llama:
        made.append(tiny_llm(kind, **params))
        made[-1].set_cache(cache)
        return made[-1]

    yield new
    for llm in made:
        llm.close()


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[LlamaStateCache]:
    with LlamaStateCache(tmp_path / "cache", block_tokens=BLOCK, anchor_tokens=BLOCK) as cache:
        yield cache


def without(llms: Callable[..., llama_cpp.Llama], kind: str, prompt: list[int], **params: Any) -> Any:
    """What a Llama says that has never done anything else."""
    return complete(llms(kind, **params), prompt)


def same(found: Any, expected: Any) -> None:
    assert found[0] == expected[0]
    assert_same_logits(found[1], expected[1])


# --- exact, or a miss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params", [{}, {"flash_attn": True, "swa_full": False, "n_batch": 64}], ids=["default", "other"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_completions_are_the_same(llms, cache, kind, params):
    """First, with a part in common, again, going on, and with another between."""
    llm = llms(kind, cache, **params)
    first = without(llms, kind, PROMPTS[0], **params)
    longer = first[0] + ids(30, seed=9)
    prompts = [*PROMPTS, PROMPTS[0], longer, ids(40, seed=10), PROMPTS[2], longer]
    for prompt in prompts:
        same(complete(llm, prompt), without(llms, kind, prompt, **params))
    stats = cache.stats()
    assert stats.hits >= 3
    assert stats.hit_tokens >= 3 * 96
    assert cache.store.verify() == []


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_restart(llms, tmp_path, kind):
    """Another Llama, and another cache over the same folder."""
    for again in (False, True):
        with LlamaStateCache(tmp_path, block_tokens=BLOCK, anchor_tokens=BLOCK) as cache:
            llm = llms(kind, cache)
            for prompt in PROMPTS[:2]:
                same(complete(llm, prompt), without(llms, kind, prompt))
            assert (cache.stats().disk_reads > 0) == again
            assert cache.stats().hit_tokens >= (2 * 112 if again and kind == "chat" else 96 * again)


@pytest.mark.parametrize("kind", ["chat", "iswa", "mamba", "jamba"])
def test_equal_bits_at_equal_batches(llms, cache, kind):
    """Where the same tokens go into the same decodes, the same numbers come out."""
    complete(llms(kind, cache), PROMPTS[0])
    llm = llms(kind, cache)
    found = complete(llm, PROMPTS[1])
    n = cache.stats().hit_tokens
    assert n == 96
    cut = llms(kind)
    for at in range(0, n, n if kind == "chat" else BLOCK):
        cut.eval(PROMPTS[1][at : min(n, at + (n if kind == "chat" else BLOCK))])
    for at in range(n, len(PROMPTS[1]), len(PROMPTS[1]) if kind == "chat" else BLOCK):
        cut.eval(PROMPTS[1][at : len(PROMPTS[1]) if kind == "chat" else at + BLOCK])
    expected = complete(cut, PROMPTS[1])
    assert found[0] == expected[0]
    # how cells lie in a window's cache after a restore moves the last bits
    assert_same_logits(found[1], expected[1])
    if kind != "iswa":
        assert np.abs(found[1] - expected[1]).max() == 0


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_real_models(name, tmp_path):
    """At equal batch shapes, bit by bit where the model has no window."""
    path = getattr(models, name)()
    text = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 4
    with LlamaStateCache(tmp_path, block_tokens=BLOCK, anchor_tokens=BLOCK) as cache:
        llm = make(path)
        llm.set_cache(cache)
        shared = llm.tokenize(text.encode())[:64]
        first, second = (shared + llm.tokenize(end, add_bos=False) for end in (b" One day it", b" At night they"))
        complete(llm, first)
        llm.reset()
        found = complete(llm, second)
        assert cache.stats().hit_tokens == 64
        llm.close()
        bare = make(path)
        for at in range(0, len(second), 64 if name == "smollm2" else BLOCK):
            bare.eval(second[at : at + (64 if name == "smollm2" else BLOCK)])
        expected = complete(bare, second)
        bare.close()
    assert found[0] == expected[0]
    assert np.abs(found[1] - expected[1]).max() <= (0 if name == "smollm2" else 0.5)


@pytest.mark.parametrize(
    "other",
    [
        {"seed_of_weights": 1},
        {"type_k": llama_cpp.GGML_TYPE_Q8_0, "flash_attn": True},
        {"flash_attn": True},
        {"rope_freq_base": 5000.0},
    ],
    ids=["weights", "type", "flash", "rope"],
)
def test_another_model_is_a_miss(llms, cache, other):
    complete(llms("chat", cache), PROMPTS[0])
    same(complete(llms("chat", cache, **other), PROMPTS[0]), without(llms, "chat", PROMPTS[0], **other))
    assert cache.stats().hits == 0
    same(complete(llms("chat", cache), PROMPTS[0]), without(llms, "chat", PROMPTS[0]))
    assert cache.stats().hits == 1


def test_damage_is_a_miss(llms, tmp_path):
    with LlamaStateCache(tmp_path, block_tokens=BLOCK) as cache:
        complete(llms("chat", cache), PROMPTS[0])
    files = list(tmp_path.glob("blocks/*/*"))
    assert files
    for file in files:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    with LlamaStateCache(tmp_path, block_tokens=BLOCK) as cache:
        same(complete(llms("chat", cache), PROMPTS[0]), without(llms, "chat", PROMPTS[0]))
        assert cache.stats().hit_tokens == 0
        assert cache.stats().disk.damaged == 1


# --- sharing ----------------------------------------------------------------------------------------------------------


def test_what_is_shared_is_stored_once(llms, cache):
    llm = llms("chat", cache)
    whole = [len(complete(llm, prompt)[0]) // BLOCK * BLOCK for prompt in PROMPTS]
    # six blocks in common; of each the rest up to the last whole block
    assert cache.stats().stored_tokens == 96 + sum(n - 96 for n in whole)
    size = cache.cache_size
    for prompt in PROMPTS:
        complete(llm, prompt)
    assert cache.cache_size == size


def test_what_the_llama_holds_is_not_loaded_again(llms, cache):
    llm = llms("chat", cache)
    for prompt in PROMPTS:
        complete(llm, prompt)
    assert cache.stats().queries == 0


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_it_stays_within_its_bounds(llms, tmp_path, where):
    llm = llms("chat")
    room = 200_000
    path = None if where == "memory" else tmp_path
    with LlamaStateCache(path, capacity_bytes=room, block_tokens=BLOCK, write_behind=False) as cache:
        assert cache.capacity_bytes == room
        llm.set_cache(cache)
        for seed in range(8):
            prompt = ids(120, seed=seed)
            same(complete(llm, prompt), without(llms, "chat", prompt))
            assert 0 < cache.cache_size <= room
        stats = cache.stats()
        assert stats.ram_bytes <= room
        evicted = stats.ram_evicted if stats.disk is None else stats.disk.evictions
        assert evicted > 0


def test_two_llamas_at_once(llms, cache):
    """Each in a thread of its own, of different models."""
    expected = {kind: [without(llms, kind, p) for p in PROMPTS] for kind in ("chat", "jamba")}
    made = {kind: [llms(kind, cache) for _ in range(2)] for kind in expected}
    found: dict[tuple[str, int], list[Any]] = {}

    def work(kind: str, i: int) -> None:
        found[kind, i] = [complete(made[kind][i], p) for p in PROMPTS]

    threads = [threading.Thread(target=work, args=(kind, i)) for kind in made for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (kind, _), rows in found.items():
        for one, other in zip(rows, expected[kind], strict=True):
            same(one, other)
    assert len(found) == 4


def test_two_processes(llms, tmp_path):
    """Both write and read one folder, and so does this one afterwards."""
    code = f"""
from tests.interop.test_llama_cache import *
with LlamaStateCache({str(tmp_path)!r}, block_tokens=BLOCK) as cache:
    llm = tiny_llm()
    llm.set_cache(cache)
    for prompt in PROMPTS * 3:
        print(*complete(llm, prompt)[0], sep=",")
        llm.reset()
    llm.close()
"""
    workers = [children.start(code) for _ in range(2)]
    expected = [without(llms, "chat", p)[0] for p in PROMPTS] * 3
    for worker in workers:
        with worker:
            out, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err
        assert [[int(i) for i in line.split(",")] for line in out.split()] == expected
    with LlamaStateCache(tmp_path, block_tokens=BLOCK) as cache:
        assert cache.store.verify() == []
        same(complete(llms("chat", cache), PROMPTS[1]), without(llms, "chat", PROMPTS[1]))
        assert cache.stats().hit_tokens == 112


# --- as llama-cpp-python uses it --------------------------------------------------------------------------------------


def test_every_way_to_complete(llms, cache):
    """Streams, chats, stop words, and samplers with a seed."""
    chat = [{"role": "user", "content": "the and of to in is that it for was on as with he be at by this " * 4}]
    ways: dict[str, Callable[[llama_cpp.Llama], Any]] = {
        "text": lambda llm: llm("the and of to " * 30, max_tokens=8, temperature=0.0)["choices"],
        "stream": lambda llm: [c["choices"] for c in llm("the of " * 40, max_tokens=8, temperature=0.0, stream=True)],
        "chat": lambda llm: llm.create_chat_completion(chat, max_tokens=8, temperature=0.0)["choices"],
        "seed": lambda llm: llm("that it for " * 40, max_tokens=8, temperature=1.5, seed=3)["choices"],
        "own seed": lambda llm: llm("that it for " * 40, max_tokens=8, temperature=1.5)["choices"],
        "stop": lambda llm: llm("was on as with " * 30, max_tokens=8, temperature=0.0, stop=["e"])["choices"],
    }
    for name, way in ways.items():
        expected = way(llms("chat", seed=5))
        for _ in range(2):
            assert way(llms("chat", cache, seed=5)) == expected, name
    assert cache.stats().hits >= len(ways)


def test_logprobs(llms, cache):
    """Of what is generated after a hit; of the whole prompt without one."""
    ask = {"max_tokens": 4, "temperature": 0.0, "logprobs": 2}
    text = "the and of to in is that it " * 10

    def rounded(llm: llama_cpp.Llama, **more: Any) -> Any:
        rows = llm.create_completion(text, **ask, **more)["choices"][0]["logprobs"]["token_logprobs"]
        return [None if row is None else round(float(row), 2) for row in rows]

    expected = {echo: rounded(llms("chat", logits_all=True), echo=echo) for echo in (False, True)}
    rounded(llms("chat", cache, logits_all=True))
    for echo in (False, True):
        assert rounded(llms("chat", cache, logits_all=True), echo=echo) == expected[echo]
        assert cache.stats().hits == 1
    llm = llms("chat", cache, logits_all=True)
    llm.create_completion(text, **ask)
    assert np.isnan(llm.scores[:64]).all()
    assert np.isfinite(llm.scores[llm.n_tokens - 4 : llm.n_tokens]).all()


def test_by_hand(llms, cache):
    """What a program does with a cache without a completion."""
    llm = llms("chat", cache)
    assert PROMPTS[0] not in cache
    with pytest.raises(KeyError):
        cache[PROMPTS[0]]
    complete(llm, PROMPTS[0])
    assert PROMPTS[1] in cache
    hit = cache[PROMPTS[1]]
    assert isinstance(hit, llama_cpp.LlamaState)
    assert (hit.n_tokens, hit.input_ids.tolist()) == (96, SHARED[:96])
    assert llm.n_tokens > 96, "looking it up changes nothing"
    other = llms("chat", cache)
    accelerate(other)
    other.load_state(hit)
    assert other._input_ids.tolist() == SHARED[:96]
    bare = llms("chat")
    bare.eval(SHARED[:96])
    for each in (other, bare):
        each.eval(SHARED[96:])
    assert_same_logits(last_logits(other), last_logits(bare))


@pytest.mark.parametrize("kind", ["chat", "iswa", "jamba"])
def test_putting_by_hand(llms, cache, kind):
    """A state that is not the present one either: the Llama is afterwards as it was."""
    llm = llms(kind, cache)
    accelerate(llm)
    llm.eval(PROMPTS[0])
    state = llm.save_state()
    llm.reset()
    llm.eval(PROMPTS[3])
    cache[PROMPTS[0]] = state
    assert llm._input_ids.tolist() == PROMPTS[3]
    llm.eval([300])
    bare = llms(kind)
    for tokens in (PROMPTS[3], [300]):
        bare.eval(tokens)
    assert_same_logits(last_logits(llm), last_logits(bare))
    other = llms(kind, cache)
    same(complete(other, [*PROMPTS[0], 270]), without(llms, kind, [*PROMPTS[0], 270]))
    assert cache.stats().hit_tokens >= 112


def test_taken_away(llms, cache):
    llm = llms("chat", cache)
    complete(llm, PROMPTS[0])
    size = cache.cache_size
    llm.set_cache(None)
    same(complete(llm, PROMPTS[1]), without(llms, "chat", PROMPTS[1]))
    assert cache.cache_size == size
    assert llm.save_state().scores.shape[0] == llm.n_tokens, "llama-cpp-python's own again"
    own = llama_cpp.LlamaRAMCache()
    llm.set_cache(own)
    complete(llm, PROMPTS[2])
    assert own.cache_size > 0


def test_over_a_store_that_is_there(llms, tmp_path):
    with PrefixStore(tmp_path, block_tokens=BLOCK) as store:
        with LlamaStateCache(store) as cache:
            complete(llms("chat", cache), PROMPTS[0])
            assert "LlamaStateCache" in repr(cache)
        assert store.lookup(PROMPTS[0]) == 112


def test_a_cache_of_ones_own(llms, tmp_path):
    class Counting(LlamaStateCache):
        asked = 0

        def __getitem__(self, key: Any) -> Any:
            self.asked += 1
            return super().__getitem__(key)

    with Counting(tmp_path, block_tokens=BLOCK) as cache:
        for _ in range(2):
            same(complete(llms("chat", cache), PROMPTS[0]), without(llms, "chat", PROMPTS[0]))
        assert (cache.asked, cache.stats().hits) == (2, 1)


def test_freed_at_once(cache):
    llm = tiny_llm()
    llm.set_cache(cache)
    for prompt in PROMPTS[:2]:
        complete(llm, prompt)
    complete(llm, ids(30))
    complete(llm, PROMPTS[0])
    died = [weakref.ref(each) for each in (llm, llm._ctx, llm._model)]
    gc.disable()
    try:
        del llm
        assert [reference() for reference in died] == [None] * 3
    finally:
        gc.enable()


# --- what it must not store -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [40, 0])
def test_what_the_llama_did_not_evaluate(llms, cache, before):
    """As an image does it: cells from elsewhere, and ids that say nothing about them."""
    llm = llms("chat", cache)
    complete(llm, ids(150, seed=7))
    llm.reset()
    llm.input_ids[:120] = PROMPTS[0]
    if before:
        llm.eval(PROMPTS[0][:before])
    # as a handler does it, past everything that could notice; llama.cpp knows the position itself
    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llm.ctx), 0, before, -1)
    elsewhere = (llama_cpp.llama_token * 40)(*ids(40, seed=99))
    assert llama_cpp.llama_decode(llm.ctx, llama_cpp.llama_batch_get_one(elsewhere, 40)) == 0
    llm.n_tokens = before + 40
    llm.eval(PROMPTS[0][before + 40 :])
    llm.create_completion(llm._input_ids.tolist(), max_tokens=4, temperature=0.0)
    other = llms("chat", cache)
    same(complete(other, PROMPTS[0]), without(llms, "chat", PROMPTS[0]))
    assert cache.stats().hit_tokens == before // BLOCK * BLOCK
    same(complete(llm, PROMPTS[0]), without(llms, "chat", PROMPTS[0]))


@pytest.mark.parametrize("change", ["decode", "restore", "shift", "inner"])
def test_what_somebody_else_has_changed(llms, cache, change):
    """An attachment that changes the cells under it, while it lives and when it is gone."""
    llm = llms("chat", cache)
    complete(llm, ids(20))
    if change == "inner":
        llm.eval(ids(10, seed=4))
        llm._ctx.kv_cache_clear()
        llm._ctx.decode(llm._batch)
    else:
        with Context.attach(llm) as ctx:
            if change == "decode":
                ctx.seq_rm(0, 10)
                ctx.decode(ids(40, seed=8))
            elif change == "restore":
                with Context(ctx.model, n_ctx=512, n_threads=1, flash_attn="off", kv_unified=False) as source:
                    source.decode(ids(60, seed=8))
                    ctx.state_seq_set_data(source.state_seq_get_data(0), 0)
            else:
                ctx.seq_add(0, 5, -1, 3)
    llm.n_tokens = 20
    llm.create_completion(llm._input_ids.tolist()[:20] + PROMPTS[0], max_tokens=2, temperature=0.0)
    prompt = ids(20)[:20] + PROMPTS[0]
    same(complete(llms("chat", cache), prompt), without(llms, "chat", prompt))


# --- misuse and trouble -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"capacity_bytes": -1},
        {"capacity_bytes": "much"},
        {"ram_bytes": -1},
        {"block_tokens": 0},
        {"anchor_tokens": 0},
        {"anchor_tokens": 1.5},
    ],
)
def test_bad_parameters(tmp_path, wrong):
    with pytest.raises(InvalidArgumentError):
        LlamaStateCache(tmp_path / "cache", **wrong)


def test_misuse(llms, cache):
    llm = llms("chat", cache)
    complete(llm, PROMPTS[0])
    for key in ("text", [0.5], None, [[1]]):
        with pytest.raises(InvalidArgumentError):
            cache[key]  # type: ignore[index]
        with pytest.raises(InvalidArgumentError):
            assert key in cache
    hit = cache[PROMPTS[0]]
    for name in ("llama_state", "llama_state_size", "scores", "seed"):
        with pytest.raises(InvalidArgumentError) as caught:
            getattr(hit, name)
        assert caught.value.name == name
    with pytest.raises(InvalidArgumentError):
        pickle.dumps(hit)
    strange = llms("chat")
    with pytest.raises(InvalidArgumentError, match="LlamaStateCache"):
        strange.load_state(hit)
    strange.eval(PROMPTS[0])
    for state in (strange.save_state(), pickle.loads(pickle.dumps(llm.save_state())), hit, None, 5):
        with pytest.raises(InvalidArgumentError):
            cache[PROMPTS[0]] = state  # type: ignore[assignment]


def test_closed(llms, tmp_path):
    llm = llms("chat")
    cache = LlamaStateCache(tmp_path)
    llm.set_cache(cache)
    complete(llm, PROMPTS[0])
    cache.close()
    cache.close()
    with pytest.raises(ClosedError, match=r"llm\.set_cache\(None\)"):
        complete(llm, PROMPTS[1])
    llm.set_cache(None)
    same(complete(llm, PROMPTS[1]), without(llms, "chat", PROMPTS[1]))


def test_busy(llms, cache):
    llm = llms("chat", cache)
    ctx = Context.attach(llm, on_busy="raise")
    raised: list[BaseException] = []

    def work() -> None:
        try:
            complete(llm, PROMPTS[0])
        except ContextBusyError as error:
            raised.append(error)

    with ctx.lock():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(raised) == 1
    same(complete(llm, PROMPTS[0]), without(llms, "chat", PROMPTS[0]))


def test_a_model_that_cannot_be_told(cache, tmp_path):
    """Its file is gone before anybody asked who it is: completions go on, and it is said once."""
    file = tmp_path / "model.gguf"
    file.write_bytes(tiny.path("chat", vocab="spm").read_bytes())
    llm = make(file)
    file.unlink()
    llm.set_cache(cache)
    with pytest.warns(RuntimeWarning, match="goes without"):
        first = complete(llm, PROMPTS[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        complete(llm, PROMPTS[1])
    assert cache.stats().stored_tokens == 0
    bare = tiny_llm()
    same(first, complete(bare, PROMPTS[0]))
    for each in (llm, bare):
        each.close()


def test_a_library_that_is_not_ours(llms, cache, monkeypatch):
    """As if llama_cpp ran on another copy of llama.cpp: its completions go on without the cache."""
    llm = llms("chat", cache)
    monkeypatch.setattr("llamastate._native.library", Path(__file__))
    with pytest.warns(RuntimeWarning, match="llama_cpp runs on"):
        found = complete(llm, PROMPTS[0])
    monkeypatch.undo()
    same(found, without(llms, "chat", PROMPTS[0]))
    assert cache.stats().stored_tokens == 0
