# distutils: language = c++
# cython: language_level=3, boundscheck=False, wraparound=False
"""llama.cpp's own samplers, as one chain (``llama_sampler_*``)."""

cimport cython
from libc.math cimport isnan
from libc.stdint cimport int32_t, int64_t, uint32_t
from libcpp.string cimport string
from libcpp.vector cimport vector

from llamastate._native cimport llama as c
from llamastate._native import log
from llamastate._native.handles cimport ContextHandle, Lockable, ModelHandle, _ModelPtr
from llamastate.errors import ClosedError, LogitsUnavailableError, SamplerError

# The grammar parser writes what is wrong to the process's stderr and nowhere else. So stderr is a pipe while it runs:
# with the GIL held, so that no Python code writes meanwhile, and what is not the parser's is passed on afterwards. The
# pipe never blocks; of a message that is longer than it holds, the beginning is enough.
cdef extern from *:
    """
    #include <cstdio>
    #include <string>
    #ifndef _WIN32
    #include <fcntl.h>
    #include <unistd.h>
    #endif

    static int llamastate_hushed = -1, llamastate_hush_pipe = -1;

    static void llamastate_hush_begin() {
    #ifndef _WIN32
        int ends[2];
        fflush(stderr);
        llamastate_hushed = fcntl(2, F_DUPFD_CLOEXEC, 3);
        if (llamastate_hushed < 0) return;  // there is no stderr
        if (pipe(ends)) {
            close(llamastate_hushed);
            llamastate_hushed = -1;
            return;
        }
        fcntl(ends[0], F_SETFD, FD_CLOEXEC);
        fcntl(ends[0], F_SETFL, O_NONBLOCK);
        fcntl(ends[1], F_SETFL, O_NONBLOCK);
        dup2(ends[1], 2);
        close(ends[1]);
        llamastate_hush_pipe = ends[0];
    #endif
    }

    static std::string llamastate_hush_end() {
        std::string text;
    #ifndef _WIN32
        if (llamastate_hushed < 0) return text;
        fflush(stderr);
        dup2(llamastate_hushed, 2);
        close(llamastate_hushed);
        llamastate_hushed = -1;
        clearerr(stderr);
        char part[4096];
        for (ssize_t n; (n = read(llamastate_hush_pipe, part, sizeof part)) > 0;) text.append(part, n);
        close(llamastate_hush_pipe);
        llamastate_hush_pipe = -1;
        size_t own = text.find("parse: error parsing grammar: ");
        std::string others = own == std::string::npos ? text : text.substr(0, own);
        if (!others.empty()) fwrite(others.data(), 1, others.size(), stderr);
        text.erase(0, own == std::string::npos ? text.size() : own);
    #endif
        return text;
    }
    """
    void llamastate_hush_begin() noexcept
    string llamastate_hush_end() noexcept


def _grammar_reason(bytes said):
    """What the grammar parser wrote, in one line without the grammar that it repeats."""
    reason = said.decode("utf-8", "replace").partition("error parsing grammar: ")[2].partition("\n\n")[0]
    reason = " ".join(reason.split())
    return reason if len(reason) <= 160 else f"{reason[:160]}..."


