"""A whole model on two back-ends: loss by window, and greedy text.

In float32, so that the two differ by rounding alone. Losses and texts are compared with
teacher-forced codes (teacher_forced.py): the second back-end reads the text that the first reads
and generates, takes over its codes, and must then choose the same tokens. Without that, two
back-ends may generate different texts with no error in either; where they first differ is recorded
as ``free`` and is no failure.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from teacher_forced import TeacherForcedCache

from mlx_turbokv.cache import make_prompt_cache
from mlx_turbokv.evaluate.divergence import Reference
from mlx_turbokv.evaluate.windows import scored_logits, targets_of
from mlx_turbokv.loading.models import load
from mlx_turbokv.model.text_windows import cut_windows

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from greedy import compare

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
# largest share of codes in which two back-ends may differ
MOST_DIFFERING = 1e-3
# nats by which the second back-end may prefer another token, with teacher-forced codes
FORCED_TIE = 1e-3
# nats by which the log-probability of any token may differ, with teacher-forced codes
FORCED_LOG_PROBABILITY = 1e-2
UNPROTECTED = {"sink": 0, "recent": 0}  # codes are forced on caches of one layout


def counts_of(caches: list[TeacherForcedCache]) -> dict[str, int]:
    """Codes, codes that differ, and wrong ones, of all caches."""
    names = ("codes", "differing", "wrong")
    return {name: sum(getattr(cache, f"n_{name}") for cache in caches) for name in names}


def window_nll(model, window: np.ndarray, caches: list) -> float:
    """Mean loss of a window's scored positions, in nats."""
    logits = scored_logits(model, window, caches)
    return float(Reference(logits, targets_of(window)).own_stats().nll.mean(dtype=np.float64))


def compare_windows(model, windows: np.ndarray, pair, backends) -> tuple[dict, list[str]]:
    """Losses by window on both back-ends, the second's with its own codes and teacher-forced."""
    nll = {"first": [], "second": [], "second_forced": []}
    counts = counts_of([])
    for i, window in enumerate(windows):
        caches = make_prompt_cache(model, *pair, backend=backends[0], **UNPROTECTED)
        nll["first"].append(window_nll(model, window, caches))
        forced = [TeacherForcedCache(cache, backends[1]) for cache in caches]
        nll["second_forced"].append(window_nll(model, window, forced))
        free = make_prompt_cache(model, *pair, backend=backends[1], **UNPROTECTED)
        nll["second"].append(window_nll(model, window, free))
        counts = {name: n + counts[name] for name, n in counts_of(forced).items()}
        print(pair, i, *(f"{x[-1]:.5f}" for x in nll.values()), counts, flush=True)
    first, second, forced = (np.array(x) for x in nll.values())
    apart, free = np.abs(first - forced).max(), first - second
    row = {
        "nll_by_window": nll,
        "largest_difference": float(apart),
        "largest_difference_free": float(np.abs(free).max()),
        "mean_difference_free": float(free.mean()),
        "se_difference_free": float(free.std(ddof=1) / len(free) ** 0.5) if len(free) > 1 else None,
        **counts,
    }
    name, failures = "/".join(pair), []
    if not apart <= WINDOW_NLL:
        failures.append(f"{name}: nll of a window differs by {apart:.4f}")
    failures += [f"{name}: {failure}" for failure in code_failures(row)]
    return row, failures


def forced_text(
    model, prompt: list[int], first: list, second: list[TeacherForcedCache], n: int
) -> dict:
    """Generates greedily through ``first``; ``second`` reads the same tokens in lockstep.

    Where ``second`` would choose another token it goes on with the first's, so that all ``n`` steps
    are compared.

    Args:
        first: empty caches.
        second: empty caches that take ``first``'s codes.

    Returns:
        n_tokens: steps; n_equal: those at which both choose the same token.
        different: the other steps, and how far the second's logit of the first's choice lies below
            that of its own, in nats; gap: the largest of these, None where there is none.
        log_probability: the largest difference of any token's log-probability at any step.
        codes, differing, wrong: as TeacherForcedCache counts them.
    """
    given, different, apart = prompt, [], []
    for step in range(n):
        expected, got = (_next_token(model, given, caches) for caches in (first, second))
        token, other = (mx.argmax(x).item() for x in (expected, got))
        if other != token:
            different.append({"step": step, "gap": (got[other] - got[token]).item()})
        apart.append(mx.abs(expected - got).max().item())
        given = [token]
    return {
        "n_tokens": n,
        "n_equal": n - len(different),
        "different": different,
        "gap": max((step["gap"] for step in different), default=None),
        "log_probability": float(np.max(apart)),
        **counts_of(second),
    }


def _next_token(model, tokens: list[int], caches: list) -> mx.array:
    """Log-probabilities of the token after these, evaluated, so that the source's rows are there.

    Shapes:
        returns: [vocabulary] float32.
    """
    logits = model(mx.array([tokens]), cache=caches)[0, -1].astype(mx.float32)
    logits = logits - mx.logsumexp(logits)
    mx.eval(logits)
    return logits


def forced_failures(forced: dict) -> list[str]:
    """What rounding does not explain in a text with teacher-forced codes."""
    failures = [
        f"the choices part at step {step['step']}, {step['gap']:.4f} nats"
        for step in forced["different"]
        if not step["gap"] <= FORCED_TIE
    ]
    if not forced["log_probability"] <= FORCED_LOG_PROBABILITY:
        failures.append(f"a log-probability differs by {forced['log_probability']:.4f}")
    return failures + code_failures(forced)


def code_failures(found: dict) -> list[str]:
    """What is wrong by the counts ``codes``, ``differing`` and ``wrong``."""
    failures = []
    if found["wrong"]:
        failures.append(f"{found['wrong']} codes or scales differ, and are no near-ties")
    if found["differing"] > MOST_DIFFERING * found["codes"]:
        failures.append(f"{found['differing']} of {found['codes']} codes differ")
    return failures


def compare_texts(model, tokenizer, pair, backends) -> tuple[list[dict], list[str]]:
    """Greedy text on both back-ends, with teacher-forced codes (must agree) and free (recorded)."""
    texts, failures = [], []
    for prompt in PROMPTS:
        tokens = tokenizer.encode(prompt)
        first = make_prompt_cache(model, *pair, backend=backends[0], **UNPROTECTED)
        second = [TeacherForcedCache(cache, backends[1]) for cache in first]
        forced = forced_text(model, tokens, first, second, N_TOKENS)
        caches = [
            partial(make_prompt_cache, model, *pair, backend=name, **UNPROTECTED)
            for name in backends
        ]
        free = compare(model, tokens, caches[1], caches[0], N_TOKENS)
        name = f"{'/'.join(pair)}, {prompt!r}"
        failures += [f"{name}: {failure}" for failure in forced_failures(forced)]
        texts.append({"prompt": prompt, "forced": forced, "free": vars(free)})
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
        row["greedy"], different = compare_texts(model, tokenizer, pair, backends)
        failures += wrong + different
        row["seconds"] = round(time.perf_counter() - start, 1)
        results["pairs"].append({"pair": "/".join(pair), **row})
        mx.clear_cache()
    return results, failures
