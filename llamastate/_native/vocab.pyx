# distutils: language = c++
# cython: language_level=3
"""What a model says about itself, and its vocabulary (``llama_model_*``, ``llama_vocab_*``, ``llama_tokenize``)."""

from libc.stdint cimport int32_t
from libcpp.string cimport string
from libcpp.vector cimport vector

from llamastate._native cimport llama as c
from llamastate._native.handles cimport ModelHandle
from llamastate.errors import TokenizeError


cdef const c.llama_vocab * text_vocab(ModelHandle m) except NULL:
    cdef const c.llama_vocab * v = m.vocab()
    # llama.cpp aborts the process when asked to tokenise without a vocabulary
    if c.llama_vocab_type(v) == c.LLAMA_VOCAB_TYPE_NONE:
        raise TokenizeError("this model has no vocabulary, only token ids", reason="no vocabulary")
    return v


cdef int32_t check_token(const c.llama_vocab * v, token) except -1:
    cdef int n = c.llama_vocab_n_tokens(v)
    if not 0 <= token < n:
        raise TokenizeError(f"token id {token} is not in [0, {n})", reason="token id out of range", token=token, n_vocab=n)
    return <int32_t> token


def facts(ModelHandle m):
    """Numbers and flags of ``llama_model_*`` as a dict."""
    cdef c.llama_model * p = m.ptr()
    cdef char buf[256]
    cdef c.llama_rope_type_enum rope = c.llama_model_rope_type(p)
    c.llama_model_desc(p, buf, sizeof(buf))
    return {
        "desc": (<bytes> buf).decode("utf-8", "replace"),
        "n_vocab": c.llama_vocab_n_tokens(c.llama_model_get_vocab(p)),
        "n_ctx_train": c.llama_model_n_ctx_train(p),
        "n_embd": c.llama_model_n_embd(p),
        "n_embd_out": c.llama_model_n_embd_out(p),
        "n_layer": c.llama_model_n_layer(p),
        "n_swa": c.llama_model_n_swa(p),
        "n_params": c.llama_model_n_params(p),
        "n_cls_out": c.llama_model_n_cls_out(p),
        "size": c.llama_model_size(p),
        "is_recurrent": bool(c.llama_model_is_recurrent(p)),
        "is_hybrid": bool(c.llama_model_is_hybrid(p)),
        "is_diffusion": bool(c.llama_model_is_diffusion(p)),
        "has_encoder": bool(c.llama_model_has_encoder(p)),
        "has_decoder": bool(c.llama_model_has_decoder(p)),
        "m_rope": rope == c.LLAMA_ROPE_TYPE_MROPE or rope == c.LLAMA_ROPE_TYPE_IMROPE,
        "rope_type": <int> rope,
        "has_vocab": c.llama_vocab_type(c.llama_model_get_vocab(p)) != c.LLAMA_VOCAB_TYPE_NONE,
    }


def meta(ModelHandle m):
    """The GGUF's scalar metadata, keys and values as text (``llama_model_meta_*``)."""
    cdef c.llama_model * p = m.ptr()
    cdef vector[char] buf
    cdef int32_t n
    buf.resize(4096)
    out = {}
    for i in range(c.llama_model_meta_count(p)):
        n = c.llama_model_meta_key_by_index(p, i, buf.data(), buf.size())
        if n < 0:
            continue
        key = (<bytes> buf.data()[:min(<size_t> n, buf.size() - 1)]).decode("utf-8", "replace")
        n = c.llama_model_meta_val_str_by_index(p, i, buf.data(), buf.size())
        if n < 0:
            continue
        if <size_t> n >= buf.size():  # snprintf's rule: n is what it would have taken
            buf.resize(<size_t> n + 1)
            n = c.llama_model_meta_val_str_by_index(p, i, buf.data(), buf.size())
        out[key] = (<bytes> buf.data()[:n]).decode("utf-8", "replace")
    return out


def chat_template(ModelHandle m, name=None):
    """The GGUF's chat template, or ``None`` (``llama_model_chat_template``)."""
    cdef bytes key
    cdef const char * text
    if name is None:
        text = c.llama_model_chat_template(m.ptr(), NULL)
    else:
        key = name.encode()
        text = c.llama_model_chat_template(m.ptr(), key)
    return None if text == NULL else (<bytes> text).decode("utf-8", "replace")


