"""Find the llama.cpp that llamastate is compiled against.

Searched in this order:

1. ``LLAMASTATE_LLAMA_CPP=/prefix``, an install of llama.cpp with ``include/`` and ``lib/`` (or ``lib64/``);
2. the ``llama-cpp-python`` package of the running interpreter, which installs the headers and libraries that it
   compiled.

Only the standard library is used and nothing of llama.cpp is loaded into this process: ``setup.py`` runs this file
before anything else exists, and a library that crashes when loaded must end in a message, not in a dead build.

``python llama.cpp/locate.py`` prints what was found as JSON.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

PINNED = "0.3.36"
"""The release of llama-cpp-python that this source is written for; pyproject.toml pins the same."""

PACKAGE = "llama-cpp-python"
ENVIRONMENT = "LLAMASTATE_LLAMA_CPP"

# Everything that decides the layout of a struct or the value of an enum that we pass to C is in these two.
HEADERS = ("llama.h", "ggml.h")
LIBRARIES = ("llama", "ggml", "ggml-base")
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"

# Run by another interpreter. ggml goes first, by full path, so that LD_LIBRARY_PATH cannot put another one beneath the
# libllama that is being asked.
_PROBE = """
import ctypes, json, sys
*dependencies, library = [ctypes.CDLL(path) for path in sys.argv[1:]]
def ask(name):
    try:
        function = getattr(library, name)
    except AttributeError:
        return None
    function.restype, function.argtypes = ctypes.c_char_p, ()
    return function().decode()
