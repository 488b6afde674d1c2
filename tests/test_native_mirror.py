"""What ``llama.pxd`` says about llama.cpp's headers is what they say.

The compiler checks that names exist. It does not check types: a field that has become a float is converted without a
word, and so is an argument that has moved.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import gguf
import llama_cpp
import pytest

import llamastate
from llamastate import SeqFlags
from llamastate._native import _build_info, _loader, consts, library

PXD = Path(llamastate.__file__).parent / "_native" / "llama.pxd"
HEADERS = ("ggml.h", "ggml-backend.h", "llama.h")
#: What the binding calls differently, because C keeps two kinds of names apart and Cython does not.
RENAMED = {"cbool": "bool", "llama_memory_i *": "llama_memory_t"}


# --- reading both -----------------------------------------------------------------------------------------------------


@cache
def header() -> str:
    """The headers without comments, in one line."""
    for folder in (library.parent.parent, library.parent.parent.parent):
        if (folder / "include" / "llama.h").exists():
            text = "".join((folder / "include" / name).read_text() for name in HEADERS)
            text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
            return re.sub(r"//[^\n]*", "", text)
    raise AssertionError("no headers beside the library")


@cache
def pxd() -> str:
    return re.sub(r"#[^\n]*", "", PXD.read_text())


def typed(declaration: str) -> str:
    """A type in one spelling: without the name of what has it, ``struct``, ``enum`` and where the spaces are."""
    text = re.sub(r"\b(struct|enum|class)\s+", "", declaration.strip())
    text = re.sub(r"\s*\*\s*", " * ", text)
    words = text.split()
    if len(words) > 1 and words[-1].isidentifier() and words[-1] not in ("const", "int", "long"):
        words.pop()
    for pattern, name in _enum_names().items():
        words = [name if word == pattern else word for word in words]
    text = " ".join(words)
    for ours, theirs in RENAMED.items():
        text = text.replace(ours, theirs)
    return text


@cache
def _enum_names() -> dict[str, str]:
    """``llama_pooling_type_enum`` → ``llama_pooling_type``: what is declared as ``enum ours "theirs"``."""
    return dict(re.findall(r'enum (\w+) "(\w+)":', pxd()))


@cache
def pxd_enums() -> dict[str, list[str]]:
    blocks = re.findall(r"^    enum (\w+)(?: \"(\w+)\")?:\n((?:        \w+\n)+)", pxd(), flags=re.MULTILINE)
    return {theirs or ours: body.split() for ours, theirs, body in blocks}


@cache
def pxd_structs() -> dict[str, list[str]]:
    blocks = re.findall(r"^    (?:ctypedef )?struct (\w+):\n((?:        [^\n]+\n)+)", pxd(), flags=re.MULTILINE)
    return {name: [line.strip() for line in body.splitlines() if line.strip() != "pass"] for name, body in blocks}


@cache
def pxd_functions() -> dict[str, tuple[str, list[str]]]:
    text = re.sub(r"\s+", " ", pxd())
    text = re.sub(r"ctypedef [^\n]*?noexcept nogil", "", text)
    found = re.findall(r"((?:const )?\w+(?: \*)*) ?((?:llama|ggml)_\w+)\(([^)]*)\)", text)
    return {name: (kind, [a for a in args.split(",") if a.strip()]) for kind, name, args in found}


@cache
def header_enums() -> dict[str, dict[str, int]]:
    """Members and their values; those that are not plain numbers, which no table here has, count on from -1e9."""
    enums = {}
    for name, body in re.findall(r"enum (\w+) \{(.*?)\}", header(), flags=re.DOTALL):
        value, values = -1, {}
        for item in filter(None, (item.strip() for item in body.split(","))):
            key, _, given = (part.strip() for part in item.partition("="))
            number = re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", given)
            value = value + 1 if not given else int(given, 0) if number else values.get(given, -(10**9))
            values[key] = value
        enums[name] = values
    return enums


@cache
def header_defines() -> dict[str, int]:
    values: dict[str, int] = {}
    for name, text in re.findall(r"^#define (LLAMA_\w+)[ \t]+(\S+)", header(), flags=re.MULTILINE):
        text = text.rstrip("u")
        if text in values:
            values[name] = values[text]
        elif re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text):
            values[name] = int(text, 0)
    return values


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_headers_are_those_it_was_built_with():
    assert _loader.header_beside(library) == _build_info.HEADER_SHA256


def test_flags():
    defined = header_defines()
    for name, flag in SeqFlags.__members__.items():
        assert flag == defined[f"LLAMA_STATE_SEQ_FLAGS_{name}"] == getattr(consts, f"FLAG_{name}")
    # A flag that llama.cpp gained is one that we would refuse without knowing what it does: somebody has to look.
    assert {name for name in defined if "_FLAGS_" in name} == {
        f"LLAMA_STATE_SEQ_FLAGS_{name}" for name in SeqFlags.__members__
    }


@pytest.mark.parametrize(
    "name", ["SESSION_MAGIC", "SESSION_VERSION", "STATE_SEQ_MAGIC", "STATE_SEQ_VERSION", "DEFAULT_SEED"]
)
def test_constants(name: str):
    assert getattr(consts, name) == header_defines()[f"LLAMA_{name}"] == getattr(llama_cpp, f"LLAMA_{name}")


@pytest.mark.parametrize(
    ("table", "enum", "prefix", "names"),
    [
        (consts.POOLING, "llama_pooling_type", "LLAMA_POOLING_TYPE_", {}),
        (consts.ROPE_SCALING, "llama_rope_scaling_type", "LLAMA_ROPE_SCALING_TYPE_", {}),
        (consts.FLASH_ATTN, "llama_flash_attn_type", "LLAMA_FLASH_ATTN_TYPE_", {"on": "enabled", "off": "disabled"}),
    ],
)
def test_tables_of_choices(table: dict[str, int], enum: str, prefix: str, names: dict[str, str]):
    """Every value that the header has, by its own name."""
    ours = {prefix + names.get(name, name).upper(): value for name, value in table.items()}
    assert ours == {name: value for name, value in header_enums()[enum].items() if not name.endswith("_MAX_VALUE")}


def test_cache_types():
    """By the names of another implementation of the same format."""
    assert {name: gguf.GGMLQuantizationType[name.upper()] for name in consts.CACHE_TYPES} == consts.CACHE_TYPES
    enum = header_enums()["ggml_type"]
    assert {name: enum[f"GGML_TYPE_{name.upper()}"] for name in consts.CACHE_TYPES} == consts.CACHE_TYPES


def test_number_of_sequences():
    assert llama_cpp.llama_max_parallel_sequences() == consts.MAX_PARALLEL_SEQUENCES


# --- declarations -----------------------------------------------------------------------------------------------------


def test_everything_was_found():
    """The tests below compare what their expressions find: enough of it."""
    assert len(pxd_enums()) >= 8
    assert sum(map(bool, pxd_structs().values())) >= 7
    assert len(pxd_functions()) >= 90
    names = set(re.findall(r"\b((?:llama|ggml)_\w+)\(", pxd()))
    assert names == set(pxd_functions())


@pytest.mark.parametrize("name", pxd_enums())
def test_enums(name: str):
    assert set(pxd_enums()[name]) <= set(header_enums()[name])


@pytest.mark.parametrize("name", [name for name, fields in pxd_structs().items() if fields])
def test_structs(name: str):
    """Each field that is declared has the type that the header gives it."""
    body = re.search(rf"struct {name} \{{(.*?)\n    \}}", header(), flags=re.DOTALL)
    assert body
    theirs: dict[str, str] = {}
    for line in body[1].split(";"):
        kind, *others = line.split(",")  # "float a, b;"
        if field := re.search(r"(\w+)(\[\d+\])?\s*$", kind):
            theirs[field[1]] = typed(kind)
            theirs.update({other.strip(): typed(kind) for other in others})
    for line in pxd_structs()[name]:
        field = line.split()[-1]
        assert theirs[field] == typed(line), line


@pytest.mark.parametrize("name", pxd_functions())
def test_functions(name: str):
    """The same types in the same places, and the same result."""
    result, arguments = pxd_functions()[name]
    found = re.search(rf"(?:LLAMA_API|GGML_API)\s+(?:DEPRECATED\()?([\w\s*]+?)\b{name}\s*\(([^)]*)\)", header())
    assert found
    assert typed(f"{result} x") == typed(f"{found[1]} x")
    theirs = [] if found[2].strip() in ("", "void") else found[2].split(",")
    assert [typed(argument) for argument in arguments] == [typed(argument) for argument in theirs]


# --- versions ---------------------------------------------------------------------------------------------------------


def test_native_version():
    version = llamastate.native_version()
    assert set(version) == {"llama", "ggml", "ggml_commit", "library"}
    assert version["llama"] == llama_cpp.llama_version().decode() == _build_info.LLAMA_VERSION
    assert version["ggml"] == _build_info.GGML_VERSION
    assert version["ggml_commit"] == _build_info.GGML_COMMIT
    assert Path(version["library"]).samefile(llama_cpp.llama_cpp._lib._name)
