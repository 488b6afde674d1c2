"""Runners over tiny models."""

from __future__ import annotations

from llamastate.batch import BatchRunner
from tests.conftest import THREADS
from tests.helpers import model


def runner(m="chat", **params):
    settings = {"n_parallel": 4, "n_spare": 2, "n_ctx": 1024, "n_threads": THREADS, **params}
    return BatchRunner(model(m) if isinstance(m, str) else m, **settings)


def one(request, **params):
    with runner(**params) as r:
        (result,) = r.run([request])
    return result
