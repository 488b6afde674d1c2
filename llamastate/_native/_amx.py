"""Whether the loaded ggml would crash this processor: see ``llama.cpp/amx.py`` in the sources for the defect.

Such a library is sound but for its AMX kernels, and those are only used for weights that were put into an "extra"
buffer type. Models are loaded without those then: prompts take longer, and nothing dies.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

__all__ = ["is_miscompiled"]

_GCC = re.compile(rb"GCC: \([^)]*\) (\d+)\.(\d+)")
_KERNEL = b"ggml_backend_amx_mul_mat"
#: Of ``llama.cpp/amx.h``, with which such a compiler gets them right.
_MENDED = b"llamastate: ldtilecfg reads 64 bytes"


def is_broken(major: int, minor: int) -> bool:
    """Whether GCC ``major.minor`` miscompiles ``_tile_loadconfig`` (PR target/114098)."""
    return (major, minor) < (11, 5) or (major == 12 and minor < 4) or (major == 13 and minor < 3)


@cache
def is_miscompiled(folder: Path) -> bool:
    """Whether the libggml-cpu in ``folder`` has AMX kernels of a broken compiler, and this processor would run them."""
    try:
        if b"amx_int8" not in Path("/proc/cpuinfo").read_bytes():
            return False
        library = (folder / "libggml-cpu.so").read_bytes()
    except OSError:
        return False
    if _MENDED in library:
        return False
    compilers = _GCC.findall(library)
    return _KERNEL in library and any(is_broken(int(major), int(minor)) for major, minor in compilers)
