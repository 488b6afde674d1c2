"""Compilers that break AMX are recognised, at build time and in a library."""

from __future__ import annotations

import platform
import runpy
import shutil
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
    left_out = "-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8"
    mended = f"-DCMAKE_CXX_FLAGS=--include={SCRIPT.with_name('amx.h')}"
    for minor, words, expected in ((2, [], left_out), (2, ["--mend"], mended), (4, [], ""), (4, ["--mend"], "")):
        compiler = tmp_path / f"cc{minor}"
        macros = f"#define __AMX_INT8__ 1\n#define __GNUC__ 12\n#define __GNUC_MINOR__ {minor}\n"
        compiler.write_text(f"#!/bin/sh\ncat <<'EOF'\n{macros}EOF\n")
        compiler.chmod(0o755)
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *words],
            env={"CC": str(compiler), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected


def test_no_compiler_is_not_our_problem() -> None:
    assert runpy.run_path(str(SCRIPT))["cmake_args"]("/nonexistent/cc") == ""


def test_mended(tmp_path: Path) -> None:
    """Every byte of a configuration is there when it is loaded, whatever the compiler thinks of its own header."""
    compiler = shutil.which("c++") or shutil.which("g++")
    flags = ["-O3", "-mamx-tile", "-mamx-int8", "-shared", "-fPIC", f"--include={SCRIPT.with_name('amx.h')}"]
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs a C++ compiler for x86-64")
    source = tmp_path / "f.cpp"
    source.write_text(
        "struct Config { unsigned char palette, start, none[14]; unsigned short bytes[16]; unsigned char rows[16]; };\n"
        "void load() { Config config = {}; config.palette = 1; config.bytes[7] = 0x1234; config.rows[7] = 0x56;\n"
        "_tile_loadconfig(&config); }\n"
    )
    done = subprocess.run([compiler, *flags, source, "-S", "-o", "-"], capture_output=True, text=True, check=False)
    if "amx" in done.stderr and done.returncode:
        pytest.skip("the compiler knows no AMX")
    assert done.returncode == 0, done.stderr
    before, _, _ = done.stdout.partition("ldtilecfg")
    assert str(0x1234) in before
    assert str(0x56) in before
    library = tmp_path / "libggml-cpu.so"
    subprocess.run([compiler, *flags, source, "-o", library], check=True)
    library.write_bytes(library.read_bytes() + b"ggml_backend_amx_mul_mat GCC: (Debian 12.2.0-14) 12.2.0\0")
    assert not _amx.is_miscompiled(tmp_path)


def test_library_of_a_broken_compiler(tmp_path: Path) -> None:
    """Such a library, on a processor with AMX, is used without the kernels in question."""
    amx = b"amx_int8" in Path("/proc/cpuinfo").read_bytes()
    for name, comment, broken in (("a", b"GCC: (Debian 12.2.0-14) 12.2.0", amx), ("b", b"GCC: (GNU) 14.2.1", False)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "libggml-cpu.so").write_bytes(b"\x7fELF ... ggml_backend_amx_mul_mat ..." + comment + b"\0")
        assert _amx.is_miscompiled(folder) is broken
    assert not _amx.is_miscompiled(tmp_path / "missing")
