"""A whole model on two back-ends: perplexity by window, and greedy text."""

from __future__ import annotations

import time
from pathlib import Path

import mlx.core as mx

from mlx_turbokv.api import make_prompt_cache
from mlx_turbokv.evaluate.greedy import compare
from mlx_turbokv.evaluate.perplexity import perplexity
from mlx_turbokv.models import load

PAIRS = (("q8_0", "turbo2"), ("turbo4", "turbo3"))
PROMPTS = (
    "The capital of France is",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Explain how a bicycle stays upright.",
)
N_TOKENS = 100
# nats by which two back-ends may differ over a window of 255 predictions
WINDOW_NLL = 5e-3
# nats below the reference's choice at which another token is a near-tie
NEAR_TIE = 0.1


def compare_backends(
    source: str | None, backends: tuple[str, str], n_windows: int, text: Path
) -> tuple[dict, list[str]]:
    """Perplexity and greedy text of a model on two back-ends; the second is the reference.

    Returns:
        the figures, and what disagreed.
    """
    loaded = load(source)
    model, tokenizer = loaded.model, loaded.tokenizer
    results, failures = {"model": loaded.name, "pairs": []}, []
    for k, v in PAIRS:
        pair = f"{k}/{v}"
        nll = {}
        start = time.perf_counter()
        for backend in backends:
            evaluation = perplexity(
                model, tokenizer, text.read_text(encoding="utf-8"), [pair], 512, n_windows, backend
            )
            nll[backend] = evaluation.summary()[0]["nll_by_window"]
            print(pair, backend, f"{time.perf_counter() - start:.1f} s", nll[backend], flush=True)
        apart = max(abs(a - b) for a, b in zip(*nll.values()))
        if not apart <= WINDOW_NLL:
            failures.append(f"{pair}: nll of a window differs by {apart:.4f}")
        texts = []
        for prompt in PROMPTS:
            tokens = tokenizer.encode(prompt)
            found = compare(
                model,
                tokens,
                lambda: make_prompt_cache(model, k, v, backend=backends[1]),
                lambda: make_prompt_cache(model, k, v, backend=backends[0]),
                N_TOKENS,
            )
            if found.gap is not None and not abs(found.gap) <= NEAR_TIE:
                failures.append(f"{pair}: text parts at {found.n_equal}, {found.gap:.3f} nats apart")
            texts.append({"prompt": prompt, **vars(found)})
            print(pair, texts[-1], f"{time.perf_counter() - start:.1f} s", flush=True)
        row = {"pair": pair, "nll_by_window": nll, "largest_difference": apart, "greedy": texts}
        row["seconds"] = round(time.perf_counter() - start, 1)
        results["pairs"].append(row)
        mx.clear_cache()
    return results, failures
