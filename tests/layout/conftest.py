"""Contexts of the tiny models, kept for the session: making one takes longer than most tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.layout.native import Native


@pytest.fixture(scope="session")
def _contexts() -> Iterator[dict[tuple[Any, ...], Native]]:
    made: dict[tuple[Any, ...], Native] = {}
    yield made
    for context in made.values():
        context.close()


@pytest.fixture
def native(_contexts: dict[tuple[Any, ...], Native]) -> Callable[..., Native]:
    """``native("iswa", flash=False)``: an empty context with these settings, the same each time."""

    def get(name: str, **settings: Any) -> Native:
        key = (name, *sorted(settings.items()))
        if key not in _contexts:
            _contexts[key] = Native(name, **settings)
        _contexts[key].clear()
        return _contexts[key]

    return get
