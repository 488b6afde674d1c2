"""What every test shares: one thread of computation a process, and the models."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import models, tiny

# Set before a test loads llama.cpp: OpenMP reads its variable once. Test processes run side by side, and more threads
# than cores would wait for each other in every small tensor.
THREADS = int(os.environ.get("LLAMASTATE_TEST_THREADS", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # an expected abort in a child process must not start a debugger


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave the tests of devices out where llama.cpp knows none."""
    if collection_path.name != "test_devices.py":
        return None
    from tests import devices  # loads llama.cpp

    return None if devices.gpus() else True


@pytest.fixture(scope="session")
def n_threads() -> int:
    """Threads that a test may compute with."""
    return THREADS


@pytest.fixture(scope="session")
def tiny_path() -> Callable[..., Path]:
    """``tiny_path("iswa", seed=1)``: the file of a tiny model, in a cache that all test processes share."""
    return tiny.path


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return models.smollm2()


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    return models.gemma3()
