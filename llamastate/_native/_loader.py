"""Loads llama.cpp before the extension modules, and refuses one that they were not compiled against.

The extensions name ``libllama`` by its soname only. Which file that becomes is decided by whoever opens it first, so
:func:`load` opens the right one by its full path before any extension is imported; the dynamic linker then resolves the
soname to that file. The same file serves ``llama_cpp``, and that is what lets a context made by ``llama_cpp.Llama`` be
used here: two copies of the library would each have their own allocator, backends and globals.

A binary interface has no types left to complain about: with another release, fields of parameter structs have moved,
and the result is a wrong value or a crash, never a message. So the versions are compared here, once.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import NativeVersionError

__all__ = ["BuildInfo", "find", "load"]

ENVIRONMENT = "LLAMASTATE_LLAMA_CPP"
LLAMA_CPP_ENVIRONMENT = "LLAMA_CPP_LIB_PATH"  # read by llama_cpp itself
PACKAGE = "llama-cpp-python"
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"

# llama_cpp opens the name without a number, and wheels hold copies where an install has links: another name would be
# another file, and a second library in the process.
_NAMES = ("libllama.so", "libllama.dylib") if sys.platform == "darwin" else ("libllama.so",)
# In the order of their dependencies. A GPU backend is found by libggml itself, beside it.
_FOUNDATIONS = ("ggml-base", "ggml-cpu", "ggml")


@dataclasses.dataclass(frozen=True)
class BuildInfo:
    """What the extensions were compiled against, as setup.py recorded it."""

    provider: str
    provider_version: str | None
    prefix: str | None
    soname: str
    llama_version: str | None
    ggml_version: str | None
    ggml_commit: str | None
    header_sha256: str

    @classmethod
    def from_module(cls, module: ModuleType) -> BuildInfo:
        """Read the record out of the generated module ``_build_info``."""
        return cls(**{field.name: getattr(module, field.name.upper()) for field in dataclasses.fields(cls)})

    def __str__(self) -> str:
        return _describe(self.llama_version, self.ggml_version, self.ggml_commit)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """The library to load and why it is this one.

    ``variable`` is the part of the environment that named it; ``loaded`` says that this process has it open already.
    """

    path: Path
    reason: str
    variable: str | None = None
    loaded: bool = False


def load() -> Path:
    """Load llama.cpp into this process and return the library's path.

    Raises
    ------
    NativeVersionError
        If the extensions were never built, no library is found, or it is not the one they were compiled against.
        ``command`` mends it.

    Notes
    -----
    Beyond ``dlopen`` this takes a fraction of a millisecond. What was loaded stays loaded if the check fails; nothing
    of it has been called except its version functions.
    """
    try:
        from . import _build_info  # type: ignore[attr-defined,unused-ignore]
    except ImportError:
        command = rebuild_command()
        raise NativeVersionError(
            f"The extension modules of llamastate have not been built. Run: {command}", command=command
        ) from None
    build = BuildInfo.from_module(_build_info)
    candidate = find(build, os.environ, already_loaded(build.soname), installed_folder())
    library = open_library(candidate, build)
    check(build, candidate, *ask(library), header=header_beside(candidate.path))
    return candidate.path


def find(
    build: BuildInfo, environ: Mapping[str, str], loaded: Path | None = None, installed: Path | None = None
) -> Candidate:
    """Choose the library: the one in this process, else the one named by the environment, else the one installed.

    Parameters
    ----------
    build : BuildInfo
        Says where the extensions were built: with a prefix, or with the package.
    environ : mapping
        ``LLAMASTATE_LLAMA_CPP`` names a prefix, ``LLAMA_CPP_LIB_PATH`` a folder of libraries.
    loaded : Path, optional
        A libllama that this process has open already. There can be no other then.
    installed : Path, optional
        The folder of libraries of the llama_cpp package.

    Raises
    ------
    NativeVersionError
        If none exists. A place named by the environment is binding: when it holds no library, nothing else is tried.
    """
    if loaded is not None:
        return Candidate(loaded, "this process had loaded it before llamastate", loaded=True)
    if prefix := environ.get(ENVIRONMENT):
        return _first(_prefix_folders(prefix), build, ENVIRONMENT)
    if folder := environ.get(LLAMA_CPP_ENVIRONMENT):
        return _first([Path(folder)], build, LLAMA_CPP_ENVIRONMENT)
    if build.prefix:
        return _first(_prefix_folders(build.prefix), build)
    return _first([installed] if installed else [], build)


def check(
    build: BuildInfo,
    candidate: Candidate,
    llama_version: str | None,
    ggml_version: str | None,
    ggml_commit: str | None,
    *,
    header: str | None = None,
) -> None:
    """Compare a library's answers with the record of the build.

    The commit decides where both sides know it. A library built outside of a git checkout does not; then the versions
    decide together with ``header``, the hash of the headers beside the library, if there are any.

    Raises
    ------
    NativeVersionError
        If they differ.
    """
    same = (llama_version, ggml_version) == (build.llama_version, build.ggml_version)
    expected_commit, found_commit = _commit(build.ggml_commit), _commit(ggml_commit)
    if expected_commit and found_commit:
        # git abbreviates to as many digits as the checkout needed.
        length = min(len(expected_commit), len(found_commit))
        same = same and expected_commit[:length] == found_commit[:length]
    elif header is not None:
        same = same and header == build.header_sha256
    if same:
        return
    found = _describe(llama_version, ggml_version, ggml_commit)
    if found == str(build):
        found += ", other headers"
    command = mending_command(build, candidate)
    raise NativeVersionError(
        f"llamastate was built against {build}, but {candidate.path} is {found} ({candidate.reason}). Run: {command}",
        expected=str(build),
        found=found,
        library=str(candidate.path),
        command=command,
    )


def mending_command(build: BuildInfo, candidate: Candidate) -> str:
    """Return the command after which library and extensions agree."""
    if candidate.variable == ENVIRONMENT:
        # Somebody wants that library: compile against it.
        return f"{rebuild_command()}    # with {ENVIRONMENT} set as it is now"
    if candidate.variable:
        return f"unset {candidate.variable}"
    if candidate.loaded and candidate.path.parent != installed_folder():
        return f"python -c 'import llamastate'    # first: before the package that loads {candidate.path}"
    if build.prefix:
        return f"{ENVIRONMENT}={shlex.quote(build.prefix)} {rebuild_command()}"
    return reinstall_command(build)


def reinstall_command(build: BuildInfo) -> str:
    """Return the pip command that installs the llama-cpp-python that the extensions were compiled against."""
    requirement = f"{PACKAGE}=={build.provider_version}"
    if installed_version() == build.provider_version:
        return f"pip install --force-reinstall --no-deps --no-cache-dir '{requirement}'"
    return f"pip install '{requirement}'"


def rebuild_command() -> str:
    """Return the pip command that compiles llamastate again, from its checkout if this is one."""
    root = Path(__file__).resolve().parents[2]
    if (root / "setup.py").is_file():
        return f"pip install --no-deps --no-build-isolation -e {shlex.quote(str(root))}"
    return "pip install --force-reinstall --no-deps --no-cache-dir llamastate"


def already_loaded(soname: str) -> Path | None:
    """Return the file behind ``soname`` in this process; ``None`` if there is none yet."""
    try:
        library = ctypes.CDLL(soname, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return None
    return _path_of(library)


def installed_folder() -> Path | None:
    """Return where the llama_cpp package keeps its libraries, without importing it."""
    spec = importlib.util.find_spec("llama_cpp")
    return Path(spec.origin).parent / "lib" if spec and spec.origin else None


def installed_version() -> str | None:
    """Return the version of llama-cpp-python that is installed."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def open_library(candidate: Candidate, build: BuildInfo) -> ctypes.CDLL:
    """Open libllama and what it rests on.

    The foundations go first and by full path: LD_LIBRARY_PATH would otherwise outrank the folder that libllama lies in,
    and mix two builds of ggml. A libllama that is open has its own already, perhaps under another of their file names.
    """
    foundations = () if candidate.loaded else _FOUNDATIONS
    try:
        for name in foundations:
            path = candidate.path.parent / f"lib{name}{SUFFIX}"
            if path.exists():
                ctypes.CDLL(str(path))
        return ctypes.CDLL(str(candidate.path))
    except OSError as error:
        command = mending_command(build, candidate)
        raise NativeVersionError(
            f"{candidate.path} cannot be loaded: {error}. Run: {command}",
            expected=str(build),
            library=str(candidate.path),
            command=command,
        ) from error


