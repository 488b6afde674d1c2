"""Who keeps whom alive between a ``llama_cpp.Llama`` and its attachments, and what is left when one of them ends."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import llama_cpp
import numpy as np
import pytest

from llamastate import ClosedError, Context, Sampler
from tests import children, tiny
from tests.helpers import context
from tests.interop.test_attach import TEXT, make


@pytest.fixture
def llm() -> Iterator[llama_cpp.Llama]:
    llm = make(tiny.path("chat", vocab="spm"))
    yield llm
    llm.close()


def test_an_attachment_keeps_it_alive():
    llm = make(tiny.path("chat"))
    reference = weakref.ref(llm)
    ctx = Context.attach(llm)
    del llm
    gc.collect()
    ctx.decode(TEXT)
    assert reference() is not None
    assert np.isfinite(ctx.logits()).all()


@pytest.mark.parametrize("last", ["attachment", "llama"])
@pytest.mark.parametrize("used", [False, True])
def test_freed_with_the_last_of_both(last: str, used: bool):
    """At once, and without the collector."""
    llm = make(tiny.path("chat"))
    one, two = Context.attach(llm), Context.attach(llm)
    if used:
        llm.eval([1, 2])
        one.state_seq_set_data(two.state_seq_get_data(0), 0)
    died = [weakref.ref(each) for each in (llm, llm._ctx, llm._model, one, one._handle)]
    gc.disable()
    try:
        if last == "llama":
            del one, two
            assert died[0]() is not None
            del llm
        else:
            del llm
            one.close()
            del one
            assert died[0]() is not None
            two.decode([1])
            del two
        assert [reference() for reference in died] == [None] * 5
    finally:
        gc.enable()


def test_freed_by_the_collector():
    """In a ring with its attachment: the Llama's own end, which calls what we have put ourselves before."""

    class Node:
        pass

    node = Node()
    node.llm = make(tiny.path("chat"))
    node.ctx = Context.attach(node.llm)
    node.llm.owner = node.llm._ctx.owner = node.ctx.owner = node
    node.llm.eval([1])
    died = [weakref.ref(each) for each in (node.llm, node.llm._ctx, node.llm._model, node.ctx, node.ctx._handle)]
    del node
    gc.collect()
    assert [reference() for reference in died] == [None] * 5


USES: dict[str, Callable[[Context, Sampler], Any]] = {
    "decode": lambda ctx, sampler: ctx.decode([1]),
    "logits": lambda ctx, sampler: ctx.logits(),
    "state": lambda ctx, sampler: ctx.state_get_data(),
    "sample": lambda ctx, sampler: sampler.sample(ctx),
    # These need the model only, and that is freed as well.
    "sample_logits": lambda ctx, sampler: sampler.sample_logits(np.zeros(ctx.model.n_vocab, np.float32)),
    "accept": lambda ctx, sampler: sampler.accept(5),
    "clone": lambda ctx, sampler: sampler.clone(),
    "tokenize": lambda ctx, sampler: ctx.model.tokenize("the"),
    "detokenize": lambda ctx, sampler: ctx.model.detokenize([5]),
    "new sampler": lambda ctx, sampler: Sampler(ctx.model),
    "new context": lambda ctx, sampler: Context(ctx.model),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("how", ["close", "stack"])
def test_a_closed_llama(how: str, use: str):
    llm = make(tiny.path("chat"))
    ctx = Context.attach(llm)
    ctx.decode([1])
    sampler = Sampler(ctx.model, grammar='root ::= "the" root | "of" root')
    USES["sample_logits"](ctx, sampler)
    {"close": llm.close, "stack": llm._stack.close}[how]()
    assert ctx.closed
    assert ctx.model.closed
    with pytest.raises(ClosedError):
        USES[use](ctx, sampler)
    with pytest.raises(ClosedError):
        Context.attach(llm)
    sampler.close()
    ctx.close()
    ctx.close()
    assert "closed" in repr(ctx)


def test_the_inside_of_a_llama_closed():
    """Its context is gone, its model is not."""
    llm = make(tiny.path("chat"))
    ctx = Context.attach(llm)
    llm._ctx.close()
    assert ctx.closed
    with pytest.raises(ClosedError):
        ctx.decode([1])
    assert ctx.model.tokenize("the of").tolist() == llm.tokenize(b"the of")
    llm.close()


def test_closing_an_attachment_leaves_the_llama(llm: llama_cpp.Llama):
    ctx = Context.attach(llm)
    llm.eval(TEXT.tolist())
    ctx.close()
    ctx.close()
    with pytest.raises(ClosedError):
        ctx.decode([1])
    assert ctx.n_ctx == 512
    llm.eval([3])
    again = Context.attach(llm)
    assert again.seq_pos_max(0) == len(TEXT)
    again.decode([1])


def test_closing_one_attachment_leaves_the_other(llm: llama_cpp.Llama):
    with Context.attach(llm) as one:
        two = Context.attach(llm)
        one.decode(TEXT)
    assert one.closed
    assert not two.closed
    assert two.decode([1]) == 1
    two.close()
    llm.eval([1])


def test_it_can_still_be_pickled():
    """A Llama opens its file anew in the other process; that one is a stranger to us."""
    llm = make(tiny.path("chat"), n_ctx=256)
    ctx = Context.attach(llm)
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        other = pickle.loads(pickle.dumps(llm, protocol))
        assert type(other) is llama_cpp.Llama
        other.eval([1])
        assert ctx.seq_pos_max(0) == -1
        other.close()
    assert isinstance(llm, llama_cpp.Llama)
    llm.close()


def test_closed_while_another_thread_computes():
    """The Llama's end waits for the computation that goes on in its context. In a process of its own: else a crash."""
    done = children.run(
        """
import threading
from llamastate import ClosedError, Context
from tests.interop.test_attach import make
from tests.helpers import tokens
from tests.test_locks import SLOW
from tests import tiny
for close in (lambda llm: llm.close(), lambda llm: llm._ctx.close()) * 2:
    llm = make(tiny.path("dense", **SLOW), n_ctx=1024)
    ctx = Context.attach(llm)
    outcome = []
    def work():
        try:
            while True:
                ctx.decode(tokens(100))
                outcome.append("decoded")
                ctx.clear()
        except ClosedError:
            outcome.append("closed")
    thread = threading.Thread(target=work)
    thread.start()
    while not outcome:
        pass
    close(llm)
    thread.join()
    assert outcome[-1] == "closed"
print("survived")
"""
    )
    assert (done.returncode, done.stdout) == (0, "survived\n"), done.stderr


def test_what_is_no_llama():
    for thing in (None, 5, object(), context, llama_cpp):
        with pytest.raises(TypeError, match="Llama"):
            Context.attach(thing)
