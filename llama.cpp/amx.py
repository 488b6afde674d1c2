"""Finds the compilers that break llama.cpp's AMX code, and libraries that they have broken.

GCC told its optimiser that ``_tile_loadconfig`` reads 8 bytes where it reads 64 (PR target/114098, mended in 11.5,
12.4, 13.3 and 14). llama.cpp's AMX kernels fill in all 64 and load them; GCC drops the stores that it thinks nobody
reads, and the process dies at the first prompt of a quantised model, on processors that have AMX.

``python llama.cpp/amx.py`` prints the CMake arguments with which this machine's compiler leaves AMX out, or nothing;
with ``--mend`` those with which it gets AMX right (``amx.h``), which makes batches and prompts about twice as fast.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

FLAG = "-mno-amx-int8"
CMAKE_ARGS = f"-DCMAKE_C_FLAGS={FLAG} -DCMAKE_CXX_FLAGS={FLAG}"

HEADER = Path(__file__).resolve().parent / "amx.h"

_MACRO = re.compile(r"#define (\w+) (.*)")


def is_broken(major: int, minor: int) -> bool:
    """Whether GCC ``major.minor`` has the defect: the package itself knows, for it looks at libraries at run time."""
    path = Path(__file__).resolve().parent.parent / "llamastate" / "_native" / "_amx.py"
    return bool(runpy.run_path(str(path))["is_broken"](major, minor))


def cmake_args(compiler: str, *, mend: bool = False) -> str:
    """CMake arguments for a library which ``compiler`` would break: without AMX, or with it mended.

    Empty if none are needed.
    """
    command = [compiler, "-march=native", "-dM", "-E", "-x", "c", os.devnull]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""  # whatever is wrong with the compiler, the build says it better
    macros = dict(_MACRO.findall(text))
    if "__AMX_INT8__" not in macros or "__clang__" in macros:
        return ""
    if not is_broken(int(macros["__GNUC__"]), int(macros["__GNUC_MINOR__"])):
        return ""
    return f"-DCMAKE_CXX_FLAGS=--include={HEADER}" if mend and " " not in str(HEADER) else CMAKE_ARGS


if __name__ == "__main__":
    found = cmake_args(os.environ.get("CC") or "cc", mend="--mend" in sys.argv[1:])
    sys.stdout.write(" ".join(filter(None, [os.environ.get("CMAKE_ARGS", ""), found])) + "\n")
