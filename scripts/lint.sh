#!/bin/sh
# Checks style and types: ruff, pyright, and clang-format for metal/.
set -eu
cd "$(dirname "$0")/.."
python3 -m pip install -q -e ".[cpu,test,lint]"
python3 -m ruff check .
python3 -m ruff format --check .
python3 -m pyright
git ls-files 'metal/*' 'tests/metal_host/*' | grep -E '\.(h|metal|cpp)$' | xargs clang-format --dry-run --Werror
