"""Compilers that break AMX are recognised, at build time and in a library."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from llamastate._native import _amx

SCRIPT = Path(__file__).resolve().parent.parent / "llama.cpp" / "amx.py"


@pytest.mark.parametrize(
    ("version", "broken"),
    [
        ((11, 4), True),
        ((11, 5), False),
        ((12, 2), True),
        ((12, 3), True),
        ((12, 4), False),
        ((13, 2), True),
        ((13, 3), False),
        ((14, 0), False),
    ],
)
def test_versions(version: tuple[int, int], broken: bool) -> None:
    assert _amx.is_broken(*version) is broken


def test_script_prints_what_cmake_needs(tmp_path: Path) -> None:
    """With a compiler that claims to be a broken one for this purpose, and with one that does not."""
    for minor, expected in ((2, "-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8"), (4, "")):
        compiler = tmp_path / f"cc{minor}"
        macros = f"#define __AMX_INT8__ 1\n#define __GNUC__ 12\n#define __GNUC_MINOR__ {minor}\n"
        compiler.write_text(f"#!/bin/sh\ncat <<'EOF'\n{macros}EOF\n")
        compiler.chmod(0o755)
        done = subprocess.run(
            [sys.executable, str(SCRIPT)],
            env={"CC": str(compiler), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected


def test_no_compiler_is_not_our_problem() -> None:
    assert runpy.run_path(str(SCRIPT))["cmake_args"]("/nonexistent/cc") == ""


def test_library_of_a_broken_compiler(tmp_path: Path) -> None:
    """Such a library, on a processor with AMX, is used without the kernels in question."""
    amx = b"amx_int8" in Path("/proc/cpuinfo").read_bytes()
    for name, comment, broken in (("a", b"GCC: (Debian 12.2.0-14) 12.2.0", amx), ("b", b"GCC: (GNU) 14.2.1", False)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "libggml-cpu.so").write_bytes(b"\x7fELF ... ggml_backend_amx_mul_mat ..." + comment + b"\0")
        assert _amx.is_miscompiled(folder) is broken
    assert not _amx.is_miscompiled(tmp_path / "missing")
