"""The tiny models are what the tests take them for. Asked of llama.cpp through llama_cpp, not through this package."""

from __future__ import annotations

import llama_cpp
import numpy as np
import pytest

from tests import tiny

TOKENS = np.random.default_rng(0).integers(5, 250, 48)
TEXTS = ["the of when and", "héllo wörld 日本 🙂\n\t x", '{"a": [1, 2.5]}', "<|im_start|>user\nhi<|im_end|>", "   ", ""]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    @llama_cpp.llama_log_callback
    def swallow(level, text, user_data):
        pass

    llama_cpp.llama_log_set(swallow, None)
    yield
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(0), None)


class Decoder:
    """A model and a context of one thread."""

    def __init__(self, path, *, cache_type=llama_cpp.GGML_TYPE_F16):
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        assert self.model, path
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch, params.kv_unified = 256, 1, 1, True
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k = params.type_v = cache_type
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        assert self.context, path

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def logits(self, tokens) -> np.ndarray:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        array = (llama_cpp.llama_token * len(tokens))(*map(int, tokens))
        assert llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens))) == 0
        n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (n_vocab,)).copy()

    def kind(self) -> str:
        window = llama_cpp.llama_model_n_swa(self.model) > 0
        if llama_cpp.llama_model_is_hybrid(self.model):
            return "hybrid-iswa" if window else "hybrid"
        if llama_cpp.llama_model_is_recurrent(self.model):
            return "recurrent"
        return "iswa" if window else "attention"

    def mrope(self) -> bool:
        rope = llama_cpp.llama_model_rope_type(self.model)
        return rope in (llama_cpp.LLAMA_ROPE_TYPE_MROPE, llama_cpp.LLAMA_ROPE_TYPE_IMROPE)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_kind_and_sensitivity(name):
    with Decoder(tiny.path(name)) as decoder:
        assert decoder.kind() == tiny.MODELS[name].kind
        assert decoder.mrope() == tiny.MODELS[name].mrope
        logits = decoder.logits(TOKENS)
        assert np.isfinite(logits).all()
        # A state that lost any one token must be seen in the logits, well above the noise of other batch splits.
        changed = TOKENS.copy()
        changed[24] ^= 1
        assert np.abs(decoder.logits(changed) - logits).max() > 0.02 * logits.std()


@pytest.mark.parametrize("cache_type", [llama_cpp.GGML_TYPE_Q8_0, llama_cpp.GGML_TYPE_Q4_0])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_any_cache_type(name, cache_type):
    with Decoder(tiny.path(name), cache_type=cache_type) as decoder:
        assert np.isfinite(decoder.logits(TOKENS)).all()


def test_seed_changes_weights_and_nothing_else(tmp_path):
    first, again, other = (
        tiny.path("dense", tmp_path / folder, seed=seed).read_bytes() for folder, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again
    assert len(first) == len(other)
    assert first != other
    assert tiny.path("dense", tmp_path) != tiny.path("dense", tmp_path, seed=1)


@pytest.mark.parametrize("vocab", ["spm", "bpe"])
def test_tokenizers_give_back_the_text(vocab):
    llm = llama_cpp.Llama(str(tiny.path("chat", vocab=vocab)), vocab_only=True, verbose=False)
    try:
        for text in TEXTS:
            tokens = llm.tokenize(text.encode(), add_bos=False, special=True)
            back = llm.detokenize(tokens, special=True).decode()
            # SentencePiece puts a space before each run of text.
            assert back == text if vocab == "bpe" else back.replace(" ", "") == text.replace(" ", "")
        assert llm.metadata["tokenizer.chat_template"] == tiny.CHAT_TEMPLATE
    finally:
        llm.close()
