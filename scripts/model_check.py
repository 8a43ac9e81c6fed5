"""A whole model on two back-ends: loss by window, and greedy text.

In float32, so that the two differ by rounding alone. A window's loss is compared with near-ties of
the quantiser settled alike (witnessed.py); how far the back-ends part when each settles its own is
given beside it, and so is the share of codes that turned.
"""

from __future__ import annotations

import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_turbokv.api import make_prompt_cache
from mlx_turbokv.evaluate.divergence import Reference
from mlx_turbokv.evaluate.greedy import compare
from mlx_turbokv.evaluate.windows import cut_windows, scored_logits, targets_of
from mlx_turbokv.models import load
from witnessed import WitnessedCache

PAIRS = (("q8_0", "turbo2"), ("turbo4", "turbo3"))
PROMPTS = (
    "The capital of France is",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Explain how a bicycle stays upright.",
)
N_CTX = 512
N_TOKENS = 100
# nats by which two back-ends may differ in the mean loss of a window
WINDOW_NLL = 5e-3
# share of codes that may be settled as the other back-end did
MOST_TURNED = 1e-3
# nats below the reference's choice at which another token is a near-tie
NEAR_TIE = 0.1


def window_nll(model, window: np.ndarray, caches: list) -> float:
    """Mean loss of a window's scored positions, in nats."""
    logits = scored_logits(model, window, caches)
    return float(Reference(logits, targets_of(window)).own_stats().nll.mean(dtype=np.float64))


def compare_windows(model, windows: np.ndarray, pair, backends) -> tuple[dict, list[str]]:
    """The loss of each window on both back-ends, the second once free and once settled."""
    nll = {"first": [], "second": [], "second_settled": []}
    n_codes = n_turned = n_wrong = 0
    for i, window in enumerate(windows):
        caches = make_prompt_cache(model, *pair, backend=backends[0])
        nll["first"].append(window_nll(model, window, caches))
        settled = [WitnessedCache(cache, backends[1]) for cache in caches]
        nll["second_settled"].append(window_nll(model, window, settled))
        free = make_prompt_cache(model, *pair, backend=backends[1])
        nll["second"].append(window_nll(model, window, free))
        n_codes += sum(cache.n_codes for cache in settled)
        n_turned += sum(cache.n_turned for cache in settled)
        n_wrong += sum(cache.n_wrong for cache in settled)
        print(pair, i, *(f"{x[-1]:.5f}" for x in nll.values()), n_turned, n_wrong, flush=True)
    first, second, settled = (np.array(x) for x in nll.values())
    apart, free = np.abs(first - settled).max(), first - second
    row = {
        "nll_by_window": nll,
        "largest_difference": float(apart),
        "largest_difference_free": float(np.abs(free).max()),
        "mean_difference_free": float(free.mean()),
        "se_difference_free": float(free.std(ddof=1) / len(free) ** 0.5) if len(free) > 1 else None,
        "codes": n_codes,
        "turned": n_turned,
        "wrong": n_wrong,
    }
    name, failures = "/".join(pair), []
    if not apart <= WINDOW_NLL:
        failures.append(f"{name}: nll of a window differs by {apart:.4f}")
    if n_wrong:
        failures.append(f"{name}: {n_wrong} codes or scales differ, and are no near-ties")
    if n_turned > MOST_TURNED * n_codes:
        failures.append(f"{name}: {n_turned} of {n_codes} codes differ")
    return row, failures


def compare_texts(model, tokenizer, pair, backends) -> tuple[list[dict], list[str]]:
    """Greedy text on both back-ends; where it parts, it must be at a near-tie."""
    texts, failures = [], []
    for prompt in PROMPTS:
        found = compare(
            model,
            tokenizer.encode(prompt),
            lambda: make_prompt_cache(model, *pair, backend=backends[1]),
            lambda: make_prompt_cache(model, *pair, backend=backends[0]),
            N_TOKENS,
        )
        if found.gap is not None and not abs(found.gap) <= NEAR_TIE:
            failures.append(f"{'/'.join(pair)}: text parts at {found.n_equal}, {found.gap:.3f} nats")
        texts.append({"prompt": prompt, **vars(found)})
        print(pair, texts[-1], flush=True)
    return texts, failures


def compare_backends(
    source: str | None, backends: tuple[str, str], n_windows: int, text: Path
) -> tuple[dict, list[str]]:
    """Loss by window and greedy text of a model on two back-ends; the second is the reference.

    Returns:
        the figures, and what disagreed.
    """
    loaded = load(source, dtype=mx.float32, packed=False)
    model, tokenizer = loaded.model, loaded.tokenizer
    windows = cut_windows(tokenizer, text.read_text(encoding="utf-8"), N_CTX, n_windows)
    results, failures = {"model": loaded.name, "dtype": "float32", "pairs": []}, []
    for pair in PAIRS:
        start = time.perf_counter()
        row, wrong = compare_windows(model, windows, pair, backends)
        row["greedy"], parted = compare_texts(model, tokenizer, pair, backends)
        failures += wrong + parted
        row["seconds"] = round(time.perf_counter() - start, 1)
        results["pairs"].append({"pair": "/".join(pair), **row})
        mx.clear_cache()
    return results, failures
