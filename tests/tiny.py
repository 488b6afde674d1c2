"""Tiny models with random weights, one for each kind of memory that llama.cpp has.

``path("iswa")`` returns a GGUF file of less than a megabyte, which llama.cpp loads in milliseconds. The weights
depend on the parameters only, so every process and every machine gets the same file; other weights in the same shape
are one ``seed`` away. The numbers mean nothing, but they react to every token before them, and that is what a test of
state needs.

Files are cached by their parameters and appear atomically, so any number of test processes may share the folder.

Widths are chosen so that a row of one head is a whole number of q8_0 and q4_0 blocks (32 values): any type of KV cache
can be asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "tiny"

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What can be varied. ``vocab`` is ``"none"`` (256 bare token ids), ``"spm"`` or ``"bpe"``.

    jamba and lfm2 take no other widths than ``n_head * head_dim == n_embd``.
    """

    seed: int = 0
    vocab: str = "none"
    n_layer: int = 4
    n_embd: int = 64
    n_head: int = 2
    n_head_kv: int = 2
    head_dim: int = 32
    n_ff: int = 96
    n_ctx_train: int = 4096
    window: int = 32
    window_period: int = 3  # every so-many-th layer attends to everything


# --- tokenizers -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Vocab:
    tokens: Sequence[bytes]
    types: Sequence[gguf.TokenType]
    scores: Sequence[float] = ()
    merges: Sequence[str] = ()


WORDS = "the and of to in is that it for was on as with he be at by this have from or one had not but all were when"


def spm_vocab() -> Vocab:
    """SentencePiece: control tokens, all bytes, and pieces that grow letter by letter so that words can be merged."""
    control = [b"<unk>", b"<s>", b"</s>", b"<|im_start|>", b"<|im_end|>"]
    pieces = {chr(code): 0 for code in range(0x21, 0x7F)} | {"\u2581": 0}
    for word in WORDS.split():
        for length in range(2, len(word) + 2):
            pieces.setdefault(f"\u2581{word}"[:length], length)
    n_byte = 256
    types = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * (len(control) - 1)
    types += [gguf.TokenType.BYTE] * n_byte + [gguf.TokenType.NORMAL] * len(pieces)
    tokens = control + [f"<0x{byte:02X}>".encode() for byte in range(n_byte)] + [piece.encode() for piece in pieces]
    # The longer piece wins.
    scores = [0.0] * (len(control) + n_byte) + [float(length) - 100.0 for length in pieces.values()]
    return Vocab(tokens, types, scores=scores)


def bpe_vocab() -> Vocab:
    """Byte-level BPE: the 256 bytes in GPT-2's spelling, a merge for each letter that a common word grows by."""
    letters = gpt2_letters()
    tokens = dict.fromkeys(letters)  # a dict for its order
    merges = {}
    for word in WORDS.split():
        left = letters[ord(" ")]
        for letter in word:
            merges[f"{left} {letter}"] = None
            left += letter
            tokens[left] = None
    control = [b"<|endoftext|>", b"<|im_start|>", b"<|im_end|>"]
    types = [gguf.TokenType.CONTROL] * len(control) + [gguf.TokenType.NORMAL] * len(tokens)
    return Vocab(control + [token.encode() for token in tokens], types, merges=list(merges))


