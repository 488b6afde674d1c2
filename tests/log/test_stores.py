"""Both stores are stores, and a store that is none is found out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from llamastate.log import LogStore, MemoryLogStore, SQLiteLogStore, StoredEntry, conformance


@pytest.fixture(params=["memory", "sqlite", "sqlite-full"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> LogStore:
    if request.param == "memory":
        return MemoryLogStore()
    return SQLiteLogStore(tmp_path / "log.db", sync="full" if request.param == "sqlite-full" else "normal")


@pytest.mark.parametrize("case", conformance.CASES, ids=lambda case: case.__name__)
def test_conforms(store: LogStore, case) -> None:
    case(store)
    store.close()


class CheckThenWrite(MemoryLogStore):
    """A store that does not compare."""

    def append(self, session_id: str, entries: Sequence[StoredEntry]) -> None:
        self._log(session_id).extend(entries)


class Forgetful(MemoryLogStore):
    """A store that loses the first of several."""

    def append(self, session_id: str, entries: Sequence[StoredEntry]) -> None:
        super().append(session_id, entries[:1])


@pytest.mark.parametrize("bad", [CheckThenWrite, Forgetful])
def test_a_store_that_is_none_does_not_conform(bad: type[MemoryLogStore]) -> None:
    with pytest.raises(AssertionError):
        conformance.check(bad)


def test_check_runs_everything() -> None:
    conformance.check(MemoryLogStore)
