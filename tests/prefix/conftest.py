"""A store's folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llamastate.prefix.disk import DiskTier


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[DiskTier]:
    with_files = DiskTier(tmp_path / "store")
    yield with_files
    with_files.close()
