#!/usr/bin/env bash
# Build the extensions with AddressSanitizer and UndefinedBehaviorSanitizer in a copy of the sources, and let the fuzzer
# and the tests of hostile input run with them. Usage: tests/sanitize.sh [PYTHON [MINUTES]]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-.venv/bin/python}")
minutes=${2:-1}
copy=build/sanitize
compiler=${CC:-gcc}

# Only what changed, so that a second run compiles no more than it must.
mkdir -p "$copy"
for path in llamastate llama.cpp tests setup.py pyproject.toml README.md; do
    find "$path" -type f ! -name '*.so' ! -name '*.cpp' ! -name '_build_info.py' ! -path '*/__pycache__/*' | while read -r file; do
        cmp -s "$file" "$copy/$file" || install -D -m 644 "$file" "$copy/$file"
    done
done
cd "$copy"
LLAMASTATE_SANITIZE=address,undefined "$python" setup.py --quiet build_ext --inplace

runtime=$("$compiler" -print-file-name=libasan.so)
test -e "$runtime" || { echo "no AddressSanitizer beside $compiler" >&2; exit 1; }
# libstdc++ too: the sanitizer looks for its functions when it starts, and Python alone does not bring them.
export LD_PRELOAD="$(realpath "$runtime") $(realpath "$("$compiler" -print-file-name=libstdc++.so)")"
# Python does not free what it keeps until the end. Its own allocator would hide the ends of its buffers.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1:abort_on_error=1
export PYTHONMALLOC=malloc PYTHONPATH=. OMP_NUM_THREADS=1 GGML_NO_BACKTRACE=1 LLAMASTATE_TEST_THREADS=1
export LLAMASTATE_MODELS="${LLAMASTATE_MODELS:-../../.models}"

"$python" -c 'from llamastate._native import _build_info as b; assert b.SANITIZERS == "address,undefined", b'
"$python" -m tests.fuzz --minutes "$minutes" --seed 1
"$python" -m pytest -q -p no:cacheprovider -n "${TEST_PROCESSES:-2}" -m "not slow" \
    tests/test_bad_*.py tests/test_state_api.py tests/test_logits.py tests/test_sequences.py tests/test_sampler.py \
    tests/test_model.py tests/test_context.py tests/test_locks.py tests/fuzz
