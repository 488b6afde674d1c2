"""What is closed, dropped or left open: always an error or nothing, never a crash."""

from __future__ import annotations

import contextlib
import gc
import inspect
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamastate import (
    Batch,
    ClosedError,
    Context,
    LogitsUnavailableError,
    Model,
    Sampler,
)
from tests import children, tiny
from tests.conftest import THREADS
from tests.helpers import context, tokens

#: For each parameter that a public method needs, something that it would take from an open object.
ARGUMENTS: dict[str, Any] = {
    "tokens": [1],
    "batch": Batch(),
    "seq_id": 0,
    "dest_seq_id": 0,
    "src": bytes(64),
    "dst": 1,
    "out": bytearray(1 << 20),
    "path": "/nonexistent/state",
    "p0": 0,
    "p1": -1,
    "delta": 1,
    "d": 2,
    "n_threads": 1,
    "token": 5,
    "adapters": [],
    "text": "a",
    "messages": [{"role": "user", "content": "a"}],
    "logits": np.zeros(len(tiny.spm_vocab().tokens), np.float32),
}
ARGUMENTS["batch"].add(1, pos=0)


def public(cls: type) -> list[str]:
    return [name for name in dir(cls) if not name.startswith("_")]


def methods(cls: type, *without: str) -> list[str]:
    """Public methods that belong to an object, all that there are."""
    found = []
    for name in public(cls):
        static = inspect.getattr_static(cls, name)
        if callable(static) and not isinstance(static, (classmethod, staticmethod)) and name not in without:
            found.append(name)
    return found


