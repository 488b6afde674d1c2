"""Compiles ``llamastate._native`` against the llama.cpp that ``llama.cpp/locate.py`` finds.

Everything else about the package is in pyproject.toml. ``LLAMASTATE_SANITIZE=address,undefined`` builds the extensions
with those sanitizers; run Python with the sanitizer's runtime preloaded then.
"""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

ROOT = Path(__file__).resolve().parent
NATIVE = Path("llamastate", "_native")

# Uses the least of everything that must be there, so that a missing piece is found before Cython has run.
PROBE = "#include <Python.h>\n#include <string_view>\n#include <llama.h>\nstd::string_view probe = {};\n"

NO_COMPILER = (
    "llamastate is a C++ extension, and no compiler could compile a file that includes Python.h and llama.h: {reason}. "
    "Install a C++17 compiler and the headers of this Python (Debian, Ubuntu: apt-get install g++ python3-dev; Fedora: "
    "dnf install gcc-c++ python3-devel; macOS: xcode-select --install), or name another compiler with CC and CXX."
)


def load_locate():
    """Import ``llama.cpp/locate.py``; the dot in the folder's name rules out an import statement."""
    spec = importlib.util.spec_from_file_location("locate", ROOT / "llama.cpp" / "locate.py")
    module = sys.modules["locate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildNative(build_ext):
    """Finds llama.cpp when something is compiled, and not before: metadata and source archives need none."""

    def run(self):
        """Find, check, generate C++, compile; each failure ends in one paragraph."""
        locate = load_locate()
        try:
            llama_cpp = locate.locate()
        except locate.LocateError as error:
            raise SystemExit(f"\n{error}\n") from None
        sanitizers = os.environ.get("LLAMASTATE_SANITIZE", "")
        self.configure(llama_cpp, sanitizers)
        self.probe_compiler()
        self.generate()
        self.parallel = self.parallel or os.cpu_count()
        path, text = self.build_info(llama_cpp, sanitizers)
        if not path.exists() or path.read_text() != text:
            # Objects made with another llama.cpp or with other flags look up to date to their time stamps.
            self.force = True
        super().run()
        path.write_text(text)

    def configure(self, llama_cpp, sanitizers):
        """Add to each extension what is only known now."""
        rpaths = [llama_cpp.library_dir] if llama_cpp.prefix else []
        # From site-packages/llamastate/_native. The loader opens the libraries first, by full path; this serves tools
        # that open the extension by themselves.
        origin = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"
        rpaths.append(f"{origin}/../../llama_cpp/lib")
        flags = [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g"] if sanitizers else []
        for extension in self.extensions:
            extension.include_dirs = [llama_cpp.include_dir]
            extension.library_dirs = [llama_cpp.library_dir]
            extension.libraries = list(llama_cpp.libraries)
            extension.extra_compile_args = ["-std=c++17", "-O2", *flags]
            extension.extra_link_args = [*(f"-Wl,-rpath,{path}" for path in rpaths), *flags]
        self.include_dirs = [*self.include_dirs, llama_cpp.include_dir]

    def generate(self):
        """Turn .pyx into .cpp where it is out of date."""
        from Cython.Build import cythonize  # metadata is made without Cython

        generated = cythonize(
            self.extensions,
            nthreads=os.cpu_count() or 1,
            language_level=3,
            # A signature that inspect (and with it the check of the stubs) can read.
            compiler_directives={"embedsignature": True, "embedsignature.format": "clinic"},
        )
        # cythonize returns copies, without the marks that setuptools has put on its own objects.
        for extension, copy in zip(self.extensions, generated, strict=True):
            extension.sources = copy.sources

    def probe_compiler(self):
        """Compile a few lines with the compiler and the headers that the extensions will need."""
        from distutils.ccompiler import new_compiler  # setuptools' copy, once that is imported
        from distutils.sysconfig import customize_compiler

        compiler = new_compiler()
        customize_compiler(compiler)
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(PROBE)
            try:
                compiler.compile(
                    [str(source)], output_dir=folder, include_dirs=self.include_dirs, extra_postargs=["-std=c++17"]
                )
            except (CCompilerError, ExecError, PlatformError, OSError) as error:
                raise SystemExit(f"\n{NO_COMPILER.format(reason=str(error).strip())}\n") from None

    def build_info(self, llama_cpp, sanitizers):
        """Return path and text of the record that the check at import compares with."""
        root = ROOT if self.inplace else Path(self.build_lib)
        facts = {
            "PROVIDER": llama_cpp.provider,
            "PROVIDER_VERSION": llama_cpp.provider_version,
            "PREFIX": llama_cpp.prefix,
            "SONAME": llama_cpp.soname,
            "LLAMA_VERSION": llama_cpp.llama_version,
            "GGML_VERSION": llama_cpp.ggml_version,
            "GGML_COMMIT": llama_cpp.ggml_commit,
            "HEADER_SHA256": llama_cpp.header_sha256,
            "SANITIZERS": sanitizers,
        }
        lines = ['"""What the extensions were compiled against; written by setup.py."""', ""]
        lines += [f"{name} = {value!r}" for name, value in facts.items()]
        return root / NATIVE / "_build_info.py", "\n".join(lines) + "\n"


# Cython's worker processes import this file again where processes are not forked.
if __name__ == "__main__":
    setup(
        cmdclass={"build_ext": BuildNative},
        ext_modules=[
            Extension(f"llamastate._native.{source.stem}", [str(NATIVE / source.name)], language="c++")
            for source in sorted((ROOT / NATIVE).glob("*.pyx"))
        ],
    )
