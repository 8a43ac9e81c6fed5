#!/bin/sh
# Installs what the tests need, and runs them: in a virtual environment, from any folder.
# clang and g++ check and run the Metal kernels on the CPU; OpenBLAS makes MLX on the CPU fast.
# The tests run in a process per core, at most 4; `-n 0` runs them in one.
set -eu
cd "$(dirname "$0")/.."
if [ "$(uname)" = Linux ] && ! { command -v clang && command -v g++; } >/dev/null 2>&1; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq
        apt-get install -y -qq clang g++ libopenblas0-pthread >/dev/null
    else
        echo "Error: the tests need clang and g++ (Debian: apt-get install clang g++)." >&2
        exit 2
    fi
fi
python3 -m pip install -q -e ".[cpu,test]"
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
exec python3 -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
