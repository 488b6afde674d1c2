"""Disks that are full or broken, call by call: a library that is loaded before all others lets them fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.children import ROOT

COMPILER = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")

#: Whatever fails, the file is the old one, unless the last fsync was that of the folder: then the new one is in place.
CODE = """
import ctypes, errno, os, sys
from llamastate import FileAccessError, SaveError, Session, SessionManager, Snapshot
from tests.helpers import context, tokens

shim = ctypes.CDLL(None)
folder = sys.argv[1]
manager = SessionManager(folder)
ctx = context("jamba", n_ctx=1024, n_seq_max=3)
session = manager.create("chat", ctx, system_prompt=tokens(40), checkpoint_every=16)
path = manager.path("chat")
old = open(path, "rb").read()
session.feed(tokens(60, 1))
session.checkpoint("here")
session.save(folder + "/new")
new = open(folder + "/new", "rb").read()
os.unlink(folder + "/new")

operations = {
    "Session.save": lambda: session.save(path),
    "save": lambda: manager.save("chat", session),
    "export": lambda: session.export_file(path),
    "create": lambda: manager.create("other", ctx, seq_id=1, system_prompt=tokens(20)),
}
tried = 0
for name, operation in operations.items():
    for call in ("write", "fsync", "rename"):
        for code in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            for nth in (1, 2):
                shim.fault_arm(call.encode(), code, nth)
                try:
                    operation()
                except SaveError as error:
                    failed = error
                else:
                    failed = None
                hits = shim.fault_disarm()
                where = (name, call, errno.errorcode[code], nth, hits)
                if hits < nth:
                    assert failed is None, where
                else:
                    tried += 1
                    assert failed is not None, where
                    assert os.strerror(code) in str(failed), (where, failed)
                    assert failed.path, where
                found = open(path, "rb").read()
                assert session.n_past == 100, where
                if name != "create" and hits >= nth and (call, nth) != ("fsync", 2):
                    assert found == old, where
                assert ctx.seq_pos_max(1) == -1 or (name == "create" and failed is None), where
                with open(path, "wb") as file:
                    file.write(old)
                if name == "create":
                    ctx.seq_rm(1)
                    if "other" in manager:
                        manager.delete("other")
                manager.close()
                names = [n for n in os.listdir(folder) if n != "chat.llsnap" and not n.endswith(".lock")]
                assert not names, (where, names)

# reading: a file that is mapped cannot be asked, but one that is read can, and so can the model's
shim.fault_arm(b"read", errno.EIO, 1)
try:
    Snapshot.open(path, mmap=False)
except FileAccessError as error:
    assert "Input/output error" in str(error), error
else:
    raise AssertionError("nothing noticed")
finally:
    shim.fault_disarm()
del session
SessionManager(folder)
assert sorted(os.listdir(folder)) == ["chat.llsnap"], os.listdir(folder)
print(tried)
"""


@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C compiler and LD_PRELOAD")
def test_calls_that_fail(tmp_path: Path) -> None:
    """EIO, ENOSPC and EDQUOT from every call that a save needs: typed, the old file untouched, no litter."""
    library = tmp_path / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run([*COMPILER.split(), "-shared", "-fPIC", "-O1", str(source), "-o", str(library), "-ldl"], check=True)
    preload = " ".join(filter(None, (os.environ.get("LD_PRELOAD"), str(library))))
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "sessions")],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": preload},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 40
