"""Each option of a sampler has the effect that it claims, on logits made for it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from llamastate import LogitsUnavailableError, Model, Sampler, SamplerError, SamplingParams
from tests import tiny
from tests.helpers import context, tokens

N = len(tiny.spm_vocab().tokens)
#: Probabilities of the first tokens; all others have next to none.
PROBABILITIES = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625])
DRAWS = 2000


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model(tiny.path("chat", vocab="spm")) as model:
        yield model


def row(*values: float, rest: float = -50.0) -> np.ndarray[Any, np.dtype[np.float32]]:
    logits = np.full(N, rest, np.float32)
    logits[: len(values)] = values
    return logits


KNOWN = row(*np.log(PROBABILITIES))


def draws(model: Model, logits: np.ndarray[Any, Any] = KNOWN, n: int = DRAWS, **options: Any) -> Counter[int]:
    with Sampler(model, seed=1, **{"temperature": 1.0, **options}) as sampler:
        return Counter(sampler.sample_logits(logits) for _ in range(n))


def shares(counted: Counter[int]) -> list[float]:
    return [counted[token] / counted.total() for token in range(len(PROBABILITIES))]


# --- the options ------------------------------------------------------------------------------------------------------


def test_greedy_is_the_default(model: Model):
    assert SamplingParams().is_greedy
    with Sampler(model) as sampler:
        for token in (0, 7, N - 1):
            logits = row()
            logits[token] = -49.0
            assert [sampler.sample_logits(logits) for _ in range(3)] == [token] * 3
        assert sampler.sample_logits(row(1.0, 1.0, 1.0)) == 0


def test_temperature_one_is_the_distribution(model: Model):
    np.testing.assert_allclose(shares(draws(model)), PROBABILITIES, atol=0.04)


@pytest.mark.parametrize("temperature", [0.25, 0.5, 2.0, 10.0])
def test_temperature(model: Model, temperature: float):
    expected = PROBABILITIES ** (1 / temperature)
    found = np.array(shares(draws(model, row(*np.log(PROBABILITIES), rest=-1e4), temperature=temperature)))
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.04)


@pytest.mark.parametrize(("k", "allowed"), [(1, 1), (2, 2), (3, 3), (0, 5), (10**6, 5)])
def test_top_k(model: Model, k: int, allowed: int):
    found = draws(model, top_k=k)
    assert set(found) == set(range(allowed))
    expected = PROBABILITIES[:allowed] / PROBABILITIES[:allowed].sum()
    np.testing.assert_allclose(shares(found)[:allowed], expected, atol=0.04)


@pytest.mark.parametrize(("p", "allowed"), [(0.01, 1), (0.49, 1), (0.6, 2), (0.76, 3), (0.9, 4), (1.0, 5)])
def test_top_p(model: Model, p: float, allowed: int):
    """The smallest set whose probability reaches p."""
    assert set(draws(model, top_p=p)) == set(range(allowed))


@pytest.mark.parametrize(("p", "allowed"), [(0.0, 5), (0.1, 5), (0.2, 3), (0.3, 2), (0.6, 1), (1.0, 1)])
def test_min_p(model: Model, p: float, allowed: int):
    """What is less likely than p times the likeliest goes."""
    assert set(draws(model, min_p=p)) == set(range(allowed))


def test_typical_p(model: Model):
    """The likeliest token carries less surprise than the average here, so it goes first, not last."""
    logits = row(*np.log([0.4] + [0.06] * 10))
    assert 0 not in draws(model, logits, typical_p=0.5)
    assert 0 in draws(model, logits, typical_p=0.99)


def test_logit_bias(model: Model):
    assert set(draws(model, logit_bias={0: -math.inf, 1: -math.inf})) == {2, 3, 4}
    with Sampler(model, logit_bias={9: 100.0}) as sampler:
        assert sampler.sample_logits(KNOWN) == 9
    expected = np.array([0.5, 0.25 * math.e, 0.125, 0.0625, 0.0625])
    found = shares(draws(model, logit_bias={np.int64(1): 1}))
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.04)


def test_repeat_penalty(model: Model):
    """Positive logits of tokens seen are divided, negative ones multiplied; each is seen once it is accepted."""
    with Sampler(model, repeat_penalty=2.0) as sampler:
        logits = row(8.0, 6.0, 5.0)
        assert [sampler.sample_logits(logits) for _ in range(4)] == [0, 1, 2, 0]
    with Sampler(model, repeat_penalty=2.0) as sampler:
        logits = row(-4.0, -6.0, -7.0)
        assert [sampler.sample_logits(logits) for _ in range(3)] == [0, 1, 2]
    with Sampler(model, repeat_penalty=2.0) as sampler:
        assert [sampler.sample_logits(row(8.0, 6.0), accept=False) for _ in range(3)] == [0, 0, 0]
        sampler.accept(0)
        assert sampler.sample_logits(row(8.0, 6.0)) == 1


def test_frequency_and_presence_penalties(model: Model):
    with Sampler(model, frequency_penalty=1.0) as sampler:  # one off for each time seen
        assert [sampler.sample_logits(row(2.5, 0.0)) for _ in range(4)] == [0, 0, 0, 1]
    with Sampler(model, presence_penalty=1.0) as sampler:  # one off, however often
        assert [sampler.sample_logits(row(2.5, 0.0)) for _ in range(6)] == [0] * 6
    with Sampler(model, presence_penalty=3.0) as sampler:
        assert [sampler.sample_logits(row(2.5, 0.0)) for _ in range(3)] == [0, 1, 0]
    with Sampler(model, presence_penalty=-3.0) as sampler:  # a reward
        sampler.accept(1)
        assert sampler.sample_logits(row(2.5, 0.0)) == 1


@pytest.mark.parametrize(
    ("last_n", "expected"), [(0, [0] * 4), (1, [0, 1, 0, 1]), (2, [0, 1, 2, 0]), (64, [0, 1, 2, 3])]
)
def test_penalties_look_back_so_far(model: Model, last_n: int, expected: list[int]):
    with Sampler(model, presence_penalty=10.0, penalty_last_n=last_n) as sampler:
        assert [sampler.sample_logits(row(4.0, 3.0, 2.0, 1.0)) for _ in range(4)] == expected


# --- chance -----------------------------------------------------------------------------------------------------------


def test_a_seed_repeats_itself(model: Model):
    def chosen(seed: int | None) -> tuple[list[int], int]:
        with Sampler(model, temperature=1.0, seed=seed) as sampler:
            return [sampler.sample_logits(KNOWN) for _ in range(50)], sampler.seed

    assert chosen(5) == chosen(5)
    assert chosen(5)[0] != chosen(6)[0]
    drawn, seed = chosen(None)
    assert chosen(seed)[0] == drawn
    assert chosen(None)[1] != seed
    assert chosen(0)[0] != chosen(2**32 - 2)[0]


def test_reset_begins_anew(model: Model):
    with Sampler(model, temperature=1.0, seed=5, presence_penalty=0.5) as sampler:
        first = [sampler.sample_logits(KNOWN) for _ in range(50)]
        assert [sampler.sample_logits(KNOWN) for _ in range(50)] != first
        sampler.reset()
        assert [sampler.sample_logits(KNOWN) for _ in range(50)] == first


@pytest.mark.parametrize(
    "options",
    [{}, {"repeat_penalty": 1.5}, {"grammar": 'root ::= ("the" | "of" | "and")+'}],
    ids=["plain", "penalty", "grammar"],
)
def test_a_clone_goes_its_own_way(model: Model, options: dict[str, Any]):
    logits = np.zeros(N, np.float32)
    with Sampler(model, temperature=1.0, seed=5, **options) as sampler:
        for _ in range(20):
            sampler.sample_logits(logits)
        clone, other = sampler.clone(), sampler.clone()
        expected = [clone.sample_logits(logits) for _ in range(50)]
        assert [sampler.sample_logits(logits) for _ in range(50)] == expected
        clone.close()
        assert [other.sample_logits(logits) for _ in range(50)] == expected
    assert other.seed == 5
    assert not other.closed
    other.sample_logits(logits)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8, "seed": 3},
        {"temperature": 0.8, "repeat_penalty": 1.3, "penalty_last_n": 5, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 1.0, "grammar": 'root ::= ("the" | "of" | "and")+', "logit_bias": {5: -math.inf, 6: 2.5}},
        {"frequency_penalty": 0.5},
    ],
    ids=["plain", "penalty", "grammar", "greedy"],
)
def test_a_state_goes_on_elsewhere(model: Model, options: dict[str, Any]):
    """Written down as text, and read in another process, for all one knows."""
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal(N).astype(np.float32) * 3 for _ in range(60)]
    with Sampler(model, **options) as sampler:
        for logits in rows[:20]:
            sampler.sample_logits(logits)
        text = json.dumps(sampler.state)
        expected = [sampler.sample_logits(logits) for logits in rows[20:]]
        with Sampler.from_state(model, json.loads(text)) as other:
            assert [other.sample_logits(logits) for logits in rows[20:]] == expected
            assert other.seed == sampler.seed
            assert other.state["accepted"] == sampler.state["accepted"]


# --- logits that are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1}]
)
def test_impossible_logits(model: Model, options: dict[str, Any]):
    with Sampler(model, seed=1, **options) as sampler:
        with pytest.raises(SamplerError) as caught:
            sampler.sample_logits(row(1.0, math.nan, math.nan))
        assert (caught.value.reason, caught.value.value) == ("nan logits", 2)
        with pytest.raises(SamplerError) as caught:
            sampler.sample_logits(np.full(N, -np.inf))
        assert caught.value.reason == "no candidates"
        only = np.full(N, -np.inf)
        only[7] = -1000
        assert sampler.sample_logits(only) == 7  # and the sampler is as good as before
    with Sampler(model, logit_bias=dict.fromkeys(range(N), -math.inf)) as sampler, pytest.raises(SamplerError):
        sampler.sample_logits(KNOWN)


@pytest.mark.parametrize("logits", [[], [1.0] * (N - 1), [1.0] * (N + 1), [[1.0] * N], "text", None])
def test_logits_of_another_shape(model: Model, logits: Any):
    with Sampler(model) as sampler, pytest.raises(SamplerError):
        sampler.sample_logits(logits)


def test_logits_in_any_form(model: Model):
    with Sampler(model) as sampler:
        logits = row(1.0, 5.0)
        for form in (logits, logits.tolist(), logits.astype(np.float64), np.repeat(logits, 2)[::2]):
            assert sampler.sample_logits(form) == 1


# --- in a context -----------------------------------------------------------------------------------------------------


def test_sampling_from_a_context():
    with context("chat") as ctx, Sampler(ctx.model) as greedy, Sampler(ctx.model, temperature=1.0, seed=4) as one:
        ctx.decode(tokens(10), logits="all")
        for i in (0, 5, 9, -1, -3):
            assert greedy.sample(ctx, i) == int(ctx.logits(i).argmax())
        with Sampler(ctx.model, temperature=1.0, seed=4) as two:
            assert [one.sample(ctx) for _ in range(20)] == [two.sample_logits(ctx.logits()) for _ in range(20)]
        for i in (10, -11):
            with pytest.raises(LogitsUnavailableError):
                greedy.sample(ctx, i)
        ctx.seq_rm(0)
        with pytest.raises(LogitsUnavailableError):
            greedy.sample(ctx)


def test_a_context_of_another_vocabulary(model: Model):
    with context("dense") as ctx, Sampler(model) as sampler:
        ctx.decode([1])
        with pytest.raises(SamplerError) as caught:
            sampler.sample(ctx)
        assert caught.value.reason == "other vocabulary"


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_k", 2**31),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2),
        ("typical_p", 0),
        ("repeat_penalty", 0),
        ("repeat_penalty", -1),
        ("frequency_penalty", math.nan),
        ("presence_penalty", math.inf),
        ("penalty_last_n", -1),
        ("penalty_last_n", 2**40),
        ("seed", -1),
        ("seed", 2**32 - 1),
        ("seed", 0.5),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {N: 1.0}),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: math.inf}),
    ],
)
def test_parameters_out_of_range(model: Model, name: str, value: Any):
    with pytest.raises(SamplerError, match=name) as caught:
        Sampler(model, **{name: value})
    assert isinstance(caught.value, ValueError)


def test_parameters_that_do_not_exist(model: Model):
    with pytest.raises(SamplerError, match="temprature"):
        Sampler(model, temprature=1.0)
    with pytest.raises(SamplerError):
        Sampler(model, SamplingParams(), temperature=1.0)
    with Sampler(model, SamplingParams(temperature=0.5)) as sampler:
        assert sampler.params.temperature == 0.5


@pytest.mark.parametrize("token", [-1, N, 2**40, 1.5, None])
def test_tokens_that_do_not_exist(model: Model, token: Any):
    with Sampler(model) as sampler, pytest.raises(SamplerError):
        sampler.accept(token)
