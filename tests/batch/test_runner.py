"""The runner: what is asked for comes back, faults stay with their request, and nothing is lost."""

from __future__ import annotations

import gc

import numpy as np
import psutil
import pytest

from llamastate import SamplingParams
from llamastate.batch import Malformed, Request
from llamastate.errors import (
    DecodeError,
    InvalidArgumentError,
    NotEnoughCellsError,
    SamplerError,
    TemplateError,
    TokenizeError,
)
from llamastate.prefix import PrefixStore
from tests.batch.runners import one, runner
from tests.helpers import model, tokens


@pytest.fixture(scope="module")
def chat():
    return model("chat")


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_text(chat):
    result = one(Request("a", "the cat is on the", max_tokens=7, meta={"any": "thing"}))
    assert result.ok
    assert (result.id, result.meta) == ("a", {"any": "thing"})
    assert result.prompt_tokens.tolist() == chat.tokenize("the cat is on the").tolist()
    (output,) = result.outputs
    assert len(output.tokens) == 7
    assert result.n_generated == 7
    assert output.finish_reason == "length"
    assert output.text == b"".join(chat.token_to_piece(t) for t in output.tokens).decode("utf-8", "replace")
    assert 0 <= result.times.queued <= result.times.first_token <= result.times.total


def test_messages(chat):
    messages = [{"role": "user", "content": "when was it"}]
    result = one(Request("a", messages, max_tokens=3))
    text = chat.apply_chat_template(messages)
    assert result.prompt_tokens.tolist() == chat.tokenize(text, add_special=False, parse_special=True).tolist()


def test_what_a_template_has_written(chat):
    """As text it is text; with ``parse_special`` it is what the messages are."""
    messages = [{"role": "user", "content": "when was it"}]
    text = chat.apply_chat_template(messages)
    told, special, plain = (
        one(Request("a", prompt, max_tokens=1, parse_special=special)).prompt_tokens.tolist()
        for prompt, special in ((messages, False), (text, True), (text, False))
    )
    assert special == told
    assert len(plain) > len(told)


def test_echo(chat):
    prompt = "that is the"
    result = one(Request("a", prompt, max_tokens=3, echo=True, logprobs=1))
    assert result.outputs[0].text.startswith(prompt)
    assert result.n_cached == 0
    scores = result.prompt_logprobs
    assert scores[0] is None
    assert [s.token for s in scores[1:]] == result.prompt_tokens[1:].tolist()
    assert all(s.logprob <= s.top[0][2] <= 0 for s in scores[1:])


def test_stop(chat):
    free = one(Request("a", "the", max_tokens=20)).outputs[0]
    stop = free.text[3:6]
    output = one(Request("a", "the", max_tokens=20, stop=(stop, "never"))).outputs[0]
    assert output.finish_reason == "stop"
    assert output.text == free.text[: free.text.index(stop)]
    assert output.tokens.tolist() == free.tokens[: len(output.tokens)].tolist()
    assert len(output.tokens) < 20
    assert one(Request("a", "the", max_tokens=20, stop=stop)).outputs[0].text == output.text


def test_the_model_ends(chat):
    ends = SamplingParams(logit_bias={chat.eos: 1000.0})
    output = one(Request("a", "the", sampling=ends)).outputs[0]
    assert (output.finish_reason, output.text, len(output.tokens)) == ("stop", "", 0)
    output = one(Request("a", "the", sampling=ends, ignore_eos=True, max_tokens=5)).outputs[0]
    assert (output.finish_reason, len(output.tokens)) == ("length", 5)


def test_logprobs(chat):
    output = one(Request("a", "the", max_tokens=4, logprobs=3)).outputs[0]
    assert len(output.logprobs) == 4
    for score, token in zip(output.logprobs, output.tokens, strict=True):
        assert score.token == token == score.top[0][0]  # greedy
        assert score.logprob == score.top[0][2]
        assert [t[2] for t in score.top] == sorted((t[2] for t in score.top), reverse=True)
        assert sum(np.exp(t[2]) for t in score.top) <= 1
        assert score.piece == chat.token_to_piece(int(token), special=True)


def test_grammar_and_bias():
    grammar = SamplingParams(grammar='root ::= "the " ("cat" | "dog")')
    output = one(Request("a", "it is ", max_tokens=30, sampling=grammar)).outputs[0]
    assert output.text in ("the cat", "the dog")
    assert output.finish_reason == "stop"


def test_no_tokens_wanted():
    result = one(Request("a", "the cat", max_tokens=0, n=2))
    assert [(o.index, o.text, len(o.tokens), o.finish_reason) for o in result.outputs] == [
        (0, "", 0, "length"),
        (1, "", 0, "length"),
    ]


def test_seeds():
    def text(seed, n):
        sampling = SamplingParams(temperature=2.0, seed=seed)
        return one(Request("a", "the", n=n, max_tokens=6, sampling=sampling), fixed_shapes=True, n_ctx=2048).outputs

    several = text(5, 3)
    assert [o.index for o in several] == [0, 1, 2]
    assert several[1].text == text(6, 1)[0].text
    assert len({o.text for o in several}) > 1


