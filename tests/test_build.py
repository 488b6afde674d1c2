"""Finding llama.cpp, compiling against it, and refusing another one at import."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from llamastate._native import _loader
from llamastate.errors import NativeVersionError

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "libllama.dylib" if sys.platform == "darwin" else "libllama.so"


def import_by_path(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


locate = import_by_path("llamastate_locate", ROOT / "llama.cpp" / "locate.py")


def run(*command: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)


def assert_one_paragraph(text: str, *facts: str) -> None:
    assert "Traceback" not in text
    for fact in facts:
        assert fact in text


# --- locate ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    return locate.locate({})


@pytest.fixture
def prefix(tmp_path, found) -> Path:
    """An install of one's own, made of links to the package's files."""
    root = tmp_path / "prefix"
    root.mkdir()
    (root / "include").symlink_to(found.include_dir)
    (root / "lib64").symlink_to(found.library_dir)
    return root


def test_package_is_found_with_its_versions(found):
    assert found.provider == "llama-cpp-python"
    assert found.provider_version == importlib.metadata.version("llama-cpp-python")
    assert Path(found.include_dir, "llama.h").is_file()
    assert Path(found.library_dir, LIBRARY).is_file()
    assert found.libraries[0] == "llama"
    assert found.llama_version
    assert found.ggml_version
    assert len(found.header_sha256) == 64


def test_prefix_goes_before_the_package(prefix, found):
    own = locate.locate({"LLAMASTATE_LLAMA_CPP": str(prefix)})
    assert (own.provider, own.provider_version, own.prefix) == ("prefix", None, str(prefix))
    assert own.library_dir == str(prefix / "lib64")
    assert (own.llama_version, own.header_sha256) == (found.llama_version, found.header_sha256)


def test_script_prints_what_it_found(prefix):
    result = run(sys.executable, ROOT / "llama.cpp" / "locate.py", env={"LLAMASTATE_LLAMA_CPP": str(prefix)})
    assert json.loads(result.stdout)["prefix"] == str(prefix)


def test_no_headers(tmp_path):
    with pytest.raises(locate.HeadersNotFound, match=r"include/llama\.h"):
        locate.locate({"LLAMASTATE_LLAMA_CPP": str(tmp_path)})
    result = run(sys.executable, ROOT / "llama.cpp" / "locate.py", env={"LLAMASTATE_LLAMA_CPP": str(tmp_path)})
    assert result.returncode == 1
    assert_one_paragraph(result.stderr, "include/llama.h", "LLAMASTATE_LLAMA_CPP must name")


def test_no_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(locate.HeadersNotFound, match=f"pip install 'llama-cpp-python=={locate.PINNED}'"):
        locate.locate({})


def test_no_library(tmp_path, found):
    (tmp_path / "include").symlink_to(found.include_dir)
    with pytest.raises(locate.LibraryNotFound, match=LIBRARY):
        locate.locate({"LLAMASTATE_LLAMA_CPP": str(tmp_path)})


def test_library_that_cannot_be_loaded(tmp_path, found):
    (tmp_path / "include").symlink_to(found.include_dir)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / LIBRARY).write_bytes(b"not a library")
    with pytest.raises(locate.LibraryNotFound, match="cannot be loaded"):
        locate.locate({"LLAMASTATE_LLAMA_CPP": str(tmp_path)})


def test_headers_overwritten_by_another_package(tmp_path, found):
    shutil.copytree(found.include_dir, tmp_path / "include")
    with (tmp_path / "include" / "ggml.h").open("a") as file:
        file.write("// another ggml\n")

    class Moved(importlib.metadata.PathDistribution):
        """The installed package, as if it lay in ``tmp_path``."""

        def locate_file(self, path):
            return tmp_path / path

    installed = importlib.metadata.distribution("llama-cpp-python")
    moved = Moved(installed._path)
    with pytest.raises(locate.HeadersNotFound, match=r"ggml\.h is not the file that llama-cpp-python .* installed"):
        locate._require_unchanged(moved, tmp_path / "include", "")


def test_pin_is_the_same_everywhere():
    text = (ROOT / "pyproject.toml").read_text()
    assert text.count(f'"llama-cpp-python=={locate.PINNED}"') == 2


# --- loader ---------------------------------------------------------------------------------------------------------

BUILD = _loader.BuildInfo(
    provider="llama-cpp-python",
    provider_version="0.0.1",
    prefix=None,
    soname="libllama.so.0",
    llama_version="1.2.3",
    ggml_version="4.5.6",
    ggml_commit="abcdef0-dirty",
    header_sha256="0" * 64,
)
HERE = _loader.Candidate(Path("/somewhere/lib") / LIBRARY, "a reason")


def folder_with_library(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / LIBRARY).touch()
    return path


def test_order_of_the_search(tmp_path):
    package = folder_with_library(tmp_path / "llama_cpp" / "lib")
    named = folder_with_library(tmp_path / "named")
    folder_with_library(tmp_path / "prefix" / "lib")
    folder_with_library(tmp_path / "built" / "lib64")
    environ = {"LLAMASTATE_LLAMA_CPP": str(tmp_path / "prefix"), "LLAMA_CPP_LIB_PATH": str(named)}
    own = dataclasses.replace(BUILD, prefix=str(tmp_path / "built"))

    loaded = Path("/loaded") / LIBRARY
    assert _loader.find(BUILD, environ, loaded, package).path == loaded
    assert _loader.find(BUILD, environ, None, package).path == tmp_path / "prefix" / "lib" / LIBRARY
    del environ["LLAMASTATE_LLAMA_CPP"]
    assert _loader.find(BUILD, environ, None, package).path == named / LIBRARY
    assert _loader.find(own, {}, None, package).path == tmp_path / "built" / "lib64" / LIBRARY
    assert _loader.find(BUILD, {}, None, package).path == package / LIBRARY


@pytest.mark.parametrize("variable", ["LLAMASTATE_LLAMA_CPP", "LLAMA_CPP_LIB_PATH"])
def test_place_that_was_named_is_binding(tmp_path, variable):
    package = folder_with_library(tmp_path / "llama_cpp" / "lib")
    with pytest.raises(NativeVersionError) as caught:
        _loader.find(BUILD, {variable: str(tmp_path / "empty")}, None, package)
    assert caught.value.command == f"unset {variable}"
    assert str(tmp_path / "empty") in caught.value.library


def test_no_library_installed(monkeypatch):
    monkeypatch.setattr(_loader, "installed_version", lambda: None)
    with pytest.raises(NativeVersionError) as caught:
        _loader.find(BUILD, {}, None, None)
    assert caught.value.command == "pip install 'llama-cpp-python==0.0.1'"


def test_library_that_the_linker_refuses(tmp_path):
    (tmp_path / LIBRARY).write_bytes(b"not a library")
    with pytest.raises(NativeVersionError) as caught:
        _loader.open_library(_loader.Candidate(tmp_path / LIBRARY, "a reason"), BUILD)
    assert caught.value.library == str(tmp_path / LIBRARY)


@pytest.mark.parametrize(
    "versions",
    [
        ("1.2.3", "4.5.6", "abcdef0-dirty"),
        ("1.2.3", "4.5.6", "abcdef0"),
        ("1.2.3", "4.5.6", "abcdef0123"),  # abbreviated less
        ("1.2.3", "4.5.6", "unknown"),  # built outside of git
        ("1.2.3", "4.5.6", None),
    ],
)
def test_same_library(versions):
    _loader.check(BUILD, HERE, *versions)


@pytest.mark.parametrize(
    ("versions", "header"),
    [
        (("1.2.4", "4.5.6", "abcdef0"), None),
        (("1.2.3", "4.5.7", "abcdef0"), None),
        (("1.2.3", "4.5.6", "abcdef1"), None),
        ((None, None, None), None),
        (("1.2.3", "4.5.6", "unknown"), "1" * 64),
    ],
)
def test_other_library(versions, header):
    with pytest.raises(NativeVersionError) as caught:
        _loader.check(BUILD, HERE, *versions, header=header)
    error = caught.value
    assert error.expected == str(BUILD)
    assert error.found != error.expected
    assert error.library == str(HERE.path)
    assert error.command == "pip install 'llama-cpp-python==0.0.1'"
    assert error.command in str(error)


def test_command_for_each_cause(monkeypatch):
    def command(build=BUILD, **candidate) -> str:
        return _loader.mending_command(build, _loader.Candidate(HERE.path, "", **candidate))

    assert "LLAMASTATE_LLAMA_CPP" in command(variable="LLAMASTATE_LLAMA_CPP")
    assert command(variable="LLAMA_CPP_LIB_PATH") == "unset LLAMA_CPP_LIB_PATH"
    assert "import llamastate" in command(loaded=True)
    assert command(dataclasses.replace(BUILD, prefix="/my own")).startswith("LLAMASTATE_LLAMA_CPP='/my own' pip ")
    monkeypatch.setattr(_loader, "installed_version", lambda: BUILD.provider_version)
    assert "--force-reinstall" in command()


def test_never_built(monkeypatch):
    monkeypatch.setitem(sys.modules, "llamastate._native._build_info", None)
    monkeypatch.delattr(sys.modules["llamastate._native"], "_build_info", raising=False)
    with pytest.raises(NativeVersionError, match="have not been built") as caught:
        _loader.load()
    assert caught.value.command.startswith("pip install")


def test_record_is_that_of_the_headers_installed(found):
    from llamastate._native import _build_info

    build = _loader.BuildInfo.from_module(_build_info)
    assert _loader.header_beside(_loader.load()) == build.header_sha256 == found.header_sha256


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("order", ["llama_cpp, llamastate._native.handles", "llamastate._native.handles, llama_cpp"])
def test_one_library_in_the_process(order):
    script = f"import {order}\nprint(*{{line.split()[-1] for line in open('/proc/self/maps') if '/lib' in line}})"
    result = run(sys.executable, "-W", "ignore", "-c", script, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    names = [Path(path).name for path in result.stdout.split()]
    for stem in ("libllama", "libggml", "libggml-base", "libggml-cpu"):
        assert sum(name.startswith(f"{stem}.") for name in names) == 1, names


# --- setup.py -------------------------------------------------------------------------------------------------------

SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "llama.cpp", "llamastate")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the sources, without anything that was built."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    ignore = shutil.ignore_patterns("*.so", "*.cpp", "_build_info.py", "__pycache__")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            # llama.cpp is a folder here, and matches a pattern above only inside of another one.
            shutil.copytree(source, copy / name, ignore=ignore)
        elif source.exists():
            shutil.copy(source, copy / name)
    return copy


@pytest.mark.parametrize(
    ("environment", "facts"),
    [
        ({"CXX": "/nonexistent", "CC": "/nonexistent"}, ("/nonexistent", "apt-get install g++")),
        ({"LLAMASTATE_LLAMA_CPP": "/nonexistent"}, ("/nonexistent/include/llama.h", "LLAMASTATE_LLAMA_CPP")),
    ],
)
def test_build_that_cannot_work_says_why(checkout, environment, facts):
    result = run(
        sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", cwd=checkout, env={**os.environ, **environment}
    )
    assert result.returncode != 0
    assert_one_paragraph(result.stderr, *facts)
    assert not list(checkout.glob("llamastate/**/*.cpp")), "Cython ran before the compiler was known to work"


@pytest.mark.slow
@pytest.mark.timeout(1500)  # llama-cpp-python compiles if pip has not kept its wheel
def test_isolated_install_into_a_clean_environment(checkout, tmp_path):
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    options = shlex.split(os.environ.get("PIP_OPTIONS", ""))
    install = run(python, "-m", "pip", "install", "--disable-pip-version-check", *options, checkout, cwd=tmp_path)
    assert install.returncode == 0, install.stdout[-4000:] + install.stderr[-4000:]
    # From another folder: the checkout must not be what is imported.
    script = "import llamastate, llamastate._native._loader as loader; print(llamastate.__file__); print(loader.load())"
    result = run(python, "-W", "error", "-c", script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    package, library = result.stdout.split()
    assert package.startswith(str(home))
    assert library.startswith(str(home))
    installed = {path.name for path in Path(package).parent.rglob("*")}
    assert {"py.typed", "_build_info.py", "llama.pxd"} <= installed
