#!/usr/bin/env bash
# Build the kernel's CPU code with the address and undefined-behaviour sanitizers, and run its tests on that build.
# Usage: scripts/sanitize.sh PYTHON [PYTEST ARGUMENTS]   (PYTHON needs ssod-edge's extra "train", and pytest)
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")  # not what the link of a virtual environment leads to
shift

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/src"
cp -r ssod_edge tests pyproject.toml "$work/src"
rm -f "$work"/src/ssod_edge/_kernels*.so
torch=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
"${CXX:-c++}" -std=c++20 -O1 -g -fopenmp-simd -fPIC -shared -Wall -Wextra -Werror -fno-omit-frame-pointer \
    -fsanitize=address,undefined -fno-sanitize-recover=all -DTORCH_TARGET_VERSION=0x020a000000000000 \
    -isystem "$torch/include" kernels/patch_sample.cpp -o "$work/src/ssod_edge/_kernels.so" -L"$torch/lib" -ltorch_cpu

cd "$work/src"
# Python and PyTorch free nothing at exit; new[] of one library and delete of another are theirs too.
export ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH="$work/src" PYTHONMALLOC=malloc
preload=$("${CXX:-c++}" -print-file-name=libasan.so):$("${CXX:-c++}" -print-file-name=libubsan.so)
# What the sanitizer holds back makes the one test that measures memory meaningless.
LD_PRELOAD=$preload "$python" -m pytest -q -p no:cacheprovider -k "not little_memory" "${@:-tests/kernels/test_kernel.py}"
