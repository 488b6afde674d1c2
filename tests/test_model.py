"""What a model says about itself, its vocabulary, and its chat template."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llamastate import Model, ModelLoadError, TemplateError, TokenizeError
from tests import tiny

TEXTS = [
    "the of when and",
    "héllo wörld 日本 🙂 👩‍👩‍👧‍👦\n\t x",
    '{"a": [1, 2.5]}',
    "<|im_start|>user\nhi<|im_end|>",
    "nul \0 inside \0\0",
    "\x01\x7f\u0080\u200b\ufeff\U0010ffff",
    "   ",
    "",
    "a" * 5000,
]
#: Ids of the "spm" vocabulary: control tokens, then all bytes.
BOS, EOS, START, END, FIRST_BYTE = 1, 2, 3, 4, 5


@pytest.fixture(scope="module", params=["spm", "bpe"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    with Model(tiny.path("chat", vocab=request.param)) as model:
        yield model


@pytest.fixture(scope="module")
def spm() -> Iterator[Model]:
    with Model(tiny.path("chat", vocab="spm")) as model:
        yield model


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"use_mmap": False}, {"vocab_only": True}, {"check_tensors": True}], ids=repr)
def test_load(options: dict[str, Any]):
    for path in (tiny.path("chat"), str(tiny.path("chat")), str(tiny.path("chat")).encode()):
        with Model(path, **options) as model:
            assert model.tokenize("the of").tolist()
            assert model.arch == "llama"
            assert model.desc.startswith("llama") or "vocab_only" in options


def _truncated(folder: Path) -> Path:
    (folder / "model").write_bytes(tiny.path("dense").read_bytes()[:5000])
    return folder / "model"


def _no_tensors(folder: Path) -> Path:
    data = tiny.path("dense").read_bytes()
    (folder / "model").write_bytes(data[: len(data) // 2])
    return folder / "model"


def _other(folder: Path) -> Path:
    (folder / "model").write_bytes(b"PK\3\4 something else")
    return folder / "model"


def _empty(folder: Path) -> Path:
    (folder / "model").write_bytes(b"")
    return folder / "model"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: folder / "none", "No such file"),
        (lambda folder: folder, "directory"),
        (lambda folder: f"{folder}/a\0b", "null"),
        (_empty, "not a GGUF"),
        (_other, "not a GGUF"),
        (_truncated, ""),
        (_no_tensors, ""),
    ],
)
def test_files_that_are_no_model(make: Any, reason: str, tmp_path: Path):
    with pytest.raises(ModelLoadError) as caught:
        Model(make(tmp_path))
    assert caught.value.path == str(make(tmp_path))
    assert caught.value.reason
    assert reason in caught.value.reason
    assert isinstance(caught.value, OSError)


# --- facts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.MODELS)
def test_facts(name: str):
    shape = tiny.MODELS[name].shape
    reader = gguf.GGUFReader(tiny.path(name))
    with Model(tiny.path(name)) as model:
        assert model.memory_kind == tiny.MODELS[name].kind
        assert model.uses_m_rope == tiny.MODELS[name].mrope
        assert model.is_recurrent == (model.memory_kind == "recurrent")
        assert model.is_hybrid == model.memory_kind.startswith("hybrid")
        assert model.n_swa == (shape.window if "iswa" in model.memory_kind else 0)
        assert (model.n_embd, model.n_embd_out, model.n_layer) == (shape.n_embd, shape.n_embd, shape.n_layer)
        assert model.n_ctx_train == shape.n_ctx_train
        assert model.has_vocab == (shape.vocab != "none")
        assert model.arch == model.meta["general.architecture"]
        assert model.n_params == sum(int(tensor.n_elements) for tensor in reader.tensors)
        assert model.size == sum(int(tensor.n_bytes) for tensor in reader.tensors)
        assert model.path == str(tiny.path(name))
        assert repr(model.path) in repr(model)


def test_metadata_is_the_files(spm: Model):
    reader = gguf.GGUFReader(tiny.path("chat", vocab="spm"))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.types[0] == gguf.GGUFValueType.ARRAY:
            continue
        value = field.contents()
        text = spm.meta[field.name]
        if isinstance(value, bool):
            assert text == str(value).lower()
        elif isinstance(value, float):
            assert float(text) == pytest.approx(value)
        else:
            assert text == str(value)
    with pytest.raises(TypeError):
        spm.meta["a"] = "b"  # type: ignore[index]


def test_long_metadata_is_not_cut(tmp_path: Path):
    """Longer than any buffer that one might have thought of."""
    template = "{# " + "é" * 20000 + " #}hello"
    writer = gguf.GGUFWriter(tmp_path / "model", "llama")
    source = gguf.GGUFReader(tiny.path("chat"))
    for field in source.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = template if field.name == "tokenizer.chat_template" else field.contents()
        kind, *items = field.types
        writer.add_key_value(field.name, value, kind, items[0] if items else None)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with Model(tmp_path / "model") as model:
        assert model.meta["tokenizer.chat_template"] == template
        assert model.chat_template() == template
        assert model.apply_chat_template([]) == "hello"


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_text_comes_back(model: Model, text: str):
    for special in (False, True):
        ids = model.tokenize(text, add_special=False, parse_special=special)
        assert ids.dtype == np.int32
        assert ((ids >= 0) & (ids < model.n_vocab)).all()
        back = model.detokenize(ids, unparse_special=True)
        # SentencePiece puts a space before each run of text.
        assert back == text or back.replace(" ", "") == text.replace(" ", "")
        np.testing.assert_array_equal(model.tokenize(text.encode(), add_special=False, parse_special=special), ids)
        if not special:
            assert b"".join(model.token_to_piece(i) for i in ids).decode().strip() == text.strip()


def test_special_tokens(spm: Model):
    assert (spm.bos, spm.eos) == (BOS, EOS)
    assert [i for i in range(spm.n_vocab) if spm.is_eog(i)] == [EOS, END]
    text = "<|im_start|>the"
    assert spm.tokenize(text)[0] == BOS
    assert START not in spm.tokenize(text)  # of a stranger: characters like any other
    assert spm.tokenize(text, add_special=False, parse_special=True)[0] == START
    assert spm.detokenize([BOS, START, END]) == ""
    assert spm.detokenize([BOS, START, END], unparse_special=True) == "<s><|im_start|><|im_end|>"
    assert "<s>" not in spm.detokenize([BOS, START], unparse_special=True, remove_special=True)
    assert spm.token_to_piece(START) == b""
    assert spm.token_to_piece(START, special=True) == b"<|im_start|>"


def test_characters_cut_in_two(spm: Model):
    """Single bytes are tokens: half a character is no text, and says so in the way that was asked for."""
    ids = [FIRST_BYTE + byte for byte in "🙂".encode()]
    assert spm.detokenize(ids).strip() == "🙂"
    assert spm.token_to_piece(ids[0]) == b"\xf0"
    assert "\ufffd" in spm.detokenize(ids[:2])
    assert "\udcf0" in spm.detokenize(ids[:2], errors="surrogateescape")
    with pytest.raises(UnicodeDecodeError):
        spm.detokenize(ids[:2], errors="strict")


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", 5, None, ["a"]], ids=ascii)
def test_what_is_no_text(model: Model, text: Any):
    with pytest.raises(TokenizeError) as caught:
        model.tokenize(text)
    assert caught.value.reason
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "data",
    [b"\xff\xfe", b"a\x80b", b"\xf0\x9f", bytearray(b"the"), memoryview(b"the")],
    ids=lambda data: bytes(data).hex() + type(data).__name__,
)
def test_bytes_that_need_not_be_text(model: Model, data: Any):
    """Bytes go to llama.cpp as they are; what is no UTF-8 gives tokens, and never an end of the process."""
    ids = model.tokenize(data, add_special=False)
    assert ((ids >= 0) & (ids < model.n_vocab)).all()
    model.detokenize(ids)
    if bytes(data) == b"the":
        assert model.detokenize(ids).strip() == "the"


def test_ids_that_do_not_exist(model: Model):
    for bad in (-1, model.n_vocab, 2**31):
        for call in (model.detokenize, lambda ids: model.token_to_piece(ids[-1]), lambda ids: model.is_eog(ids[-1])):
            with pytest.raises(TokenizeError) as caught:
                call([1, bad])
            assert caught.value.token == bad
            assert caught.value.n_vocab == model.n_vocab
    for bad in ([[1]], [1.5], "ab", None):
        with pytest.raises(TokenizeError):
            model.detokenize(bad)
    assert model.detokenize([]) == ""


def test_no_vocabulary():
    """llama.cpp ends the process when asked."""
    with Model(tiny.path("dense")) as model:
        assert not model.has_vocab
        for call in (lambda: model.tokenize("a"), lambda: model.detokenize([1]), lambda: model.token_to_piece(1)):
            with pytest.raises(TokenizeError) as caught:
                call()
            assert caught.value.reason == "no vocabulary"
        assert not model.is_eog(5)
        assert model.n_vocab == 256
        assert (model.bos, model.eos) == (-1, -1)


# --- chat templates ---------------------------------------------------------------------------------------------------

MESSAGES = [{"role": "system", "content": "Be brief. 🙂"}, {"role": "user", "content": "<b>&'\"</b>"}]


def test_the_models_own_template(spm: Model):
    text = spm.apply_chat_template(MESSAGES)
    expected = "<|im_start|>system\nBe brief. 🙂<|im_end|>\n<|im_start|>user\n<b>&'\"</b><|im_end|>\n"
    assert text == expected + "<|im_start|>assistant\n"
    assert spm.apply_chat_template(MESSAGES, add_generation_prompt=False) == expected
    assert spm.chat_template() == tiny.CHAT_TEMPLATE
    ids = spm.tokenize(text, add_special=False, parse_special=True)
    assert (ids == START).sum() == 3


def test_no_template():
    with Model(tiny.path("dense")) as model:
        assert model.chat_template() is None
        with pytest.raises(TemplateError) as caught:
            model.apply_chat_template(MESSAGES)
        assert caught.value.reason == "no template"
        assert model.apply_chat_template(MESSAGES, template="{{ messages|length }}") == "2"


def test_what_templates_in_the_wild_use(spm: Model):
    def render(template: str, **variables: Any) -> str:
        return spm.apply_chat_template(MESSAGES, template=template, **variables)

    assert render("{{ bos_token }}{{ eos_token }}") == "<s></s>"
    assert render("{{ tools | tojson }}", tools=[{"a": "<é>"}]) == '[{"a": "<é>"}]'
    assert (
        render("{% for m in messages %}\n  {% if loop.last %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}") == "user\n"
    )
    assert render("{% for m in messages %}{{ m['role'] }}{% break %}{% endfor %}") == "system"
    assert render("{{ strftime_now('%Y') | length }}") == "4"
    assert (
        render("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}")
        == "2"
    )
    assert render("{{ messages[0]['content'][:2] }}{{ missing }}{{ enable is defined }}", enable=False) == "BeTrue"


def test_a_template_that_refuses(spm: Model):
    with pytest.raises(TemplateError) as caught:
        spm.apply_chat_template(MESSAGES, template="{{ raise_exception('roles must alternate') }}")
    assert caught.value.reason == "roles must alternate"


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ 1 / 0 }}",
        "{{ messages.nothing.more }}",
        "{{ messages | no_such_filter }}",
        "{{ messages[0] + 1 }}",
        "{% include 'other' %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        # Ways out of the sandbox
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['jinja2'] }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ self.__init__.__globals__.__builtins__ }}",
        "{{ lipsum.__globals__['os'].system('true') }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
        "{{ ('{0.__class__}' | format(1)).x.y }}",
        "{% set _ = messages.append(1) %}",
        "{% set _ = messages[0].update(role='admin') %}",
        "{% set _ = messages.clear() %}",
        "{{ range(10**9) | list }}",
    ],
)
def test_templates_that_fail_or_attack(spm: Model, template: str):
    messages = [dict(message) for message in MESSAGES]
    with pytest.raises(TemplateError):
        spm.apply_chat_template(messages, template=template)
    assert messages == MESSAGES


@pytest.mark.parametrize("name", ["__class__", "__globals__", "__init__", "__subclasses__", "_private", "func_globals"])
def test_attributes_are_out_of_reach(spm: Model, name: str):
    """A template gets nothing by any way to an attribute, and an error if it goes on from there."""
    for thing in ("messages", "''", "raise_exception", "strftime_now", "range", "namespace()"):
        for way in (f"{thing}.{name}", f"{thing}['{name}']", f"{thing}|attr('{name}')"):
            assert spm.apply_chat_template(MESSAGES, template=f"{{{{ {way} }}}}") == ""
        with pytest.raises(TemplateError):
            spm.apply_chat_template(MESSAGES, template=f"{{{{ ({thing}|attr('{name}')).x }}}}")


def test_smollm2_template(smollm2_path: Path):
    with Model(smollm2_path, vocab_only=True) as model:
        text = model.apply_chat_template([{"role": "user", "content": "Hi"}])
        assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
        ids = model.tokenize(text, add_special=False, parse_special=True)
        assert model.detokenize(ids, unparse_special=True) == text
        assert not model.is_eog(int(ids[0]))
        assert model.is_eog(model.eos)
