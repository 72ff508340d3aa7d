#!/usr/bin/env bash
# Make the virtual environment in $1 (default .venv) and install ssod-edge, editable, with every extra.
# PYTHON=/path/to/python chooses the interpreter; otherwise the newest of 3.10 to 3.14 on the PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:-.venv}
extras=${EXTRAS:-all,dev}

suitable() { # can it run, and is it 3.10 or newer?
    "$1" -c 'import sys, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2>/dev/null
}

find_python() {
    local name
    for name in ${PYTHON:-python3.14 python3.13 python3.12 python3.11 python3.10 python3}; do
        if suitable "$name"; then
            command -v "$name"
            return
        fi
    done
    echo "error: no Python 3.10 to 3.14 with the venv module found. Install one, or name it: PYTHON=/path/to/python make venv" >&2
    return 3
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    rm -rf "$venv"
    echo "Making $venv with $("$python" --version), $python"
    # Distributions that split ensurepip off can still lend their own pip.
    "$python" -m venv "$venv" 2>/dev/null ||
        { rm -rf "$venv" && "$python" -m venv --without-pip "$venv" &&
            "$python" -m pip --python "$venv/bin/python" install --quiet pip; } ||
        { rm -rf "$venv" && echo "error: $python has neither ensurepip nor pip. On Debian: apt install python3-venv" >&2 &&
            exit 3; }
fi

export PIP_DISABLE_PIP_VERSION_CHECK=1
echo "Installing ssod-edge[$extras] into $venv (about 7 GB with PyTorch; a few minutes the first time)"
"$venv/bin/python" -m pip install --quiet --upgrade pip
# setuptools warns at every editable install that folders may shadow it; there is nothing to act on.
PYTHONWARNINGS="ignore:Editable" "$venv/bin/python" -m pip install --quiet --editable ".[$extras]"
# The kernel needs PyTorch where it is built, which an isolated build does not see.
PYTHONWARNINGS="ignore:Editable" "$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation --editable .

# JetPack 6 has Python 3.10: where there is one, the tests of what goes onto a device run on it too.
for python310 in python3.10 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.10.*/bin/python; do
    "$python310" -c 'import ensurepip' 2>/dev/null || continue
    "$python310" -m venv "$venv/python310"
    "$venv/python310/bin/python" -m pip install --quiet numpy Pillow click rich onnxruntime openvino \
        opencv-python-headless pytest ||
        { rm -rf "$venv/python310" && echo "note: no environment for the tests on Python 3.10" >&2; }
    break
done
