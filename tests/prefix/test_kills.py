"""``kill -9`` of one of four processes that put, get and evict: a hundred times."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from llamastate.prefix.disk import DiskTier
from tests import children
from tests.prefix import kills


@pytest.mark.parametrize("run", range(4))
def test_killed_at_any_moment(run: int, tmp_path: Path):
    """Fixed seeds, but where it hits is chance. The processes compare whatever they load with what was put."""
    code = "import sys; from tests.prefix import kills; kills.main(sys.argv[1], 25, int(sys.argv[2]))"
    result = children.run(code, tmp_path, run)
    assert (result.returncode, result.stdout) == (0, "killed 25\n"), result.stderr
    assert not result.stderr

    entries = kills.catalogue()
    tier = DiskTier(tmp_path, disk_bytes=kills.limit(entries))
    assert tier.stats().entries > 10
    assert tier.stats().rebuilt == 0  # whatever was left of the index was sound
    for entry in entries:
        found = tier.get(entry.key)
        if found is not None:
            np.testing.assert_array_equal(found.image, entry.image)
    assert tier.stats().damaged == 0
    tier.gc()
    again = tier.gc()
    assert (again.adopted, again.lost, again.damaged, again.temporary, again.nbytes) == (0, 0, 0, 0, 0)

    # The space that is taken is what the index says, and every byte of it is sound.
    on_disk = {p.stem: p.stat().st_size for p in Path(tier.path, "blocks").rglob("*") if p.is_file()}
    assert on_disk == {row.key.hex(): row.nbytes for row in tier.entries()}
    assert tier.stats().bytes == sum(on_disk.values())
    assert tier.verify() == []
    for entry in entries:
        tier._index.remove([entry.key]) if entry.key in tier.known([entry.key]) else None
    assert tier.stats().bytes == tier.stats().anchor_bytes == tier.stats().pinned_bytes == 0
    tier.close()
    with sqlite3.connect(os.path.join(tmp_path, "index.sqlite")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


REBUILDER = """
import sys
from llamastate.prefix.disk import DiskTier
tier = DiskTier(sys.argv[1])
while True:
    print("x", flush=True)
    tier.rebuild()
"""


def test_killed_while_the_index_is_made_anew(tmp_path: Path):
    entries = kills.catalogue()
    tier = DiskTier(tmp_path)
    for entry in entries:
        tier.put(entry)
    tier.close()
    for i in range(5):
        with children.start(REBUILDER, tmp_path) as process:
            for _ in range(i + 1):
                assert process.stdout.readline() == "x\n"
            process.kill()
        tier = DiskTier(tmp_path)
        assert tier.known([e.key for e in entries]) == {e.key for e in entries}
        tier.close()