print(json.dumps({name: ask(name) for name in ("llama_version", "ggml_version", "ggml_commit")}))
"""


class LocateError(Exception):
    """No usable llama.cpp. The text says what is missing, where it was looked for, and the command that mends it."""


class HeadersNotFound(LocateError):
    """No headers, or headers that are not those of the library."""


class LibraryNotFound(LocateError):
    """No shared library, or one that cannot be loaded."""


@dataclasses.dataclass(frozen=True)
class LlamaCpp:
    """One llama.cpp to compile and link with.

    Attributes
    ----------
    provider : str
        ``"prefix"`` or ``"llama-cpp-python"``.
    provider_version : str or None
        Version of the package; ``None`` for a prefix.
    prefix : str or None
        What ``LLAMASTATE_LLAMA_CPP`` said; ``None`` for the package, which may be installed elsewhere at run time.
    include_dir, library_dir : str
        For ``-I`` and ``-L``.
    libraries : tuple of str
        For ``-l``, in link order.
    soname : str
        The name under which the dynamic linker knows libllama.
    llama_version, ggml_version, ggml_commit : str or None
        As the library itself answers; ``None`` if it is too old to know the question.
    header_sha256 : str
        Hash over the headers that define the binary interface.
    """

    provider: str
    provider_version: str | None
    prefix: str | None
    include_dir: str
    library_dir: str
    libraries: tuple[str, ...]
    soname: str
    llama_version: str | None
    ggml_version: str | None
    ggml_commit: str | None
    header_sha256: str


def locate(environ: Mapping[str, str] = os.environ) -> LlamaCpp:
    """Find headers and libraries, and ask the library for its version.

    Raises
    ------
    HeadersNotFound, LibraryNotFound
        With the command that mends it in the text.
    """
    prefix = environ.get(ENVIRONMENT)
    if prefix:
        return _from_prefix(Path(prefix).expanduser().absolute())
    spec = importlib.util.find_spec("llama_cpp")  # finds, does not import: importing would load the library
    if spec is None or spec.origin is None:
        raise HeadersNotFound(
            f"llama.cpp was not found: the package {PACKAGE} is not installed for {sys.executable}, and "
            f"{ENVIRONMENT} is not set. Run: pip install '{PACKAGE}=={PINNED}' (it compiles llama.cpp, about 4 minutes "
            f"on two cores), or set {ENVIRONMENT}=/prefix to an install of your own."
        )
    return _from_package(Path(spec.origin).parent)


def header_sha256(include_dir: Path) -> str:
    """Return one hash over ``llama.h`` and ``ggml.h`` of a folder."""
    digest = hashlib.sha256()
    for name in HEADERS:
        digest.update((include_dir / name).read_bytes())
    return digest.hexdigest()


def _from_prefix(prefix: Path) -> LlamaCpp:
    remedy = (
        f"{ENVIRONMENT} must name a folder with include/llama.h and lib/libllama{SUFFIX}, as "
        "`cmake --install build --prefix PREFIX` makes it when llama.cpp was configured with -DBUILD_SHARED_LIBS=ON."
    )
    include = prefix / "include"
    _require_headers(include, remedy)
    folders = [prefix / name for name in ("lib", "lib64")]
    library_dir = next((folder for folder in folders if _library(folder, "llama").exists()), folders[0])
    return _describe("prefix", None, str(prefix), include, library_dir, remedy)


def _from_package(package: Path) -> LlamaCpp:
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        distribution = None
    version = distribution.version if distribution else None
    remedy = f"Run: pip install --force-reinstall --no-deps '{PACKAGE}=={version or PINNED}'"
    include = package.parent / "include"  # its wheel puts them at the top of site-packages
    _require_headers(include, remedy)
    if distribution:
        _require_unchanged(distribution, include, remedy)
    return _describe(PACKAGE, version, None, include, package / "lib", remedy)


def _require_headers(include: Path, remedy: str) -> None:
    for name in HEADERS:
        if not (include / name).is_file():
            raise HeadersNotFound(f"The llama.cpp headers were not found: there is no {include / name}. {remedy}")


def _require_unchanged(distribution: importlib.metadata.Distribution, include: Path, remedy: str) -> None:
    """Other packages that vendor ggml install into the same ``include`` folder, and the last one wins.

    Compiling against their ``ggml.h`` would give wrong struct layouts without a word.
    """
    recorded = {Path(str(distribution.locate_file(file))): file.hash for file in distribution.files or ()}
    for name in HEADERS:
        expected = recorded.get(include / name)
        if expected is None or expected.mode != "sha256":
            continue
        digest = hashlib.sha256((include / name).read_bytes()).digest()
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != expected.value:
            raise HeadersNotFound(
                f"{include / name} is not the file that {PACKAGE} {distribution.version} installed; another package "
                f"has overwritten it. {remedy}"
            )


def _library(folder: Path, name: str) -> Path:
    return folder / f"lib{name}{SUFFIX}"


def _soname(folder: Path) -> str:
    """Return the name with the ABI number, ``libllama.so.0`` or ``libllama.0.dylib``, if there is one."""
    pattern = re.compile(r"libllama\.\d+\.dylib" if SUFFIX == ".dylib" else r"libllama\.so\.\d+")
    return next((path.name for path in sorted(folder.iterdir()) if pattern.fullmatch(path.name)), f"libllama{SUFFIX}")


def _describe(
    provider: str, version: str | None, prefix: str | None, include: Path, folder: Path, remedy: str
) -> LlamaCpp:
    if not _library(folder, "llama").is_file():
        raise LibraryNotFound(f"The llama.cpp library was not found: no {_library(folder, 'llama')}. {remedy}")
    # A prefix may have all of ggml inside libllama; link what is there.
    libraries = tuple(name for name in LIBRARIES if _library(folder, name).is_file())
    versions = _ask([_library(folder, name) for name in reversed(libraries)], remedy)
    return LlamaCpp(
        provider=provider,
        provider_version=version,
        prefix=prefix,
        include_dir=str(include),
        library_dir=str(folder),
        libraries=libraries,
        soname=_soname(folder),
        header_sha256=header_sha256(include),
        **versions,
    )


def _ask(paths: list[Path], remedy: str) -> dict[str, str | None]:
    command = [sys.executable, "-c", _PROBE, *map(str, paths)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return json.loads(answer.stdout)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"exit status {error.returncode}"])[-1]
        raise LibraryNotFound(f"{paths[-1]} cannot be loaded: {last}. {remedy}") from None
    except (subprocess.TimeoutExpired, OSError, ValueError) as error:
        raise LibraryNotFound(f"{paths[-1]} cannot be asked for its version: {error}. {remedy}") from None


if __name__ == "__main__":
    try:
        print(json.dumps(dataclasses.asdict(locate()), indent=2))
    except LocateError as error:
        sys.exit(str(error))
