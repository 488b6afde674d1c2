"""Model files and parameters of contexts that will not do. What might end a process is tried in one of its own."""

from __future__ import annotations

import contextlib
import json
import os
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llamastate import Context, ContextCreateError, LogitsUnavailableError, Model, ModelLoadError, TokenizeError, probe
from tests import children, tiny
from tests.helpers import context, model

# --- model files ------------------------------------------------------------------------------------------------------


def test_files_that_are_no_model(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder.gguf").mkdir()
    data = tiny.path("dense").read_bytes()
    contents = {
        "empty": b"",
        "short": b"GG",
        "text": b"hello world" * 100,
        "zeros": bytes(4096),
        "swapped": b"FUGG" + data[4:],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / name for name in ("missing", "folder.gguf", "pipe", *contents)]
    for path in (*paths, "", "a\0b", "/dev/zero", "\udcff", tmp_path / "text" / "x", tmp_path / ("x" * 5000)):
        with pytest.raises(ModelLoadError) as caught:
            Model(path)
        assert caught.value.path == os.fsdecode(path)
        assert caught.value.reason
        assert isinstance(caught.value, OSError)
    for path in (None, 5, 1.5, object()):
        with pytest.raises(ModelLoadError) as caught:
            Model(path)  # type: ignore[arg-type]
        assert (caught.value.path, caught.value.reason) == (None, "not a path")


# What a damaged GGUF can be: refused, or a model that works. Whether llama.cpp survives it shows in the exit status.
TRY_FILES = """
import json, pathlib, sys
from tests.children import limit_memory
limit_memory()
from llamastate import Context, LlamaStateError, Model, ModelLoadError
source = pathlib.Path(sys.argv[1]).read_bytes()
file = pathlib.Path(sys.argv[2])
outcomes = []
for front, size, at, value in json.load(sys.stdin):
    data = bytearray(bytes.fromhex(front) + source[len(front) // 2 : size])
    if at is not None:
        data[at] ^= value
    file.write_bytes(data)
    print(front, size, at, value, file=sys.stderr, flush=True)
    try:
        with Model(file) as model, Context(model, n_ctx=64, n_threads=1) as ctx:
            ctx.decode([1, 2])
        outcomes.append("loaded")
    except ModelLoadError as error:
        assert error.path == str(file) and error.reason
        outcomes.append("refused")
    except LlamaStateError as error:
        outcomes.append(type(error).__name__)
print(json.dumps(outcomes))
"""


def outcomes(tmp_path: Path, kind: str, cases: list[tuple[str, int | None, int | None, int]]) -> list[str]:
    with children.start(TRY_FILES, tiny.path(kind), tmp_path / "damaged.gguf") as process:
        out, err = process.communicate(json.dumps(cases), timeout=250)
    assert process.returncode == 0, err[-500:]
    found: list[str] = json.loads(out)
    assert len(found) == len(cases)
    return found


@pytest.mark.parametrize("kind", ["dense", "mamba", "lfm2"])
def test_cut_models(tmp_path: Path, kind: str):
    data = tiny.path(kind).read_bytes()
    start = gguf.GGUFReader(tiny.path(kind)).data_offset
    cuts = {*range(4, 40), *range(40, start, max(1, start // 60)), start - 1, start, start + 1, len(data) - 1}
    cases = [("", cut, None, 0) for cut in sorted(cuts)]
    assert set(outcomes(tmp_path, kind, cases)) == {"refused"}


@pytest.mark.parametrize("kind", ["dense", "iswa"])
def test_every_bit_of_a_model_header(tmp_path: Path, kind: str):
    """Magic, version, number of tensors and of keys; then the length of the first key."""
    cases = [("", None, at, 1 << bit) for at in range(32) for bit in range(8)]
    found = outcomes(tmp_path, kind, cases)
    assert set(found) <= {"refused", "loaded"}
    loaded = [at for at in range(64) if found[at] != "refused"]
    assert loaded == [32]  # of magic and version: version 2, which llama.cpp reads as well


def test_noise_behind_a_good_header(tmp_path: Path):
    rng = random.Random(1)
    data = tiny.path("dense").read_bytes()
    sizes = [(front, size) for front in (4, 8, 16, 24, 32, 64, 200) for size in (0, 1, 8, 100, 5000)]
    cases = [(data[:n].hex() + rng.randbytes(size).hex(), n + size, None, 0) for n, size in sizes]
    assert set(outcomes(tmp_path, "dense", cases)) == {"refused"}


# --- models for other things ------------------------------------------------------------------------------------------


def test_a_model_without_weights_makes_no_context():
    with Model(tiny.path("chat"), vocab_only=True) as vocabulary:
        assert vocabulary.tokenize("the and").size
        with pytest.raises(ContextCreateError) as caught:
            Context(vocabulary)
        assert caught.value.reason == "vocab_only"
        assert caught.value.params is not None


def test_a_model_without_vocabulary_makes_no_text():
    dense = model("dense")
    for call in (
        lambda: dense.tokenize("text"),
        lambda: dense.tokenize(""),
        lambda: dense.detokenize([1]),
        lambda: dense.detokenize([]),
        lambda: dense.token_to_piece(1),
    ):
        with pytest.raises(TokenizeError) as caught:
            call()
        assert caught.value.reason == "no vocabulary"


@pytest.mark.parametrize("kind", ["spm", "bpe"])
def test_text_of_any_bytes(kind: str):
    chat = model("chat", vocab=kind)
    rng = random.Random(2)
    refused = []
    for size in (0, 1, 2, 3, 7, 100, 10_000):
        for text in (rng.randbytes(size), b"\xff" * size, b"\0" * size, b"\xf0\x9f" * size, b"<|im_start|>" * size):
            try:
                ids = chat.tokenize(text, parse_special=bool(size % 2))
            except TokenizeError as error:
                refused.append(error.reason)
                continue
            assert ((ids >= 0) & (ids < chat.n_vocab)).all()
            assert isinstance(chat.detokenize(ids), str)
    assert set(refused) <= {"invalid codepoint"}  # which only a byte-level vocabulary minds
    for text in ("\udcff", 5, None, ["a"], object()):
        with pytest.raises(TokenizeError):
            chat.tokenize(text)  # type: ignore[arg-type]
    assert chat.tokenize(memoryview(bytearray(b"the"))).tolist() == chat.tokenize("the").tolist()


# --- contexts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("n_ctx", [-1, 2**31, 2**40, 1.5, "512", None, []]),
        ("n_seq_max", [0, -1, 257, 2**40, "1", None]),
        ("n_batch", [0, -1, 2**24 + 1, 2**31, "1", None]),
        ("n_ubatch", [0, -1, 2**18 + 1, 2**31, "1", None]),
        ("n_threads", [0, -1, 513, 2**40, "1", 1.5]),
        ("n_threads_batch", [-1, 513, "1", 1.5]),
        ("flash_attn", ["yes", "", None, True, 1, []]),
        ("type_k", ["f17", "", None, 1, "Q8_0", []]),
        ("type_v", ["f17", "i32", None, {}]),
        ("pooling_type", ["max", None, 0, []]),
        ("on_busy", ["fail", None, True]),
        ("rope_scaling_type", ["cubic", None, 1]),
        ("rope_freq_base", [-1.0, float("nan"), float("inf"), 1e300, 10**400, "x", None, []]),
        ("rope_freq_scale", [-1.0, float("nan"), -float("inf"), 1e39, "x"]),
        ("yarn_ext_factor", [float("nan"), float("inf"), "x", None]),
        ("yarn_orig_ctx", [-1, 2**32, 1.5, "x"]),
    ],
)
def test_parameters_out_of_range(name: str, values: list[Any]):
    for value in values:
        with pytest.raises(ContextCreateError) as caught:
            Context(model("dense"), **({"n_threads": 1} | {name: value}))
        assert caught.value.reason == name or "not an integer" in str(caught.value)
        assert isinstance(caught.value, RuntimeError)
    with pytest.raises(TypeError):
        Context(model("dense"), **{f"{name}_": values[0]})
    for other in (None, "model", object()):
        with pytest.raises(ContextCreateError) as caught:
            Context(other)  # type: ignore[arg-type]
        assert caught.value.reason == "no model"


def test_parameters_that_llama_cpp_refuses():
    for params in ({"type_v": "q8_0", "flash_attn": "off"}, {"type_v": "q4_0", "flash_attn": "off"}):
        with pytest.raises(ContextCreateError) as caught:
            context("dense", **params)
        assert "flash" in caught.value.reason.lower()
        assert caught.value.params["type_v"] == caught.value.params["type_v"]


def test_fewer_outputs_than_sequences():
    """Where llama.cpp would abort."""
    with pytest.raises(ContextCreateError) as caught:
        context("dense", n_seq_max=4, n_batch=3)
    assert caught.value.reason == "n_batch"
    for params in ({"n_seq_max": 256, "n_ctx": 1}, {"n_seq_max": 256, "n_ctx": 1, "kv_unified": False}):
        with context("dense", **params) as ctx:
            ctx.decode([1], seq_id=255)
            assert ctx.seq_pos_max(255) == 0


def test_a_cache_that_is_larger_than_memory(monkeypatch: pytest.MonkeyPatch):
    """Refused before a page of it is touched: the system would grant it, and kill somebody when it is filled."""
    for kind in ("dense", "iswa", "lfm2swa", "qwen2vl"):
        with pytest.raises(ContextCreateError) as caught:
            context(kind, n_ctx=2**31 - 300, n_seq_max=4)
        assert caught.value.reason == "memory"
    with context("mamba", n_ctx=2**31 - 300) as ctx:  # whose state is as small for any length
        ctx.decode([1, 2, 3])
    monkeypatch.setattr(probe, "available_memory", lambda: 3_000_000)
    with pytest.raises(ContextCreateError) as caught:
        context("dense", n_ctx=4096)
    assert caught.value.reason == "memory"
    with context("dense", n_ctx=1024) as ctx:
        ctx.decode([1, 2, 3])
    monkeypatch.setattr(probe, "available_memory", lambda: None)
    with context("dense", n_ctx=4096) as ctx:
        ctx.decode([1, 2, 3])


def test_what_a_gpu_takes_of_a_cache(monkeypatch: pytest.MonkeyPatch):
    """A model may ask for a GPU where there is none. Where there is one, the rest of the layers is the host's."""
    everything = {}
    for name in ("dense", "iswa", "jamba", "mamba"):
        monkeypatch.setattr(probe, "available_memory", lambda: 0)
        with Model(tiny.path(name)) as plain, pytest.raises(ContextCreateError) as caught:
            Context(plain, n_ctx=4096)
        everything[name] = int(str(caught.value).split(" bytes")[0].split()[-1])
    for name, needed in everything.items():
        for layers in (1, 2, 99, -1):
            model = Model(tiny.path(name), n_gpu_layers=layers)
            last = None
            for gpus, offload in (([], True), ([32], False), ([32], True)):
                monkeypatch.setattr(probe.handles, "gpu_alignments", lambda gpus=gpus: gpus)
                params = {"n_ctx": 4096, "offload_kqv": offload}
                monkeypatch.setattr(probe, "available_memory", lambda: 1)
                if gpus and offload and layers in (99, -1):
                    Context(model, n_threads=1, **params).close()  # it is for the GPU to refuse
                    continue
                with pytest.raises(ContextCreateError) as caught:
                    Context(model, **params)
                last = int(str(caught.value).split(" bytes")[0].split()[-1])
                if not (gpus and offload):
                    assert last == needed
            # the first of them is the output's: it takes nothing of the cache along
            if layers == 1:
                assert last == needed
            if layers == 2:
                assert 0 < last < needed


EXTREMES = """
from tests.children import limit_memory
from llamastate import probe
limited = limit_memory()
probe.available_memory = lambda: None if limited else 1 << 30  # llama.cpp is to find out itself
from llamastate import Context, ContextCreateError
from tests.helpers import context, tokens
cases = [
    {"n_ctx": 2**31 - 300, "n_batch": 2**24, "n_ubatch": 2**18}, {"n_ctx": 2**26}, {"n_ctx": 2**23},
    {"n_batch": 2**24, "n_ubatch": 2**18}, {"n_ctx": 5, "n_batch": 5, "n_ubatch": 1},
    {"n_seq_max": 256}, {"n_seq_max": 256, "kv_unified": False, "n_ctx": 256},
    {"rope_freq_base": 1e-30}, {"rope_freq_base": 3e38}, {"rope_freq_scale": 3e38}, {"rope_freq_scale": 1e-40},
    {"rope_scaling_type": "yarn", "yarn_ext_factor": 1e30, "yarn_beta_fast": -3.0, "yarn_beta_slow": 0.0},
    {"rope_scaling_type": "yarn", "yarn_orig_ctx": 2**32 - 1, "yarn_attn_factor": -1e30},
    {"rope_scaling_type": "longrope"}, {"rope_scaling_type": "linear"}, {"rope_scaling_type": "none"},
    *({"embeddings": embeddings, "pooling_type": pooling} for embeddings in (True, False)
      for pooling in ("unspecified", "none", "mean", "cls", "last", "rank")),
]
made = refused = 0
for kind in ("dense", "iswa", "mamba", "lfm2", "qwen35"):
    for params in cases:
        print(kind, params, flush=True)
        try:
            with context(kind, **params) as ctx:
                ctx.decode(tokens(5))
                blob = ctx.state_seq_get_data(0)
                ctx.state_seq_set_data(blob, 0)
                ctx.decode([1])
                made += 1
        except ContextCreateError as error:
            assert error.reason and error.params is not None
            refused += 1
print("all alive", made, refused)
"""


def test_extreme_parameters_never_end_the_process():
    result = children.run(EXTREMES)
    assert result.returncode == 0, result.stdout[-200:] + result.stderr[-500:]
    *_, made, refused = result.stdout.split()
    assert int(made) > 100
    assert int(refused) > 5


TYPES = """
from llamastate import ContextCreateError
from llamastate._native.consts import CACHE_TYPES
from tests.helpers import context, tokens
made = 0
for flash_attn in ("on", "off", "auto"):
    for type_k in CACHE_TYPES:
        for type_v in CACHE_TYPES:
            print(flash_attn, type_k, type_v, flush=True)
            try:
                with context("dense", flash_attn=flash_attn, type_k=type_k, type_v=type_v) as ctx:
                    ctx.decode(tokens(5))
                    ctx.state_seq_set_data(ctx.state_seq_get_data(0), 0)
                    ctx.decode([1])
                    made += 1
            except ContextCreateError as error:
                assert flash_attn == "off" and "flash" in error.reason.lower(), error
print("all alive", made)
"""


def test_every_pair_of_cache_types():
    result = children.run(TYPES)
    assert result.returncode == 0, result.stdout[-100:] + result.stderr[-500:]
    assert int(result.stdout.split()[-1]) >= 2 * 81


def test_pooled_embeddings_that_are_not_there():
    for pooling in ("none", "mean", "cls", "last", "rank"):
        with context("dense", embeddings=True, pooling_type=pooling) as ctx:
            ctx.decode([1, 2, 3])
            for call in (lambda: ctx.embeddings(0), lambda: ctx.embeddings_seq(0), lambda: ctx.embeddings(-1)):
                with contextlib.suppress(LogitsUnavailableError):
                    assert np.isfinite(call()).all()
