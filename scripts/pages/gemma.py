"""The page on Gemma 3 270M, read from a GGUF file."""

from __future__ import annotations

import numpy as np

from mlx_turbokv.evaluate.tables import perplexity_table

from . import read, source, table


def gemma() -> str:
    """Loss beside llama.cpp's, and formats of K and V."""
    record, long, other = (
        read(name) for name in ("gemma_quality", "gemma_quality_long", "gemma_llama_cpp")
    )
    parts = [
        "# Gemma 3 270M",
        "From a GGUF file (Q4_K_M). Of its 18 layers 15 have a sliding window of 512 tokens and "
        "stay as mlx-lm keeps them; K and V of the other 3 are packed, one KV head of 256 values. "
        "`la-v7` protects 4 layers, and so all of them.",
        "## Beside llama.cpp",
        _losses(other),
        source("gemma_llama_cpp", other),
    ]
    for name, found in (("gemma_quality", record), ("gemma_quality_long", long)):
        shown = perplexity_table(found)
        parts += [
            f"## Windows of {found['n_ctx']:,}",
            f"{found['n_windows']} windows of wikitext-2; distances are against f16/f16.",
            table(list(shown.header), shown.rows),
            source(name, found),
        ]
    return "\n\n".join(parts)


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
