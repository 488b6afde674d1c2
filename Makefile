# The two commands of a newcomer are `make demo` and `make test`; both set up what is missing and say so.
#
#   PYTHON=python3.12 make test         another interpreter (for a new .venv)
#   PIP_OPTIONS="--no-index ..." make   options for every pip install
#   TEST_OPTIONS="-k state -x" make test

PYTHON ?= python3
VENV ?= .venv
export PIP_OPTIONS ?=
TEST_OPTIONS ?=
# pytest processes; each computes with one thread.
TEST_PROCESSES ?= 2

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS)
DONE := $(VENV)/.done

NATIVE := $(wildcard llamastate/_native/*.pyx llamastate/_native/*.pxd)
BUILD := setup.py pyproject.toml llama.cpp/locate.py llama.cpp/amx.py

# More OpenMP threads than the processes have cores would wait for each other in every small tensor.
# GGML_NO_BACKTRACE: an expected abort in a child process must not start a debugger.
TEST_ENV := LLAMASTATE_TEST_THREADS=1 OMP_NUM_THREADS=1 GGML_NO_BACKTRACE=1

.PHONY: help demo test bench bench-peers lint format sanitize build models clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    a batch of 64 questions on real texts, killed in the middle and gone on with, against one by one"
	@echo "make test    all tests"
	@echo "make bench   the ratios of the README, measured here"
	@echo "make bench-peers   environments for cyllama, xllamacpp and llama-cpp-python's server, to compare with"
	@echo "make lint    ruff, mypy, and stubs against the compiled modules"
	@echo "make format  let ruff rewrite the sources"
	@echo "make sanitize   fuzz and tests of hostile input with AddressSanitizer and UBSan (Linux, gcc)"
	@echo "make build   .venv and the extension modules only"
	@echo "make clean   remove what was built (not .venv, not the models)"

# It fetches the one model that it needs.
demo: build
	@PYTHONPATH=. $(PY) examples/run_batch.py

test: build models
	$(TEST_ENV) $(PY) -m pytest -n $(TEST_PROCESSES) $(TEST_OPTIONS)

# Not in parallel: it measures.
bench: build models $(DONE)/bench
	$(PY) -m pytest bench $(TEST_OPTIONS)

# cyllama and xllamacpp each bring a llama.cpp of their own, and so have to stay out of .venv. The server in
# llama-cpp-python's examples comes with its sources, and runs on the llama-cpp-python of .venv.
SERVER_NEEDS := fastapi jinja2 numpy openai pydantic safetensors uvicorn websockets
bench-peers: build
	@for name in cyllama xllamacpp server; do \
		test -x .venv-$$name/bin/python || $(PYTHON) -m venv .venv-$$name || exit 1; done
	.venv-cyllama/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) cyllama
	.venv-xllamacpp/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) xllamacpp
	.venv-server/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) $(SERVER_NEEDS)
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		>"$$(.venv-server/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/llama.pth"
	@version=$$($(PY) -c 'import importlib.metadata as m; print(m.version("llama-cpp-python"))') && cd .venv-server && \
	if [ ! -e llama_cpp_python-$$version ]; then \
		bin/python -m pip download --quiet --no-deps --no-binary :all: $(PIP_OPTIONS) llama-cpp-python==$$version && \
		tar xzf llama_cpp_python-$$version.tar.gz; fi

lint: build
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m mypy.stubtest --allowlist tests/stubtest-allowlist.txt --ignore-unused-allowlist llamastate._native

format: build
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Not part of make test: the whole package is compiled once more, and all of it runs several times slower.
sanitize: build
	tests/sanitize.sh $(PY) $(MINUTES)

build: $(DONE)/extensions

models: $(DONE)/install
	@$(PY) -m tests.models

clean:
	rm -rf build .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks $(DONE)/extensions
	rm -f llamastate/_native/*.so llamastate/_native/*.cpp llamastate/_native/_build_info.py

# --- what the targets above rest on ----------------------------------------------------------------------------------

$(DONE)/venv:
	@echo "== making $(VENV) with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Python 3.10 or newer is needed, not {sys.version}")'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(DONE) && touch $@

# Prints lists of requirements out of pyproject.toml, so that they are written down once.
define REQUIREMENTS
import sys
if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    value = tomllib.load(file)
for key in sys.argv[1].split("."):
    value = value[key]
print(*value, sep="\n")
endef
export REQUIREMENTS

# Into .venv instead of pip's throwaway environment: the extensions are then compiled against the very llama-cpp-python
# that they will run with. A compiler that breaks llama.cpp's AMX code gets arguments that mend it (llama.cpp/README.md);
# that build goes past pip's cache of wheels, which does not tell builds apart, and is repeated when its record changes.
$(DONE)/requirements: pyproject.toml llama.cpp/amx.py llama.cpp/amx.h $(DONE)/venv
	@echo "== installing the build requirements (llama-cpp-python compiles llama.cpp the first time: about 4 minutes)"
	@$(PY) -c "$$REQUIREMENTS" build-system.requires > $@.txt
	@args="$$($(PY) llama.cpp/amx.py --mend)"; llama="$$(grep '^llama-cpp-python' $@.txt)"; \
	record="$$llama $$args $$(cksum < llama.cpp/amx.h)"; \
	if [ -n "$$args" ] && [ "$$record" != "$$(cat $(DONE)/amx 2>/dev/null)" ]; then \
		echo "   with CMAKE_ARGS=$$args, for this compiler breaks llama.cpp's AMX code"; \
		CMAKE_ARGS="$$args" $(PIP) --no-cache-dir --force-reinstall --no-deps "$$llama" && \
		echo "$$record" > $(DONE)/amx; fi
	@$(PIP) -r $@.txt
	@touch $@

$(DONE)/install: $(BUILD) $(DONE)/requirements
	@echo "== compiling and installing llamastate, editable"
	@$(PIP) --no-build-isolation -e '.[test,dev]'
	@touch $@

$(DONE)/extensions: $(NATIVE) $(DONE)/install
	@echo "== the extension modules, where a source has changed"
	@$(PY) setup.py --quiet build_ext --inplace
	@touch $@

$(DONE)/bench: pyproject.toml $(DONE)/install
	@echo "== installing what the benchmarks need"
	@$(PY) -c "$$REQUIREMENTS" project.optional-dependencies.bench > $@.txt
	@$(PIP) -r $@.txt
	@touch $@