def gpt2_letters() -> list[str]:
    """Return the printable character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        letters.setdefault(byte, chr(256 + len(letters) - len(printable)))
    return [letters[byte] for byte in range(256)]


# --- one file -------------------------------------------------------------------------------------------------------


class Builder:
    """Metadata and tensors of one model.

    Tensor shapes are given as ggml gives them, the fastest dimension first.
    """

    def __init__(self, file: Path, arch: str, shape: Shape, *, n_head_kv: int | list[int] | None = None) -> None:
        self.shape = shape
        self.arch = arch
        self.writer = gguf.GGUFWriter(file, arch)
        self.writer.add_name(f"tiny {arch}")
        self.writer.add_context_length(shape.n_ctx_train)
        self.writer.add_embedding_length(shape.n_embd)
        self.writer.add_block_count(shape.n_layer)
        self.writer.add_layer_norm_rms_eps(1e-5)
        self.n_vocab = self._add_vocab()
        if n_head_kv is None:
            n_head_kv = shape.n_head_kv
        if n_head_kv:
            self.writer.add_head_count(shape.n_head)
            self.writer.add_head_count_kv(n_head_kv)
            self.writer.add_key_length(shape.head_dim)
            self.writer.add_value_length(shape.head_dim)
            self.writer.add_feed_forward_length(shape.n_ff)
        else:  # recurrent layers only
            self.writer.add_head_count(0)
            self.writer.add_feed_forward_length(0)

    def _add_vocab(self) -> int:
        writer = self.writer
        if self.shape.vocab == "none":
            writer.add_tokenizer_model("no_vocab")
            writer.add_vocab_size(256)
            return 256
        if self.shape.vocab == "spm":
            vocab = spm_vocab()
            writer.add_tokenizer_model("llama")
            writer.add_token_scores(vocab.scores)
            writer.add_unk_token_id(0)
            writer.add_bos_token_id(1)
            writer.add_eos_token_id(2)
            writer.add_eot_token_id(4)
            writer.add_add_bos_token(True)
        elif self.shape.vocab == "bpe":
            vocab = bpe_vocab()
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre("gpt-2")
            writer.add_token_merges(vocab.merges)
            writer.add_bos_token_id(0)
            writer.add_eos_token_id(0)
            writer.add_eot_token_id(2)
            writer.add_add_bos_token(False)
        else:
            raise ValueError(f"vocab must be none, spm or bpe, not {self.shape.vocab!r}")
        writer.add_token_list(vocab.tokens)
        writer.add_token_types(vocab.types)
        writer.add_chat_template(CHAT_TEMPLATE)
        writer.add_vocab_size(len(vocab.tokens))
        return len(vocab.tokens)

    def add(self, name: str, *ne: int, fill: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]) -> None:
        # Seeded by the name: a tensor does not depend on those written before it.
        rng = np.random.default_rng([self.shape.seed, zlib.crc32(f"{self.arch}/{name}".encode())])
        self.writer.add_tensor(name, np.ascontiguousarray(fill(rng, ne[::-1]), dtype=np.float32))

    def weight(self, name: str, *ne: int) -> None:
        """A matrix that keeps the scale of what it multiplies."""
        self.add(f"{name}.weight", *ne, fill=lambda rng, shape: rng.standard_normal(shape) / np.sqrt(ne[0]))

    def table(self, name: str, *ne: int) -> None:
        """Embeddings and convolution kernels: values of the order of one."""
        self.add(f"{name}.weight", *ne, fill=lambda rng, shape: rng.standard_normal(shape))

    def gain(self, name: str, *ne: int) -> None:
        """The gains of a norm: near one."""
        self.add(name, *ne, fill=lambda rng, shape: 1.0 + 0.1 * rng.standard_normal(shape))

    def norm(self, name: str, *ne: int) -> None:
        self.gain(f"{name}.weight", *ne)

    def bias(self, name: str, *ne: int) -> None:
        self.add(f"{name}.bias", *ne, fill=lambda rng, shape: 0.1 * rng.standard_normal(shape))

    def decay(self, name: str, *ne: int) -> None:
        """The A of a state-space model: negative, from slow to fast, so that states forget, but not at once."""
        self.add(name, *ne, fill=lambda rng, shape: -np.exp(rng.uniform(-2.0, 1.0, shape)))

    def time_step(self, name: str, *ne: int) -> None:
        """The bias of a time step, which goes through softplus: small steps."""
        self.add(f"{name}.bias", *ne, fill=lambda rng, shape: rng.uniform(-3.0, -1.0, shape))

    # Parts that several architectures share.

    def embeddings(self, *, norm: str = "output_norm", tied: bool = False) -> None:
        self.table("token_embd", self.shape.n_embd, self.n_vocab)
        self.norm(norm, self.shape.n_embd)
        if not tied:
            self.weight("output", self.shape.n_embd, self.n_vocab)

    def attention(self, block: str, *, qk_norm: bool = False, gated: bool = False) -> None:
        s = self.shape
        n_query = s.head_dim * s.n_head
        self.weight(f"{block}.attn_q", s.n_embd, n_query * (2 if gated else 1))
        self.weight(f"{block}.attn_k", s.n_embd, s.head_dim * s.n_head_kv)
        self.weight(f"{block}.attn_v", s.n_embd, s.head_dim * s.n_head_kv)
        self.weight(f"{block}.attn_output", n_query, s.n_embd)
        if qk_norm:
            self.norm(f"{block}.attn_q_norm", s.head_dim)
            self.norm(f"{block}.attn_k_norm", s.head_dim)

    def feed_forward(self, block: str, *, norm: bool = True) -> None:
        s = self.shape
        if norm:
            self.norm(f"{block}.ffn_norm", s.n_embd)
        self.weight(f"{block}.ffn_gate", s.n_embd, s.n_ff)
        self.weight(f"{block}.ffn_up", s.n_embd, s.n_ff)
        self.weight(f"{block}.ffn_down", s.n_ff, s.n_embd)

    def ssm_metadata(self, *, inner: int, state: int, rank: int, groups: int | None = None, kernel: int = 4) -> None:
        self.writer.add_ssm_conv_kernel(kernel)
        self.writer.add_ssm_inner_size(inner)
        self.writer.add_ssm_state_size(state)
        self.writer.add_ssm_time_step_rank(rank)
        if groups is not None:
            self.writer.add_ssm_group_count(groups)

    def mamba_layer(self, block: str, *, norms: bool = False) -> None:
        n_embd, inner, state, rank, kernel = self.shape.n_embd, 2 * self.shape.n_embd, 16, 4, 4
        self.weight(f"{block}.ssm_in", n_embd, 2 * inner)
        self.table(f"{block}.ssm_conv1d", kernel, inner)
        self.bias(f"{block}.ssm_conv1d", inner)
        self.weight(f"{block}.ssm_x", inner, rank + 2 * state)
        self.weight(f"{block}.ssm_dt", rank, inner)
        self.time_step(f"{block}.ssm_dt", inner)
        if norms:
            self.norm(f"{block}.ssm_dt_norm", rank)
            self.norm(f"{block}.ssm_b_norm", state)
            self.norm(f"{block}.ssm_c_norm", state)
        self.decay(f"{block}.ssm_a", state, inner)
        self.gain(f"{block}.ssm_d", inner)
        self.weight(f"{block}.ssm_out", inner, n_embd)

    def mrope_metadata(self) -> None:
        self.writer.add_rope_dimension_count(self.shape.head_dim)
        pairs = self.shape.head_dim // 2
        share = pairs // 3
        self.writer.add_rope_dimension_sections([pairs - 2 * share, share, share, 0])

    def close(self) -> None:
        write(self.writer)


# --- architectures --------------------------------------------------------------------------------------------------


def _blocks(shape: Shape) -> list[str]:
    return [f"blk.{layer}" for layer in range(shape.n_layer)]


def _alternating(shape: Shape) -> list[int]:
    """KV heads by layer of a hybrid: even layers recurrent, odd layers attention."""
    return [shape.n_head_kv if layer % 2 else 0 for layer in range(shape.n_layer)]


def dense(file: Path, shape: Shape) -> Builder:
    """Full attention."""
    b = Builder(file, "llama", shape)
    b.writer.add_rope_dimension_count(shape.head_dim)
    b.embeddings()
    for block in _blocks(shape):
        b.norm(f"{block}.attn_norm", shape.n_embd)
        b.attention(block)
        b.feed_forward(block)
    return b


def iswa(file: Path, shape: Shape) -> Builder:
    """Sliding-window attention, with a layer of full attention in between."""
    b = Builder(file, "gemma3", shape)
    b.writer.add_sliding_window(shape.window)
    b.writer.add_uint32("gemma3.attention.sliding_window_pattern", shape.window_period)
    b.embeddings(tied=True)
    for block in _blocks(shape):
        b.norm(f"{block}.attn_norm", shape.n_embd)
        b.attention(block, qk_norm=True)
        b.norm(f"{block}.post_attention_norm", shape.n_embd)
        b.feed_forward(block)
        b.norm(f"{block}.post_ffw_norm", shape.n_embd)
    return b


def mamba(file: Path, shape: Shape) -> Builder:
    """Recurrent."""
    b = Builder(file, "mamba", shape, n_head_kv=0)
    b.ssm_metadata(inner=2 * shape.n_embd, state=16, rank=4)
    b.embeddings()
    for block in _blocks(shape):
        b.norm(f"{block}.attn_norm", shape.n_embd)
        b.mamba_layer(block)
    return b


def mamba2(file: Path, shape: Shape) -> Builder:
    """Recurrent, with heads."""
    b = Builder(file, "mamba2", shape, n_head_kv=0)
    inner, state, heads, groups, kernel = 2 * shape.n_embd, 16, 8, 1, 4
    convolved = inner + 2 * groups * state
    b.ssm_metadata(inner=inner, state=state, rank=heads, groups=groups, kernel=kernel)
    b.embeddings()
    for block in _blocks(shape):
        b.norm(f"{block}.attn_norm", shape.n_embd)
        b.weight(f"{block}.ssm_in", shape.n_embd, inner + convolved + heads)
        b.table(f"{block}.ssm_conv1d", kernel, convolved)
        b.bias(f"{block}.ssm_conv1d", convolved)
        b.time_step(f"{block}.ssm_dt", heads)
        b.decay(f"{block}.ssm_a", 1, heads)
        b.gain(f"{block}.ssm_d", 1, heads)
        b.norm(f"{block}.ssm_norm", inner // groups, groups)
        b.weight(f"{block}.ssm_out", inner, shape.n_embd)
    return b


def jamba(file: Path, shape: Shape) -> Builder:
    """Hybrid: mamba and attention without positions."""
    heads = _alternating(shape)
    b = Builder(file, "jamba", shape, n_head_kv=heads)
    b.ssm_metadata(inner=2 * shape.n_embd, state=16, rank=4)
    b.embeddings()
    for block, n_head_kv in zip(_blocks(shape), heads, strict=True):
        b.norm(f"{block}.attn_norm", shape.n_embd)
        if n_head_kv:
            b.attention(block)
        else:
            b.mamba_layer(block, norms=True)
        b.feed_forward(block)
    return b


def lfm2(file: Path, shape: Shape, *, windowed: bool = False) -> Builder:
    """Hybrid: short convolutions and attention."""
    heads, kernel = _alternating(shape), 4
    b = Builder(file, "lfm2", shape, n_head_kv=heads)
    b.writer.add_shortconv_l_cache(kernel)
    b.writer.add_rope_dimension_count(shape.head_dim)
    b.writer.add_rope_freq_base(10000.0)
    if windowed:
        b.writer.add_sliding_window(shape.window)
    b.embeddings(norm="token_embd_norm", tied=True)
    for block, n_head_kv in zip(_blocks(shape), heads, strict=True):
        b.norm(f"{block}.attn_norm", shape.n_embd)
        if n_head_kv:
            b.attention(block, qk_norm=True)
        else:
            b.table(f"{block}.shortconv.conv", kernel, shape.n_embd)
            b.weight(f"{block}.shortconv.in_proj", shape.n_embd, 3 * shape.n_embd)
            b.weight(f"{block}.shortconv.out_proj", shape.n_embd, shape.n_embd)
        b.feed_forward(block)
    return b


def qwen35(file: Path, shape: Shape) -> Builder:
    """Hybrid: gated delta net and gated attention, with the three positions a token of M-RoPE."""
    b = Builder(file, "qwen35", shape)
    state, key_heads, value_heads, kernel = 16, 2, 4, 4
    keys, values = state * key_heads, state * value_heads
    convolved = 2 * keys + values
    b.mrope_metadata()
    b.ssm_metadata(inner=values, state=state, rank=value_heads, groups=key_heads, kernel=kernel)
    b.writer.add_uint32("qwen35.full_attention_interval", 2)
    b.embeddings()
    for layer, block in enumerate(_blocks(shape)):
        b.norm(f"{block}.attn_norm", shape.n_embd)
        b.norm(f"{block}.post_attention_norm", shape.n_embd)
        if layer % 2:
            b.attention(block, qk_norm=True, gated=True)
        else:
            b.weight(f"{block}.attn_qkv", shape.n_embd, convolved)
            b.weight(f"{block}.attn_gate", shape.n_embd, values)
            b.table(f"{block}.ssm_conv1d", kernel, convolved)
            b.time_step(f"{block}.ssm_dt", value_heads)
            b.decay(f"{block}.ssm_a", value_heads)
            b.weight(f"{block}.ssm_beta", shape.n_embd, value_heads)
            b.weight(f"{block}.ssm_alpha", shape.n_embd, value_heads)
            b.norm(f"{block}.ssm_norm", state)
            b.weight(f"{block}.ssm_out", values, shape.n_embd)
        b.feed_forward(block, norm=False)
    return b


def qwen2vl(file: Path, shape: Shape) -> Builder:
    """Full attention with M-RoPE."""
    b = Builder(file, "qwen2vl", shape)
    b.mrope_metadata()
    b.embeddings()
    for block in _blocks(shape):
        b.norm(f"{block}.attn_norm", shape.n_embd)
        b.attention(block)
        b.feed_forward(block)
    return b


@dataclasses.dataclass(frozen=True)
class Model:
    """How to build a model, its usual shape, and the kind of memory that llama.cpp gives it."""

    build: Callable[[Path, Shape], Builder]
    kind: str
    mrope: bool = False
    shape: Shape = Shape()


MODELS = {
    "dense": Model(dense, "attention"),
    "chat": Model(dense, "attention", shape=Shape(vocab="spm")),
    "iswa": Model(iswa, "iswa", shape=Shape(n_layer=6)),
    # As many window layers as full ones: the two halves of its state look alike.
    "iswa11": Model(iswa, "iswa", shape=Shape(window_period=2)),
    "mamba": Model(mamba, "recurrent"),
    "mamba2": Model(mamba2, "recurrent"),
    "jamba": Model(jamba, "hybrid"),
    "lfm2": Model(lfm2, "hybrid"),
    "lfm2swa": Model(functools.partial(lfm2, windowed=True), "hybrid-iswa"),
    "qwen35": Model(qwen35, "hybrid", mrope=True),
    "qwen2vl": Model(qwen2vl, "attention", mrope=True),
}


def path(name: str, cache_dir: str | os.PathLike[str] | None = None, **variant: object) -> Path:
    """Return the GGUF file of a model, written now if it is not in the cache.

    Parameters
    ----------
    name : str
        A key of ``MODELS``.
    cache_dir : path, optional
        Default ``.cache/tiny`` in the checkout.
    **variant
        Fields of :class:`Shape` that differ from the model's usual ones: ``seed=1`` is the same shape with other
        weights, ``vocab="bpe"`` adds a tokenizer and a chat template.
    """
    model = MODELS[name]
    shape = dataclasses.replace(model.shape, **variant)
    folder = Path(cache_dir) if cache_dir is not None else CACHE
    key = json.dumps([name, dataclasses.asdict(shape), _source_hash()], sort_keys=True)
    file = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.gguf"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            unfinished = Path(scratch, file.name)
            model.build(unfinished, shape).close()
            appear(unfinished, file)
    return file


def lora(
    name: str,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    lora_seed: int = 0,
    rank: int = 4,
    alpha: float = 8.0,
    targets: Sequence[str] = ("blk.0.attn_q.weight", "blk.1.ffn_down.weight"),
    **variant: object,
) -> Path:
    """Return a LoRA for the model that :func:`path` gives for the same arguments, strong enough to change every logit.

    Parameters
    ----------
    lora_seed : int
        Other weights in the same shapes.
    rank, alpha : int, float
        As in any LoRA: what is added is ``alpha / rank`` times the product.
    targets : sequence of str
        Tensors of the model that it adds to.
    """
    base = path(name, cache_dir, **variant)
    key = f"{base.name} {lora_seed} {rank} {alpha} {targets}"
    file = base.with_name(f"lora-{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.gguf")
    if not file.exists():
        shapes = {t.name: [int(n) for n in t.shape] for t in gguf.GGUFReader(base).tensors}
        with tempfile.TemporaryDirectory(dir=base.parent) as scratch:
            unfinished = Path(scratch, file.name)
            writer = lora_writer(unfinished, gguf_arch(base), alpha)
            for target in targets:
                rng = np.random.default_rng([lora_seed, zlib.crc32(target.encode())])
                n_in, n_out = shapes[target][:2]
                pair = (rng.standard_normal((rank, n_in)) / np.sqrt(n_in), 0.3 * rng.standard_normal((n_out, rank)))
                for part, data in zip("ab", pair, strict=True):
                    writer.add_tensor(f"{target}.lora_{part}", np.ascontiguousarray(data, np.float32))
            write(writer)
            appear(unfinished, file)
    return file


def appear(unfinished: Path, file: Path) -> None:
    """Give a finished file its name, unless another process was first.

    Not a rename over it: a process may have loaded that file already, and would find it replaced.
    """
    with contextlib.suppress(FileExistsError):
        os.link(unfinished, file)


def gguf_arch(file: Path) -> str:
    """``general.architecture`` of a model."""
    return str(gguf.GGUFReader(file).fields["general.architecture"].contents())


def lora_writer(file: Path, arch: str, alpha: float = 8.0) -> gguf.GGUFWriter:
    """A file that says that it is a LoRA, without tensors yet."""
    writer = gguf.GGUFWriter(file, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    return writer


def write(writer: gguf.GGUFWriter) -> None:
    """Write all of a file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@functools.cache
def _source_hash() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
