"""Grammars, parameters and tokens that llama.cpp's samplers do not survive."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llamastate import ClosedError, LogitsUnavailableError, Sampler, SamplerError, SamplingParams
from llamastate.grammar import check_grammar
from tests import children
from tests.helpers import context, model


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, float("nan"), float("inf"), "1", None]),
        ("top_k", [-1, 1.5, 2**31, "1", None]),
        ("top_p", [0.0, -0.1, 1.1, float("nan"), "x"]),
        ("min_p", [-0.1, 1.1, float("nan"), None]),
        ("typical_p", [0.0, 1.1, float("nan")]),
        ("repeat_penalty", [0.0, -1.0, float("inf")]),
        ("frequency_penalty", [float("inf"), float("nan"), "x"]),
        ("presence_penalty", [-float("inf"), float("nan"), None]),
        ("penalty_last_n", [-1, 2**20 + 1, 2**31 - 1, 2**70, 1.5, None]),
        ("seed", [-1, 2**32 - 1, 2**70, 1.5, "x"]),
    ],
)
def test_parameters_out_of_range(name: str, values: list[Any]):
    for value in values:
        for make in (SamplingParams, lambda **given: Sampler(model("chat"), **given)):
            with pytest.raises(SamplerError) as caught:
                make(**{name: value})
            assert caught.value.parameter == name
            assert caught.value.value is value
            assert isinstance(caught.value, ValueError)


def test_fields_that_do_not_exist():
    with pytest.raises(SamplerError):
        Sampler(model("chat"), temperatur=1.0)
    with pytest.raises(SamplerError):
        Sampler(model("chat"), SamplingParams(), temperature=1.0)


def test_biases_that_cannot_be():
    chat = model("chat")
    for token in (-1, chat.n_vocab, 2**70, "1", 1.5, None):
        with pytest.raises(SamplerError):
            Sampler(chat, logit_bias={token: 1.0})
    for value in (float("nan"), float("inf"), "x", None):
        with pytest.raises(SamplerError) as caught:
            Sampler(chat, logit_bias={1: value})  # type: ignore[dict-item]
        assert caught.value.parameter == "logit_bias"
    forbidden = Sampler(chat, logit_bias=dict.fromkeys(range(chat.n_vocab), -float("inf")))
    with pytest.raises(SamplerError) as caught:
        forbidden.sample_logits(np.zeros(chat.n_vocab, np.float32))
    assert caught.value.reason == "no candidates"


# --- grammars ---------------------------------------------------------------------------------------------------------

TOO_MUCH = {
    "deep": "root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000,
    "open": "root ::= " + "(" * 201,
    "chain": "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(40_000)) + 'r40000 ::= "a"',
    "backwards": 'root ::= "a"{2,1}',
    "backwards with spaces": 'root ::= "a" { 1 # no\n , 0 }',
    "long": 'root ::= "' + "a" * 2_000_000 + '"',
    "long and often": 'root ::= "' + "a" * 10_000 + '"{2000}',
    "often": "root ::= " + '"a"{0,2000} ' * 100,
    "often of often": 'root ::= ("a"{1000}){1000} ' * 100,
}


@pytest.mark.parametrize("grammar", TOO_MUCH.values(), ids=TOO_MUCH.keys())
def test_grammars_that_are_too_much(grammar: str):
    """The parser would recurse until the stack ends, or write rules until memory ends."""
    with pytest.raises(SamplerError) as caught:
        Sampler(model("chat"), grammar=grammar)
    assert caught.value.parameter == "grammar"
    assert caught.value.reason


@pytest.mark.parametrize(
    "grammar",
    ["root", "root ::= x", 'x ::= "a"', "root ::= (", 'root ::= "a', "root ::= [a", "root ::= *", "\0",
     'root ::= root "a" | "b"', 'root ::= "a"{', 'root ::= "a"{x}', 'root ::= "a"{99999999999999999999}', "\udcff",
     'root ::= "\\q"', "root ::= <[99999999999]>", "root ::= <nothing>", 5, object(), b"root"],
)  # fmt: skip
def test_grammars_that_do_not_parse(grammar: Any):
    with pytest.raises(SamplerError) as caught:
        Sampler(model("chat"), grammar=grammar)
    assert caught.value.parameter == "grammar"


def test_a_root_that_is_none():
    for root in ("other", "", "\0", 5, None):
        with pytest.raises(SamplerError):
            Sampler(model("chat"), grammar='root ::= "a"', grammar_root=root)  # type: ignore[arg-type]


def test_a_model_without_vocabulary_has_no_grammar():
    with pytest.raises(SamplerError) as caught:
        Sampler(model("dense"), grammar='root ::= "a"')
    assert caught.value.reason == "no vocabulary"


def test_what_is_not_too_much():
    for grammar in (
        "root ::= " + "(" * 200 + '"a"' + ")" * 200,
        'root ::= "((((((((" [(((] "\\"(((" # ((((((\n',
        'root ::= "a"{0,99999} # which is no end at all',
        'root ::= ("a" | "b"){3} {2} [^\\]{9,1}]* ("{5,1}" ","){1,2}',
        "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(5_000)) + 'r5000 ::= "a"',
    ):
        check_grammar(grammar)
        Sampler(model("chat"), grammar=grammar).sample_logits(np.zeros(model("chat").n_vocab, np.float32))


def test_tokens_that_the_grammar_does_not_allow():
    """Told of one, llama.cpp would abort: at once for an end of text, at the next sampling for any other."""
    chat = model("chat")
    letters = {letter: int(chat.tokenize(letter, add_special=False)[-1]) for letter in "abc"}
    row = np.zeros(chat.n_vocab, np.float32)
    sampler = Sampler(chat, grammar='root ::= "a" "b"?')
    for made in (sampler, sampler.clone()):
        for token in (chat.eos, chat.bos, letters["b"], letters["c"], 0):
            with pytest.raises(SamplerError) as caught:
                made.accept(token)
            assert (caught.value.reason, caught.value.value) == ("not in the grammar", token)
        first = made.sample_logits(row, accept=False)
        made.accept(first)
        with pytest.raises(SamplerError):
            made.accept(letters["c"])
        made.accept(chat.eos)
        for token in (letters["a"], letters["c"]):
            with pytest.raises(SamplerError):
                made.accept(token)
        made.sample_logits(row)
        made.reset()
        assert made.sample_logits(row) == first


RANDOM_GRAMMARS = r"""
import random
from tests.children import limit_memory
limit_memory()
import numpy as np
from llamastate import Sampler, SamplerError
from tests.helpers import model
chat = model("chat")
good = 'root ::= "a" (b | [a-z]+)* "c"?\nb ::= "x"{1,3} "y" | b2\nb2 ::= [^\\n]* "\\u1234" <[5]> !<|im_end|> .'
made = 0
for seed in range(6000):
    rng = random.Random(seed)
    text = list(good if seed % 4 else "root ::= ")
    for _ in range(rng.randrange(1, 8)):
        at = rng.randrange(len(text) + 1)
        how = rng.randrange(3)
        letter = rng.choice('abr"[]()|*+?{},019^-\\ \n#:=<>!.x')
        text[at : at + (how > 0)] = [letter] * (how < 2)
    print(seed, flush=True)
    try:
        sampler = Sampler(chat, grammar="".join(text))
        made += 1
        row = np.random.default_rng(seed).standard_normal(chat.n_vocab).astype(np.float32)
        for _ in range(4):
            sampler.sample_logits(row)
            sampler.accept(rng.randrange(chat.n_vocab))
    except SamplerError:
        pass
