"""Finds the compilers that break llama.cpp's AMX code, and libraries that they have broken.

GCC told its optimiser that ``_tile_loadconfig`` reads 8 bytes where it reads 64 (PR target/114098, mended in 11.5,
12.4, 13.3 and 14). llama.cpp's AMX kernels fill in all 64 and load them; GCC drops the stores that it thinks nobody
reads, and the process dies at the first prompt of a quantised model, on processors that have AMX.

``python llama.cpp/amx.py`` prints the CMake arguments with which this machine's compiler leaves AMX out, or nothing.
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

_MACRO = re.compile(r"#define (\w+) (.*)")


def is_broken(major: int, minor: int) -> bool:
    """Whether GCC ``major.minor`` has the defect: the package itself knows, for it looks at libraries at run time."""
    path = Path(__file__).resolve().parent.parent / "llamastate" / "_native" / "_amx.py"
    return bool(runpy.run_path(str(path))["is_broken"](major, minor))


def cmake_args(compiler: str) -> str:
    """CMake arguments that keep AMX out of a library which ``compiler`` would break; empty if none are needed."""
    command = [compiler, "-march=native", "-dM", "-E", "-x", "c", os.devnull]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""  # whatever is wrong with the compiler, the build says it better
    macros = dict(_MACRO.findall(text))
    if "__AMX_INT8__" not in macros or "__clang__" in macros:
        return ""
    return CMAKE_ARGS if is_broken(int(macros["__GNUC__"]), int(macros["__GNUC_MINOR__"])) else ""


if __name__ == "__main__":
    arguments = [os.environ.get("CMAKE_ARGS", ""), cmake_args(os.environ.get("CC") or "cc")]
    sys.stdout.write(" ".join(filter(None, arguments)) + "\n")