def call(obj: Any, name: str, **special: Any) -> Any:
    method = getattr(obj, name)
    needed = [
        parameter.name
        for parameter in inspect.signature(method).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    result = method(*[special[key] if key in special else ARGUMENTS[key] for key in needed])
    if isinstance(result, contextlib.AbstractContextManager) and name == "lock":  # it acts where it is entered
        with result:
            pass
    return result


@pytest.fixture
def chat() -> Model:
    return Model(tiny.path("chat"))


# Files are read before the context is asked for anything; whichever of the two is at fault is told.
FILES = {"state_load_file", "state_seq_load_file"}


@pytest.mark.parametrize("name", methods(Context, "close"))
def test_a_closed_context_does_nothing(name: str, tmp_path: Path):
    ctx = context("chat", n_seq_max=2)
    ctx.decode([1, 2, 3])
    ctx.state_save_file(tmp_path / "state_load_file", [1])
    ctx.state_seq_save_file(tmp_path / "state_seq_load_file", 0, [1])
    blob = ctx.state_get_data() if name == "state_set_data" else ctx.state_seq_get_data(0)
    src = 0 if name == "seq_cp" else blob
    ctx.close()
    with pytest.raises(ClosedError) as caught:
        call(ctx, name, src=src, path=tmp_path / name)
    assert caught.value.what == "context"
    assert isinstance(caught.value, ValueError)
    assert (tmp_path / name).exists() == (name in FILES)


@pytest.mark.parametrize("cls", [Context, Model, Sampler])
def test_properties_of_what_is_closed(cls: type, chat: Model):
    """A number that is still known, or the error."""
    obj = {Context: lambda: Context(chat, n_threads=1), Model: lambda: chat, Sampler: lambda: Sampler(chat)}[cls]()
    obj.close()
    obj.close()
    assert obj.closed
    for name in public(cls):
        if not callable(inspect.getattr_static(cls, name)):
            try:
                getattr(obj, name)
            except ClosedError:
                continue
    assert repr(obj)


@pytest.mark.parametrize("name", methods(Model, "close"))
def test_a_closed_model_does_nothing(name: str, chat: Model):
    call(chat, name)  # the arguments are good
    chat.close()
    with pytest.raises(ClosedError) as caught:
        call(chat, name)
    assert caught.value.what == "model"
    with pytest.raises(ClosedError):
        Context(chat)
    with pytest.raises(ClosedError):
        Sampler(chat)


@pytest.mark.parametrize("name", methods(Sampler, "close"))
def test_a_closed_sampler_does_nothing(name: str, chat: Model):
    with Context(chat, n_ctx=256, n_threads=THREADS) as ctx:
        ctx.decode([1])
        sampler = Sampler(chat, grammar='root ::= "a"*')
        sampler.close()
        with pytest.raises(ClosedError) as caught:
            call(sampler, name, ctx=ctx)
        assert caught.value.what == "sampler"


def test_a_model_closed_before_its_contexts():
    """They keep the weights; nothing new can be made of it."""
    model = Model(tiny.path("dense"))
    one, two = Context(model, n_ctx=256, n_threads=THREADS), Context(model, n_ctx=256, n_threads=THREADS)
    one.decode(tokens(10))
    expected = one.logits()
    model.close()
    two.decode(tokens(10))
    np.testing.assert_array_equal(two.logits(), expected)
    assert two.state_seq_set_data(one.state_seq_get_data(0), 0)
    assert two.state_set_data(one.state_get_data())
    one.close()
    two.decode([1])
    assert two.seq_pos_max(0) == 10


@pytest.mark.parametrize("name", methods(Context, "close"))
def test_a_context_works_on_without_its_model(name: str, tmp_path: Path):
    """Every method, also those that ask the model something for the first time."""
    model = Model(tiny.path("iswa"))
    with Context(model, n_ctx=512, n_seq_max=2, n_threads=THREADS) as ctx:
        ctx.decode([1, 2, 3])
        ctx.state_save_file(tmp_path / "state_load_file", [1])
        ctx.state_seq_save_file(tmp_path / "state_seq_load_file", 0, [1])
        blob = ctx.state_get_data() if name == "state_set_data" else ctx.state_seq_get_data(0)
        if name == "decode_batch":
            ctx.clear()
        model.close()
        none = name in ("embeddings", "embeddings_seq")
        with pytest.raises(LogitsUnavailableError) if none else contextlib.nullcontext():
            call(ctx, name, src=0 if name == "seq_cp" else blob, path=tmp_path / name)


def test_a_model_dropped_before_its_contexts_and_samplers(chat: Model):
    ctx, sampler = Context(chat, n_ctx=256, n_threads=THREADS), Sampler(chat, grammar='root ::= "the" root | "of"')
    del chat
    gc.collect()
    ctx.decode([1])
    assert sampler.sample(ctx) >= 0
    model = ctx.model
    ctx.close()
    assert sampler.clone().sample_logits(np.arange(model.n_vocab)) >= 0


def test_with_closes():
    with Model(tiny.path("dense")) as model, Context(model, n_threads=1) as ctx, Sampler(model) as sampler:
        assert [model.closed, ctx.closed, sampler.closed] == [False] * 3
    assert [model.closed, ctx.closed, sampler.closed] == [True] * 3


def test_with_closes_after_an_error():
    with pytest.raises(ZeroDivisionError), context("dense") as ctx:
        ctx.decode([1 // 0])
    assert ctx.closed


def test_dropped_contexts_go_at_once():
    """Without waiting for the collector: their memory is large."""
    ctx = context("dense")
    ctx.decode(tokens(5))
    died = weakref.ref(ctx), weakref.ref(ctx._handle)
    gc.disable()
    try:
        del ctx
        assert [reference() for reference in died] == [None, None]
    finally:
        gc.enable()


def test_cycles_are_collected():
    """A context that knows somebody who knows it, with its model and its sampler in the same ring."""

    class Node:
        pass

    node = Node()
    node.me = node
    node.model = Model(tiny.path("chat"))
    node.ctx = Context(node.model, n_ctx=256, n_threads=THREADS)
    node.sampler = Sampler(node.model, grammar='root ::= "a"*')
    node.model.owner = node.ctx.owner = node.sampler.owner = node
    node.ctx.decode([1])
    died = [weakref.ref(each) for each in (node.ctx, node.model, node.sampler, node.ctx._handle)]
    del node
    gc.collect()
    assert [reference() for reference in died] == [None] * 4


def test_nothing_leaks():
    """Contexts and states come and go; the process does not grow with their number."""
    done = children.run(
        """
import psutil
from llamastate import Model, Sampler
from tests import tiny
from tests.helpers import context, tokens

def work():
    with context("iswa", n_seq_max=2, n_ctx=2048) as ctx:
        ctx.decode(tokens(50))
        view = ctx.logits(copy=False)
        for flags in (0, 1, 2):
            ctx.state_seq_set_data(ctx.state_seq_get_data(0, flags), 0, flags)
        ctx.state_set_data(ctx.state_get_data())
        try:
            ctx.state_seq_set_data(b"x" * 100, 0)
        except ValueError:
            pass
    context("jamba").decode([1])
    with Model(tiny.path("chat")) as model:
        Sampler(model, grammar='root ::= "a"*', temperature=1).clone()

for _ in range(20):
    work()
before = psutil.Process().memory_info().rss
for _ in range(150):
    work()
print(psutil.Process().memory_info().rss - before)
"""
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 << 20  # one context that stayed each time would make hundreds of megabytes


EXITS = {
    "everything open": "",
    "a view held": "view = ctx.logits(copy=False)",
    "model closed": "model.close()",
    "all closed": "ctx.close(); model.close(); sampler.close()",
    "in a ring": "ctx.me = ctx; model.ctx = ctx; sampler.model = model; del ctx, model, sampler",
    "in a module": "import builtins; builtins.kept = [ctx, model, sampler]",
    "attached": "import llama_cpp\n"
    "llm = llama_cpp.Llama(str(tiny.path('chat')), n_ctx=256, verbose=False)\n"
    "borrowed = llamastate.Context.attach(llm)",
    "attached, without a name": "import llama_cpp\nborrowed = llamastate.Context.attach("
    "llama_cpp.Llama(str(tiny.path('chat')), n_ctx=256, verbose=False))\nborrowed.decode([1])",
    "in use by another thread": "import threading, time\n"
    "def work():\n    while True:\n        ctx.clear(); ctx.decode([1] * 50)\n"
    "threading.Thread(target=work, daemon=True).start()\ntime.sleep(0.05)",
    "exit in the middle": "raise SystemExit(0)",
}


@pytest.mark.parametrize("how", EXITS)
def test_the_end_of_the_interpreter(how: str):
    """Nothing is said and nothing crashes, whatever is still open."""
    done = children.run(
        f"""
import llamastate
from tests import tiny
model = llamastate.Model(tiny.path("chat"))
ctx = llamastate.Context(model, n_ctx=512, n_threads=1)
sampler = llamastate.Sampler(model, grammar='root ::= "a"*', temperature=1)
ctx.decode([1, 2])
sampler.sample(ctx)
{EXITS[how]}
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_end_closes_what_is_open():
    """Before the library goes, which a GPU would not survive. Whoever registered first runs last."""
    done = children.run(
        """
import atexit
def report():
    print(ctx.closed, model.closed)
atexit.register(report)
import llamastate
from tests import tiny
model = llamastate.Model(tiny.path("dense"))
ctx = llamastate.Context(model, n_ctx=256, n_threads=1)
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True True\n", "")