@cython.no_gc_clear
cdef class SamplerHandle(Lockable):
    """A ``llama_sampler`` chain. Keeps the model that its grammar reads alive; one thread at a time is inside."""

    cdef c.llama_sampler * chain
    cdef const c.llama_vocab * vocab
    cdef _ModelPtr model
    cdef vector[c.llama_token_data] candidates
    # What clone() cannot be asked for and a restart needs: everything accepted, and how many random choices were made.
    cdef vector[int32_t] accepted_tokens
    cdef public unsigned long long n_draws
    cdef uint32_t seed
    cdef bint random
    cdef int n_links
    cdef int grammar_at  # which link of the chain is the grammar; -1 without one
    cdef readonly int n_vocab

    def __cinit__(self, ModelHandle model, *args, **kwargs):
        self.vocab = model.vocab()
        self.model = model._owned
        self.n_vocab = c.llama_vocab_n_tokens(self.vocab)
        self.grammar_at = -1
        self.chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())

    def __init__(self, ModelHandle model):
        pass

    def __dealloc__(self):
        if self.chain != NULL:
            c.llama_sampler_free(self.chain)
            self.chain = NULL

    cdef int enter(self, str operation) except -1:
        self.acquire(operation)
        if self.chain == NULL:
            self.release()
            raise ClosedError(f"{operation}: the sampler is closed", what="sampler")
        if self.model.gone():
            self.release()
            raise ClosedError(f"{operation}: the model is closed", what="model")
        return 0

    cdef int add(self, c.llama_sampler * link, str name, value) except -1:
        if link == NULL:
            reason = log.take_errors() or "llama.cpp made no sampler of it"
            raise SamplerError(f"{name}: {reason}", parameter=name, value=value, reason=reason)
        c.llama_sampler_chain_add(self.chain, link)
        self.n_links += 1
        return 0

    def add_greedy(self):
        """``llama_sampler_init_greedy``."""
        self.add(c.llama_sampler_init_greedy(), "greedy", None)

    def end_random(self, uint32_t seed):
        """Choose at random in the end (``llama_sampler_init_dist``), each time from a generator of its own.

        llama.cpp's sampler cannot be told how far its generator has come, so one that lasts could not be saved. One that
        is made for each choice, from the seed and the number of the choice, needs no saving.
        """
        self.seed = seed
        self.random = True

    cdef uint32_t next_seed(self) noexcept nogil:
        # splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014)
        cdef unsigned long long z = (<unsigned long long> self.seed << 32) + (self.n_draws + 1) * 0x9E3779B97F4A7C15ULL
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL
        z = z ^ (z >> 31)
        return <uint32_t> z if <uint32_t> z != c.LLAMA_DEFAULT_SEED else 0

    def add_top_k(self, int k):
        """``llama_sampler_init_top_k``."""
        self.add(c.llama_sampler_init_top_k(k), "top_k", k)

    def add_top_p(self, float p, size_t min_keep):
        """``llama_sampler_init_top_p``."""
        self.add(c.llama_sampler_init_top_p(p, min_keep), "top_p", p)

    def add_min_p(self, float p, size_t min_keep):
        """``llama_sampler_init_min_p``."""
        self.add(c.llama_sampler_init_min_p(p, min_keep), "min_p", p)

    def add_typical(self, float p, size_t min_keep):
        """``llama_sampler_init_typical``."""
        self.add(c.llama_sampler_init_typical(p, min_keep), "typical_p", p)

    def add_temp(self, float t):
        """``llama_sampler_init_temp``."""
        self.add(c.llama_sampler_init_temp(t), "temperature", t)

    def add_penalties(self, int last_n, float repeat, float freq, float present):
        """``llama_sampler_init_penalties``."""
        self.add(c.llama_sampler_init_penalties(self.n_vocab, last_n, repeat, freq, present), "penalties", repeat)

    def add_logit_bias(self, const int32_t[::1] tokens, const float[::1] bias):
        """``llama_sampler_init_logit_bias``; the caller has checked the ids and that the lengths agree."""
        cdef vector[c.llama_logit_bias] pairs
        pairs.resize(tokens.shape[0])
        for i in range(tokens.shape[0]):
            pairs[i].token = tokens[i]
            pairs[i].bias = bias[i]
        self.add(c.llama_sampler_init_logit_bias(self.n_vocab, <int32_t> pairs.size(), pairs.data()), "logit_bias", None)

    def add_grammar(self, bytes grammar, bytes root):
        """``llama_sampler_init_grammar``."""
        if c.llama_vocab_type(self.vocab) == c.LLAMA_VOCAB_TYPE_NONE:
            raise SamplerError("grammar: this model has no vocabulary", parameter="grammar", reason="no vocabulary")
        cdef c.llama_sampler * link
        cdef string said
        log.clear_errors()
        try:
            llamastate_hush_begin()
            try:
                link = c.llama_sampler_init_grammar(self.vocab, grammar, root)
            finally:
                said = llamastate_hush_end()
            if link == NULL:
                logged = log.take_errors()
                reason = _grammar_reason(<bytes> said) or logged or "llama.cpp made no sampler of it"
                raise SamplerError(f"grammar: {reason}", parameter="grammar", value=grammar, reason=reason)
            self.add(link, "grammar", grammar)
        except (RuntimeError, IndexError, ValueError, MemoryError) as error:
            if isinstance(error, SamplerError):
                raise
            raise SamplerError(f"grammar: {error}", parameter="grammar", value=grammar, reason=str(error)) from None
        self.grammar_at = self.n_links - 1

    cdef int32_t pick(self, const float * logits, bint accept) except -1:
        cdef c.llama_token_data_array array
        cdef c.llama_sampler * dist
        cdef int64_t selected
        cdef int i
        cdef int n = self.n_vocab
        cdef int n_bad = 0
        cdef int32_t token = -1
        cdef float logit = 0
        try:
            with nogil:
                self.candidates.resize(n)
                for i in range(n):
                    n_bad += isnan(logits[i])
                    self.candidates[i].id = i
                    self.candidates[i].logit = logits[i]
                    self.candidates[i].p = 0
                if n_bad == 0:
                    array.data = self.candidates.data()
                    array.size = n
                    array.selected = -1
                    array.sorted = False
                    c.llama_sampler_apply(self.chain, &array)
                    if self.random and array.size:
                        dist = c.llama_sampler_init_dist(self.next_seed())
                        c.llama_sampler_apply(dist, &array)
                        c.llama_sampler_free(dist)
                        self.n_draws += 1
                    selected = array.selected
                    if 0 <= selected < <int64_t> array.size:
                        token = array.data[selected].id
                        logit = array.data[selected].logit
                    if token >= 0 and logit > -3.0e38 and accept:
                        c.llama_sampler_accept(self.chain, token)
                        self.accepted_tokens.push_back(token)
        except (RuntimeError, IndexError, ValueError, MemoryError) as error:
            raise SamplerError(f"sampling failed: {error}", reason=str(error)) from None
        if n_bad:
            raise SamplerError(f"{n_bad} logits are not numbers", reason="nan logits", value=n_bad)
        if token < 0 or not logit > -3.0e38:
            raise SamplerError("no token is left to choose", reason="no candidates")
        return token

    cdef bint allowed(self, int32_t token) except -1:
        # Asks the grammar without telling it. Told of a token that it does not allow, llama.cpp aborts the process: at
        # once for one that ends the text, at the next sampling for any other.
        cdef c.llama_token_data one
        cdef c.llama_token_data_array array
        if self.grammar_at < 0:
            return True
        one.id = token
        one.logit = 0
        one.p = 0
        array.data = &one
        array.size = 1
        array.selected = -1
        array.sorted = False
        with nogil:
            c.llama_sampler_apply(c.llama_sampler_chain_get(self.chain, self.grammar_at), &array)
        return one.logit > -3.0e38

    def sample(self, ContextHandle context, long i, bint accept):
        """Choose a token from the context's logits; ``i`` as in ``llama_get_logits_ith``. Releases the GIL."""
        cdef float * row
        self.enter("sample")
        try:
            context.enter("sample")
            try:
                if context.n_vocab != self.n_vocab:
                    raise SamplerError(
                        f"made for {self.n_vocab} tokens, the context has {context.n_vocab}", reason="other vocabulary")
                row = c.llama_get_logits_ith(context.ptr, context.output(i))
                if row == NULL:
                    raise LogitsUnavailableError(f"no logits for index {i}", index=i, n_outputs=context.n_outputs)
                return self.pick(row, accept)
            finally:
                context.release()
        finally:
            self.release()

    def sample_logits(self, const float[::1] logits, bint accept):
        """Choose a token from a row of logits, float32[n_vocab]. Releases the GIL."""
        self.enter("sample")
        try:
            if logits.shape[0] != self.n_vocab:
                raise SamplerError(
                    f"{logits.shape[0]} logits for {self.n_vocab} tokens", reason="wrong length", value=logits.shape[0])
            return self.pick(&logits[0], accept)
        finally:
            self.release()

    def accept(self, token):
        """``llama_sampler_accept``: tell penalties and grammar what was chosen elsewhere."""
        cdef int32_t t
        if not 0 <= token < self.n_vocab:
            raise SamplerError(f"token id {token} is not in [0, {self.n_vocab})", parameter="token", value=token)
        t = token
        self.enter("accept")
        try:
            if not self.allowed(t):
                raise SamplerError(f"token {token} is not what the grammar allows", parameter="token", value=token,
                                   reason="not in the grammar")
            with nogil:
                c.llama_sampler_accept(self.chain, t)
            self.accepted_tokens.push_back(t)
        except (RuntimeError, IndexError, ValueError, MemoryError) as error:
            if isinstance(error, (ClosedError, SamplerError)):
                raise
            raise SamplerError(f"token {token} was refused: {error}", parameter="token", value=token,
                               reason=str(error)) from None
        finally:
            self.release()

    @property
    def accepted(self):
        """Every token accepted since the beginning or the last reset."""
        return list(self.accepted_tokens)

    def reset(self):
        """``llama_sampler_reset``."""
        self.enter("reset")
        try:
            c.llama_sampler_reset(self.chain)
            self.accepted_tokens.clear()
            self.n_draws = 0
        finally:
            self.release()

    def clone(self):
        """``llama_sampler_clone``: an independent chain in the same state, random numbers included."""
        cdef SamplerHandle other
        cdef ModelHandle model = ModelHandle.__new__(ModelHandle)
        self.enter("clone")
        try:
            model._owned = self.model
            other = SamplerHandle.__new__(SamplerHandle, model)
            c.llama_sampler_free(other.chain)
            other.chain = c.llama_sampler_clone(self.chain)
            other.n_links = self.n_links
            other.grammar_at = self.grammar_at
            other.accepted_tokens = self.accepted_tokens
            other.n_draws = self.n_draws
            other.seed = self.seed
            other.random = self.random
            return other
        finally:
            self.release()

    @property
    def closed(self):
        """Whether :meth:`close` has been called."""
        return self.chain == NULL

    def close(self):
        """Free the chain. Idempotent."""
        self.acquire("close")
        try:
            if self.chain != NULL:
                c.llama_sampler_free(self.chain)
                self.chain = NULL
        finally:
            self.release()
