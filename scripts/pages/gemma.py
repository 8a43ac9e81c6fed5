"""The page on Gemma 3 270M, read from a GGUF file: its loss beside llama.cpp's."""

from __future__ import annotations

import numpy as np

from . import read, source, table


def gemma() -> str:
    """Loss beside llama.cpp's."""
    record = read("gemma_llama_cpp")
    return "\n\n".join([
        "# Gemma 3 270M",
        "From a GGUF file (Q4_K_M), with an f16 cache. What formats of K and V cost it: "
        "[quality.md](quality.md).",
        _losses(record),
        source("gemma_llama_cpp", record),
    ])  # fmt: skip


def _losses(record: dict) -> str:
    """Both losses on the same windows, and how far they are apart."""
    here, there = (np.array(record[key]) for key in ("nll_by_window_here", "nll_by_window"))
    apart = here - there
    error = apart.std(ddof=1) / len(apart) ** 0.5
    lines = [
        ["mlx_turbokv (float32)", f"{here.mean():.4f}", f"{np.exp(here.mean()):.3f}"],
        [f"llama.cpp {record['llama_cpp']}", f"{there.mean():.4f}", f"{np.exp(there.mean()):.3f}"],
    ]
    return "\n\n".join([
        f"Loss of the same {len(here)} windows of {record['n_ctx']} tokens of wikitext-2, f16 "
        f"cache. The difference is {apart.mean():+.4f} ± {error:.4f} nats a token, in the farthest "
        f"window {apart[np.abs(apart).argmax()]:+.4f}: llama.cpp rounds activations to 8 bits on "
        "a CPU.",
        table(["", "nats a token", "PPL"], lines),
    ])  # fmt: skip
