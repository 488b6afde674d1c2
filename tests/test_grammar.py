"""Samplers with a grammar: its language, whatever the model would rather say, and no grammar that ends the process."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from llamastate import Model, Sampler, SamplerError
from tests import tiny

N = len(tiny.spm_vocab().tokens)
ANY = np.zeros(N, np.float32)


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model(tiny.path("chat", vocab="spm")) as model:
        yield model


def generate(model: Model, sampler: Sampler, n: int, seed: int = 0) -> str:
    """Text of at most ``n`` tokens, chosen from noise, to the end that the grammar sets."""
    rng, chosen = np.random.default_rng(seed), []
    for _ in range(n):
        token = sampler.sample_logits(rng.standard_normal(N).astype(np.float32))
        if model.is_eog(token):
            break
        chosen.append(token)
    return model.detokenize(chosen, unparse_special=True)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_forces_its_language(model: Model, temperature: float):
    """Whatever the model would rather say."""
    grammar = 'root ::= "yes" | "no" | "n" [0-9]{2,4} "!"'
    seen = set()
    for seed in range(30):
        with Sampler(model, grammar=grammar, temperature=temperature, seed=seed) as sampler:
            text = generate(model, sampler, 20, seed).strip()
            seen.add(text)
            assert text in ("yes", "no") or (text[0] == "n" and text[-1] == "!" and text[1:-1].isdigit())
            assert text in ("yes", "no") or 2 <= len(text) - 2 <= 4
    assert len(seen) > 3


def test_a_grammar_of_json(model: Model):
    grammar = r"""
    root   ::= "{" pair ("," pair){0,2} "}"
    pair   ::= string ":" value
    value  ::= string | number | "true" | "null" | "[" (value ("," value)?)? "]"
    string ::= "\"" [a-z]{1,5} "\""
    number ::= "-"? [1-9] [0-9]{0,3}
    """
    for seed in range(10):
        with Sampler(model, grammar=grammar, temperature=1.0, seed=seed) as sampler:
            value = json.loads(generate(model, sampler, 200, seed))
            assert isinstance(value, dict)
            assert value


def test_the_root_of_a_grammar(model: Model):
    with Sampler(model, grammar='root ::= "a"\nother ::= "zzz"', grammar_root="other") as sampler:
        assert generate(model, sampler, 10).strip() == "zzz"


def test_a_grammar_that_has_ended(model: Model):
    """Nothing is left but to end the text."""
    with Sampler(model, grammar='root ::= "yes"') as sampler:
        assert generate(model, sampler, 10).strip() == "yes"  # the end of generation was chosen and accepted
        assert model.is_eog(sampler.sample_logits(ANY))
        sampler.reset()
        assert generate(model, sampler, 10).strip() == "yes"


def test_a_grammar_that_has_ended_and_may_not_end(model: Model):
    """Its language allows nothing more, and the tokens that end a text are forbidden: no candidate is left."""
    forbidden = {token: -math.inf for token in range(model.n_vocab) if model.is_eog(token)}
    with Sampler(model, grammar='root ::= "yes"', logit_bias=forbidden) as sampler:
        for _ in "yes":
            sampler.sample_logits(ANY)
        with pytest.raises(SamplerError) as caught:
            sampler.sample_logits(ANY)
        assert caught.value.reason == "no candidates"


def test_what_a_grammar_does_not_allow_is_not_accepted(model: Model):
    """llama.cpp would end the process."""
    with Sampler(model, grammar='root ::= "yes"') as sampler:
        wrong = int(model.tokenize("the", add_special=False)[0])
        for token in (wrong, model.eos):
            with pytest.raises(SamplerError) as caught:
                sampler.accept(token)
            assert caught.value.value == token
        assert generate(model, sampler, 10).strip() == "yes"


@pytest.mark.parametrize(
    "grammar",
    [
        "",
        "root = 'a'",
        'other ::= "a"',
        "root ::= nothing",
        'root ::= "a',
        "root ::= root",
        "root ::= [",
        "\0",
        5,
    ],
)
def test_grammars_that_are_none(model: Model, grammar: Any):
    with pytest.raises(SamplerError) as caught:
        Sampler(model, grammar=grammar)
    assert caught.value.parameter == "grammar"


def test_a_grammar_needs_a_vocabulary():
    with Model(tiny.path("dense")) as dense, pytest.raises(SamplerError) as caught:
        Sampler(dense, grammar='root ::= "a"')
    assert caught.value.reason == "no vocabulary"