def test_as_long_as_the_cache_is():
    result = one(Request("a", tokens(250), max_tokens=100), m="dense", n_ctx=256)
    assert result.outputs[0].finish_reason == "full"
    assert len(result.outputs[0].tokens) == 256 - 250 + 1
    result = one(Request("a", tokens(256), max_tokens=1), m="dense", n_ctx=256)
    assert len(result.outputs[0].tokens) == 1


def test_priority_and_order():
    requests = [Request(str(i), tokens(10, i), max_tokens=2, priority=i % 2) for i in range(6)]
    with runner("dense", n_parallel=1) as r:
        assert [x.id for x in r.run(requests)] == ["1", "3", "5", "0", "2", "4"]


# --- faults -----------------------------------------------------------------------------------------------------------

BAD = {
    "too long": (Request("", tokens(2000)), InvalidArgumentError),
    "no room for a token": (Request("", tokens(1024), max_tokens=9), InvalidArgumentError),
    "empty text": (Request("", ""), InvalidArgumentError),
    "no tokens": (Request("", []), InvalidArgumentError),
    "no messages": (Request("", ()), InvalidArgumentError),
    "no such token": (Request("", [1, 2, 10**6]), TokenizeError),
    "lone surrogate": (Request("", "\ud800"), TokenizeError),
    "not a prompt": (Request("", 3.5), InvalidArgumentError),
    "message without role": (Request("", [{"content": object()}]), TemplateError),
    "grammar": (Request("", "the", sampling=SamplingParams(grammar="root ::= (")), SamplerError),
    "bias": (Request("", "the", sampling=SamplingParams(logit_bias={10**6: 1.0})), SamplerError),
    "all forbidden": (
        Request("", "the", sampling=SamplingParams(logit_bias=dict.fromkeys(range(model("chat").n_vocab), -np.inf))),
        SamplerError,
    ),
    "max_tokens": (Request("", "the", max_tokens=-1), InvalidArgumentError),
    "max_tokens of a bad type": (Request("", "the", max_tokens="7"), InvalidArgumentError),
    "n": (Request("", "the", n=0), InvalidArgumentError),
    "logprobs": (Request("", "the", logprobs=10**6), InvalidArgumentError),
    "stop": (Request("", "the", stop=("",)), InvalidArgumentError),
    "stop of a bad type": (Request("", "the", stop=7), InvalidArgumentError),
    "stops of a bad type": (Request("", "the", stop=(7,)), InvalidArgumentError),
    "sampling": (Request("", "the", sampling={"temperature": 1}), InvalidArgumentError),
    "kind": (Request("", "the", kind="rank"), InvalidArgumentError),
    "embedding too long": (Request("", tokens(5000), kind="embed"), InvalidArgumentError),
    "malformed": (Malformed("", SamplerError("so it is")), SamplerError),
    "no request": ("the", InvalidArgumentError),
}


@pytest.fixture(scope="module")
def faulty():
    """All of them in one run, between sound ones."""
    items = []
    for name, (item, _) in BAD.items():
        if isinstance(item, Request):
            item = Request(name, *(getattr(item, f) for f in list(Request.__slots__)[1:]))
        elif isinstance(item, Malformed):
            item = Malformed(name, item.error)
        items += [Request(f"sound {len(items)}", f"that {len(items)} is", max_tokens=5, ignore_eos=True), item]
    with runner() as r:
        return {result.id: result for result in r.run(items)}, r.stats


@pytest.mark.parametrize("name", BAD)
def test_a_fault_is_its_own(faulty, name):
    results, _ = faulty
    result = results["" if name == "no request" else name]
    assert isinstance(result.error, BAD[name][1])
    assert not result.ok
    assert result.outputs == ()
    assert result.error.__traceback__ is None


def test_and_nobody_elses(faulty):
    results, stats = faulty
    sound = [r for r in results.values() if r.id.startswith("sound")]
    assert len(sound) == len(BAD)
    assert all(r.ok and len(r.outputs[0].tokens) == 5 for r in sound)
    assert (stats.done, stats.failed) == (len(BAD), len(BAD))


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        (None, "NoneType"),
        (5, "int"),
        ({"role": "user", "content": "the"}, "one mapping"),
        (["a"], "a list of str"),
        ([1, 2.5, None], "a list of NoneType and float"),
        (np.zeros(3), "an array of float64"),
        (object(), "object"),
    ],
)
def test_what_is_no_prompt_is_told_what_is_one(prompt, what):
    error = one(Request("", prompt)).error
    assert isinstance(error, InvalidArgumentError)
    assert str(error) == f"prompt is {what}: text, token ids, or a list of chat messages"
    assert error.name == "prompt"


def test_text_in_the_place_of_requests():
    with runner() as r:
        (result,) = r.run(["the"])
    assert "Request(id, prompt)" in str(result.error)


def test_reading_fails():
    """What had been read is done, and then the reader's error is told."""

    def requests():
        for i in range(10):
            yield Request(str(i), tokens(10, i), max_tokens=3)
        raise OSError("the disk is gone")

    with runner("dense") as r:
        results = r.run(requests())
        got = [next(results).id for _ in range(10)]
        with pytest.raises(OSError, match="the disk is gone"):
            next(results)
    assert sorted(got) == [str(i) for i in range(10)]