def special_tokens(ModelHandle m):
    """Ids of the special tokens, -1 where there is none, and whether bos and eos are added by default."""
    cdef const c.llama_vocab * v = m.vocab()
    return {
        "bos": c.llama_vocab_bos(v),
        "eos": c.llama_vocab_eos(v),
        "eot": c.llama_vocab_eot(v),
        "nl": c.llama_vocab_nl(v),
        "pad": c.llama_vocab_pad(v),
        "add_bos": bool(c.llama_vocab_get_add_bos(v)),
        "add_eos": bool(c.llama_vocab_get_add_eos(v)),
    }


def is_eog(ModelHandle m, token):
    """``llama_vocab_is_eog``. Without a vocabulary no token ends anything."""
    cdef const c.llama_vocab * v = m.vocab()
    cdef int32_t t = check_token(v, token)
    return c.llama_vocab_type(v) != c.LLAMA_VOCAB_TYPE_NONE and c.llama_vocab_is_eog(v, t)


def is_control(ModelHandle m, token):
    """``llama_vocab_is_control``."""
    cdef const c.llama_vocab * v = m.vocab()
    cdef int32_t t = check_token(v, token)
    return c.llama_vocab_type(v) != c.LLAMA_VOCAB_TYPE_NONE and c.llama_vocab_is_control(v, t)


def tokenize(ModelHandle m, bytes text, bint add_special, bint parse_special, allocate):
    """``llama_tokenize`` into an int32 array that ``allocate(n)`` makes. Releases the GIL."""
    cdef const c.llama_vocab * v = text_vocab(m)
    cdef ModelHandle keep = m
    cdef _owned = m._owned  # the weights stay while the GIL is away, whoever closes the model meanwhile
    cdef const char * p = text
    cdef int32_t n, capacity
    cdef int32_t length
    cdef vector[int32_t] ids
    cdef int32_t[::1] view
    if len(text) > 2147483647 - 64:
        raise TokenizeError(f"{len(text)} bytes are too many for one call", reason="text too long")
    length = <int32_t> len(text)
    capacity = length + 16
    try:
        with nogil:
            ids.resize(capacity)
            n = c.llama_tokenize(v, p, length, ids.data(), capacity, add_special, parse_special)
            if n < 0 and n != -2147483648:
                ids.resize(-n)
                n = c.llama_tokenize(v, p, length, ids.data(), -n, add_special, parse_special)
    except (RuntimeError, IndexError, ValueError, MemoryError) as error:
        raise TokenizeError(f"cannot tokenize: {error}", reason=str(error)) from None
    if n < 0:
        raise TokenizeError("too many tokens for one call", reason="overflow")
    out = allocate(n)
    if n:
        view = out
        for i in range(n):
            view[i] = ids[i]
    return out


def detokenize(ModelHandle m, const int32_t[::1] tokens, bint remove_special, bint unparse_special):
    """``llama_detokenize``; bytes, for a character may be cut in two."""
    cdef const c.llama_vocab * v = text_vocab(m)
    cdef string text
    cdef int32_t n = <int32_t> tokens.shape[0]
    cdef int32_t got
    for i in range(n):
        check_token(v, tokens[i])
    if n == 0:
        return b""
    text.resize(<size_t> n * 8 + 64)
    try:
        got = c.llama_detokenize(v, &tokens[0], n, &text[0], <int32_t> text.size(), remove_special, unparse_special)
        if got < 0:
            text.resize(<size_t> -got)
            got = c.llama_detokenize(v, &tokens[0], n, &text[0], <int32_t> text.size(), remove_special, unparse_special)
    except (RuntimeError, IndexError, ValueError, MemoryError) as error:
        raise TokenizeError(f"cannot detokenize: {error}", reason=str(error)) from None
    if got < 0:
        raise TokenizeError("cannot detokenize", reason=f"llama_detokenize returned {got}")
    text.resize(<size_t> got)
    return <bytes> text


def token_to_piece(ModelHandle m, token, bint special):
    """``llama_token_to_piece``: the bytes of one token."""
    cdef const c.llama_vocab * v = text_vocab(m)
    cdef int32_t t = check_token(v, token)
    cdef string text
    cdef int32_t n
    text.resize(64)
    try:
        n = c.llama_token_to_piece(v, t, &text[0], <int32_t> text.size(), 0, special)
        if n < 0:
            text.resize(<size_t> -n)
            n = c.llama_token_to_piece(v, t, &text[0], <int32_t> text.size(), 0, special)
    except (RuntimeError, IndexError, ValueError, MemoryError) as error:
        raise TokenizeError(f"token {t} has no text: {error}", reason=str(error), token=t) from None
    if n < 0:
        raise TokenizeError(f"token {t} has no text", reason=f"llama_token_to_piece returned {n}", token=t)
    text.resize(<size_t> n)
    return <bytes> text