def ask(library: ctypes.CDLL) -> tuple[str | None, str | None, str | None]:
    """Return ``llama_version()``, ``ggml_version()`` and ``ggml_commit()``, ``None`` for those it does not have.

    All three are looked up through libllama, so the answers are those of the ggml that it is bound to.
    """

    def call(name: str) -> str | None:
        function: Any = getattr(library, name, None)
        if function is None:
            return None
        function.restype, function.argtypes = ctypes.c_char_p, ()
        return str(function().decode())

    return call("llama_version"), call("ggml_version"), call("ggml_commit")


def header_beside(library: Path) -> str | None:
    """Return the hash of the headers that were installed together with a library, made as ``locate.py`` makes it."""
    for include in (library.parent.parent / "include", library.parent.parent.parent / "include"):
        try:
            contents = [(include / name).read_bytes() for name in ("llama.h", "ggml.h")]
        except OSError:
            continue
        return hashlib.sha256(b"".join(contents)).hexdigest()
    return None


def _path_of(library: ctypes.CDLL) -> Path | None:
    address = ctypes.cast(library.llama_backend_init, ctypes.c_void_p)
    info = (ctypes.c_void_p * 4)()  # struct Dl_info, of which the first member is the file's name
    if not ctypes.CDLL(None).dladdr(address, info) or info[0] is None:
        return None
    return Path(os.fsdecode(ctypes.string_at(info[0])))


def _prefix_folders(prefix: str) -> list[Path]:
    root = Path(prefix).expanduser().absolute()
    return [root / "lib", root / "lib64"]


def _first(folders: list[Path], build: BuildInfo, variable: str | None = None) -> Candidate:
    reason = f"{variable} names it" if variable else f"llamastate was built with {build.prefix or PACKAGE}"
    for folder in folders:
        for name in _NAMES:
            if (folder / name).is_file():
                return Candidate(folder / name, reason, variable)
    missing = Candidate((folders[0] if folders else Path("llama_cpp", "lib")) / _NAMES[0], reason, variable)
    command = f"unset {variable}" if variable else mending_command(build, missing)
    raise NativeVersionError(
        f"There is no llama.cpp library {missing.path} ({reason}). Run: {command}",
        expected=str(build),
        library=str(missing.path),
        command=command,
    )


def _commit(text: str | None) -> str | None:
    commit = (text or "").removesuffix("-dirty")
    return commit if commit and commit != "unknown" else None


def _describe(llama: str | None, ggml: str | None, commit: str | None) -> str:
    return (
        f"llama.cpp {llama or 'of unknown version'} (ggml {ggml or 'of unknown version'}, commit {commit or 'unknown'})"
    )
