from __future__ import annotations

from collections.abc import Iterator

import pytest

from llamastate.batch import BatchRunner
from tests.conftest import THREADS
from tests.helpers import model


@pytest.fixture(scope="module")
def runner() -> Iterator[BatchRunner]:
    """Eight at once, one thread, a tiny model with a vocabulary and a template."""
    with BatchRunner(model("dense", vocab="spm"), n_parallel=8, n_ctx=4096, n_threads=THREADS) as made:
        yield made