print("all alive", made)
"""


@pytest.mark.fuzz
def test_random_grammars_never_end_the_process():
    result = children.run(RANDOM_GRAMMARS)
    assert result.returncode == 0, result.stdout[-20:] + result.stderr[-500:]
    assert int(result.stdout.split()[-1]) > 100


# --- calls ------------------------------------------------------------------------------------------------------------


def test_rows_that_are_no_logits():
    chat = model("chat")
    sampler = Sampler(chat)
    for row in (
        None,
        "x",
        object(),
        [],
        5,
        np.zeros((2, 2)),
        np.zeros(chat.n_vocab - 1),
        [[1], [2, 3]],
        ["a"] * chat.n_vocab,
    ):
        with pytest.raises(SamplerError):
            sampler.sample_logits(row)  # type: ignore[arg-type]
    bad = np.zeros(chat.n_vocab, np.float32)
    bad[7] = np.nan
    with pytest.raises(SamplerError) as caught:
        sampler.sample_logits(bad)
    assert caught.value.value == 1
    with pytest.raises(SamplerError):
        sampler.sample_logits(np.full(chat.n_vocab, -np.inf, np.float32))
    for token in (-1, chat.n_vocab, 2**70, "1", None, 1.5):
        with pytest.raises(SamplerError):
            sampler.accept(token)


def test_contexts_that_have_no_logits():
    chat = model("chat")
    sampler = Sampler(chat)
    with context("chat") as ctx, context("dense") as other:
        for index in (-1, 0, 5, 2**70, "0", None):
            with pytest.raises(LogitsUnavailableError):
                sampler.sample(ctx, index)
        other.decode([1])
        with pytest.raises(SamplerError) as caught:
            sampler.sample(other)
        assert caught.value.reason == "other vocabulary"
        ctx.decode([1])
        assert 0 <= sampler.sample(ctx) < chat.n_vocab
    with pytest.raises(ClosedError):
        sampler.sample(ctx)


def test_a_closed_sampler():
    sampler = Sampler(model("chat"))
    sampler.close()
    sampler.close()
    assert sampler.closed
    for call in (
        lambda: sampler.sample_logits(np.zeros(model("chat").n_vocab)),
        lambda: sampler.accept(1),
        sampler.reset,
        sampler.clone,
    ):
        with pytest.raises(ClosedError) as caught:
            call()
        assert caught.value.what == "sampler"