def test_a_decode_that_fails(monkeypatch):
    """llama.cpp gives up once: those in that batch fail, the others go on."""
    with runner("dense") as r:
        real, calls = r.ctx._decode, []

        def decode(*columns):
            calls.append(len(columns[0]))
            if len(calls) == 3:
                raise DecodeError("out of luck", code=-3, n_tokens=calls[-1])
            return real(*columns)

        monkeypatch.setattr(r.ctx, "_decode", decode)
        results = list(r.run([Request(str(i), tokens(10, i), max_tokens=4) for i in range(12)]))
        assert len(results) == 12
        assert {type(x.error) for x in results if x.error} == {DecodeError}
        assert sum(x.ok for x in results) == 8
        assert [r.ctx.seq_pos_max(s) for s in range(4)] == [-1] * 4


def collect(done, results):
    for result in results:
        done.append(result.id)  # one by one: the next may raise


@pytest.mark.parametrize("where", ["_decode", "seq_cp", "logits"])
def test_interrupted_anywhere(monkeypatch, where):
    """Ctrl-C in the middle of a step: everything that was under way is told, and the runner serves again."""
    shared = tokens(30)
    requests = [Request(str(i), [*shared.tolist(), i], max_tokens=4) for i in range(12)]
    with runner("dense") as r:
        real, calls = getattr(r.ctx, where), []

        def interrupt(*args, **kwargs):
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        done = []
        with monkeypatch.context() as patch:
            patch.setattr(r.ctx, where, interrupt)
            with pytest.raises(KeyboardInterrupt):
                collect(done, r.run(requests))
        assert sorted([*done, *(q.id for q in r.unfinished)]) == sorted(q.id for q in requests)
        assert all(x.ok for x in r.run(r.unfinished))
        assert r.stats.running == 0


@pytest.mark.parametrize("what", ["lookup", "load", "put"])
@pytest.mark.parametrize("error", [OSError("no disk"), KeyError("out of luck"), None], ids=["OSError", "bug", "closed"])
def test_a_store_that_fails(monkeypatch, what, error):
    """Once, and then it works again: told once, and asked again. A closed one is not."""
    shared = tokens(64).tolist()
    with PrefixStore(None, block_tokens=8) as store:
        with runner("dense", store=store) as r:
            assert len(list(r.run([Request("", shared, max_tokens=1)]))) == 1
        calls, real = [], getattr(store, what)

        def fail(*args, **kwargs):
            calls.append(what)
            if len(calls) > 2:
                return real(*args, **kwargs)
            if error is None:
                store.close()
                return real(*args, **kwargs)
            raise error

        requests = [Request(str(i), [*shared[: 63 - i], i, 5, 6], max_tokens=2) for i in range(6)]
        with runner("dense", store=store, n_parallel=1, n_spare=0) as r:
            monkeypatch.setattr(store, what, fail)
            with pytest.warns(RuntimeWarning, match="store") as told:
                results = list(r.run(requests))
            stored = r.stats.stored_tokens
    assert all(x.ok for x in results)
    assert len(results) == 6
    assert len(told) == 1
    assert ("without" in str(told[0].message)) == (error is None)
    assert (len(calls) == 1) == (error is None)
    if error is not None:
        assert stored > 0


def test_no_room_for_what_is_stored(monkeypatch):
    """That says nothing of the store."""
    shared = tokens(64).tolist()
    with PrefixStore(None, block_tokens=8) as store, runner("dense", store=store, n_spare=0) as r:
        list(r.run([Request("", shared, max_tokens=1)]))
        real, calls = store.load, []

        def load(*args, **kwargs):
            calls.append(args)
            if len(calls) == 1:
                raise NotEnoughCellsError("no room", needed=1, available=0)
            return real(*args, **kwargs)

        monkeypatch.setattr(store, "load", load)
        for i in range(3):
            assert next(r.run([Request("", [*shared, i], max_tokens=1)])).ok
        assert len(calls) == 3


def test_little_memory_and_many_requests():
    """Ten thousand, and room for few: they are read as there is room, in memory that does not grow."""
    read = 0
    process = psutil.Process()

    def requests():
        nonlocal read
        for i in range(10_000):
            read += 1
            yield Request(str(i), [i % 200, i // 200, 7], max_tokens=1 + i % 3)

    with runner("dense", n_ctx=256, n_parallel=64, reserve=1) as r:
        n, ahead, sizes = 0, 0, []
        for result in r.run(requests()):
            assert result.ok
            n += 1
            ahead = max(ahead, read - n)
            if n % 1000 == 0:
                gc.collect()
                sizes.append(process.memory_info().rss)
        assert n == 10_000
        assert ahead <= 4 * 64 + 2 * 64 + 1  # the window, what runs, and what is done but not handed over
        assert sizes[-1] - sizes[2] < 8 << 20
        assert r.stats.kv_usage <= 1
